"""The training step never makes the host wait for a GPU; shown without one.

Everything runs on fake tensors, which have shapes and no values: what asks for a value (`item`,
`tolist`, `nonzero`, a boolean index, `repeat_interleave` by a tensor) raises. Tensors made of
Python numbers, which on a GPU are copies from the host, are refused by a mode of our own. The code
takes the paths of a GPU; the kernels themselves do not run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest
import torch
import trl.trainer.utils  # noqa: F401  the first backward pass imports it, and peft with it
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniThinkerForConditionalGeneration,
)
from trl.kernels import chunked_logprob

from omni_train.data.collate import collate
from omni_train.data.image import _scale_and_shift
from omni_train.data.types import Batch
from omni_train.data.visibility import NO_PARENT, Segments
from omni_train.engine.recompute import Checkpointing, checkpoint_layers
from omni_train.models import attention
from omni_train.models.attention import packed_hidden
from omni_train.models.build import build_thinker
from omni_train.models.presets import build_config
from omni_train.models.thinker import ThinkerForTraining
from omni_train.objectives.next_token import next_token
from tests.numerics.samples import make_sample, small_config, small_tokenizer


class NoNewConstants(TorchDispatchMode):
    """Refuses tensors made of Python numbers, and notes which kernels ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        assert "lift_fresh" not in str(func), "a tensor made of numbers of the host"
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def faked(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Fake tensors, the kernels of a GPU in half precision, and TRL's loss without Triton."""
    monkeypatch.setattr(attention, "_fits_varlen", lambda query: True)
    monkeypatch.setattr(chunked_logprob, "_use_triton", lambda device: False)
    _scale_and_shift.cache_clear()
    with FakeTensorMode() as mode:
        yield mode
    _scale_and_shift.cache_clear()


def fake_model() -> ThinkerForTraining:
    """On no memory, in bf16."""
    config = small_config(small_tokenizer())[0]
    whole = build_config(config.preset, small_tokenizer(), config.tiny)
    with torch.device("meta"):
        plain = Qwen2_5OmniThinkerForConditionalGeneration(whole.thinker_config)
        model = ThinkerForTraining(plain)
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(param.shape, dtype=torch.bfloat16)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return model.train()


def real_batch(kinds: list[list[str]]) -> Batch:
    tokenizer = small_tokenizer()
    model = build_thinker(small_config(tokenizer)[0], tokenizer, seed=1, dtype=torch.float32)
    made = [make_sample(model.thinker, model.spec, kind, seed=i) for i, kind in enumerate(kinds)]
    return collate([sample.encoded for sample in made], model.spec)


def fake(value: Any, mode: FakeTensorMode) -> Any:
    """The same without values."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if isinstance(value, dict):
        return {key: fake(item, mode) for key, item in value.items()}
    if isinstance(value, Segments):
        starts = ("query_starts", "key_starts", "key_index")
        for name in starts:
            setattr(value, name, fake(getattr(value, name), mode))
    return value


@pytest.mark.parametrize("kinds", [[["av"], ["image", "audio"], []], []], ids=["media", "empty"])
@pytest.mark.parametrize("policy", [Checkpointing.none, Checkpointing.full])
def test_a_step_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch, kinds: list[list[str]], policy: Checkpointing
) -> None:
    batch = real_batch(kinds)
    with faked(monkeypatch) as mode:
        model = fake_model()
        checkpoint_layers(model, policy, offload=False)
        moved = Batch(**{f.name: fake(getattr(batch, f.name), mode) for f in fields(Batch)})
        _scale_and_shift(moved.patches.device)  # once in a process
        with NoNewConstants() as watched:
            loss = next_token(model, moved).loss
            loss.backward()
    used = [p for n, p in model.named_parameters() if "audio_bos_eos" not in n]
    assert all(param.grad is not None for param in used)
    assert "torch_attn._varlen_attn.default" in watched.seen


def test_a_shared_prompt_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = Segments([5, 3, 4], [NO_PARENT, 0, 0])
    with faked(monkeypatch) as mode:
        language = fake_model().thinker.model.language_model
        moved = fake(segments, mode)
        width = language.config.hidden_size
        embeds = torch.zeros(1, 12, width, dtype=torch.bfloat16, requires_grad=True)
        positions = torch.zeros(4, 1, 12, dtype=torch.long)
        with NoNewConstants() as watched:
            packed_hidden(language, embeds, positions, moved).sum().backward()
    assert "torch_attn._varlen_attn.default" in watched.seen


def test_the_watch_sees_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the worker's numbers the towers would wait: this is what the tests above refuse."""
    batch = real_batch([["audio"]])
    with faked(monkeypatch) as mode:
        model = fake_model()
        moved = Batch(**{f.name: fake(getattr(batch, f.name), mode) for f in fields(Batch)})
        for name in ("max_seqlen", "valid_indices"):
            kept = {key: value for key, value in moved.audio_kwargs.items() if key != name}
            whole, moved.audio_kwargs = moved.audio_kwargs, kept
            with pytest.raises(DataDependentOutputException):
                model(moved)
            moved.audio_kwargs = whole
        with pytest.raises(AssertionError, match="numbers of the host"), NoNewConstants():
            torch.tensor([0.5])
