"""The head equals log_softmax."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from omni_train.models import thinker as thinker_module
from omni_train.models.thinker import LogProbHead


@pytest.mark.parametrize("chunk", [16, 50, 8192])
def test_head_equals_log_softmax(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Also where the vocabulary takes several chunks, the last one not full."""
    monkeypatch.setattr(thinker_module, "CPU_TILE_COLUMNS", chunk)
    torch.manual_seed(0)
    head = LogProbHead(24, 130, bias=False)
    nn.init.normal_(head.weight)
    hidden = torch.randn(9, 24, requires_grad=True)
    targets = torch.randint(0, 130, (9,))
    factor = torch.rand(9)
    logprobs = head(hidden, targets)
    (logprobs * factor).sum().backward()
    got = (hidden.grad.clone(), head.weight.grad.clone())
    hidden.grad = head.weight.grad = None
    wanted = torch.log_softmax(head(hidden), dim=-1).gather(1, targets[:, None])[:, 0]
    (wanted * factor).sum().backward()
    assert logprobs.dtype == torch.float32
    assert logprobs.shape == (9,)
    torch.testing.assert_close(logprobs, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, (hidden.grad, head.weight.grad), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [16, 8192])
def test_head_says_where_the_target_is_the_most_probable(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(thinker_module, "CPU_TILE_COLUMNS", chunk)
    torch.manual_seed(2)
    head = LogProbHead(24, 130, bias=False)
    nn.init.normal_(head.weight)
    hidden = torch.randn(60, 24)
    best = head(hidden).argmax(dim=-1)
    assert best.max() > 112, "the last tile has a winner too"
    targets = torch.where(torch.arange(60) % 3 == 0, (best + 1) % 130, best)
    logprobs, right = head(hidden, targets, score=True)
    assert torch.equal(logprobs, head(hidden, targets))
    assert torch.equal(right, (torch.arange(60) % 3 != 0).float())


def test_a_tile_is_smaller_on_a_cpu() -> None:
    sizes = [thinker_module.tile_columns(torch.device(name)) for name in ("cpu", "cuda")]
    assert sizes == [thinker_module.CPU_TILE_COLUMNS, thinker_module.TILE_COLUMNS]
    assert sizes == sorted(sizes)


def test_head_gives_logits_without_targets() -> None:
    head = LogProbHead(8, 20, bias=False)
    hidden = torch.randn(2, 3, 8)
    torch.testing.assert_close(head(hidden), hidden @ head.weight.T)
