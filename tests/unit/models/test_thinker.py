"""The head equals log_softmax; attention by segments equals a dense mask and builds none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from omni_train.models import thinker as thinker_module
from omni_train.models.attention import segment_attention, segment_kwargs
from omni_train.models.thinker import LogProbHead


@pytest.mark.parametrize("chunk", [16, 50, 8192])
def test_head_equals_log_softmax(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Also where the vocabulary takes several chunks, the last one not full."""
    monkeypatch.setattr(thinker_module, "LOGPROB_CHUNK", chunk)
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


def test_head_gives_logits_without_targets() -> None:
    head = LogProbHead(8, 20, bias=False)
    hidden = torch.randn(2, 3, 8)
    torch.testing.assert_close(head(hidden), hidden @ head.weight.T)


@pytest.mark.parametrize("lengths", [[12], [1, 4, 7], [5, 5, 1, 1]])
def test_segments_equal_a_dense_mask(lengths: list[int]) -> None:
    torch.manual_seed(1)
    total, module = sum(lengths), nn.Module()
    module.num_key_value_groups = 2
    query = torch.randn(1, 4, total, 16)
    key, value = torch.randn(2, 1, 2, total, 16).unbind(0)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    dense = (document[:, None] == document[None]) & torch.ones(total, total).tril().bool()
    kwargs = segment_kwargs(lengths, torch.device("cpu"))
    got, _ = segment_attention(module, query, key, value, None, scaling=0.3, **kwargs)
    want, _ = segment_attention(module, query, key, value, dense[None, None], scaling=0.3)
    assert got.shape == (1, total, 4, 16)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_segments_must_make_up_the_pack() -> None:
    query = torch.randn(1, 2, 6, 8)
    for lengths, mask in (([3, 2], None), ([6], torch.ones(1, 1, 6, 6, dtype=torch.bool))):
        with pytest.raises(AssertionError):
            segment_attention(nn.Module(), query, query, query, mask, segment_lengths=lengths)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_varlen_equals_each_segment_alone() -> None:
    torch.manual_seed(2)
    lengths, device = [7, 64, 1, 130], torch.device("cuda")
    shape = (1, 4, sum(lengths), 32)
    query = torch.randn(shape, device=device, dtype=torch.bfloat16)
    key, value = (query[:, :2] * 0.5).contiguous(), (query[:, 2:] * 2).contiguous()
    kwargs = segment_kwargs(lengths, device)
    got, _ = segment_attention(nn.Module(), query, key, value, None, **kwargs)
    kwargs["segment_starts"] = None
    want, _ = segment_attention(nn.Module(), query, key, value, None, **kwargs)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
