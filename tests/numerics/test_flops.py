"""Model FLOPs against what torch counts while the same pack runs forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from omni_train.data.collate import collate
from omni_train.data.types import Batch, ModelSpec
from omni_train.models import flops
from omni_train.models.build import build_thinker
from omni_train.models.groups import group_of
from omni_train.models.thinker import ThinkerForTraining
from tests.numerics.samples import make_sample, small_config, small_tokenizer

MEDIA = ["image", "audio", "image", "video", "audio", "image"]


@pytest.fixture(scope="module")
def built() -> tuple[ThinkerForTraining, ModelSpec]:
    tokenizer = small_tokenizer()
    config, spec = small_config(tokenizer)
    return build_thinker(config, tokenizer, seed=1, dtype=torch.float32), spec


@pytest.fixture(autouse=True)
def _read_again() -> Iterator[None]:
    """What is frozen changes here, and is read once of a model."""
    flops._matmul_parameters.cache_clear()
    yield
    flops._matmul_parameters.cache_clear()


def matmuls(model: ThinkerForTraining, batch: Batch) -> int:
    """FLOPs of all matrix products, the head over all tokens; without convolutions, attention."""
    with FlopCounterMode(display=False) as counter:
        model.thinker.lm_head(model.hidden(batch)).sum().backward()
    found = counter.get_flop_counts()["Global"]
    return sum(count for name, count in found.items() if str(name) in ("aten.mm", "aten.addmm"))


def rest(model: ThinkerForTraining, batch: Batch, trained: set[str]) -> float:
    """Attention by the definition, and what is counted of convolutions."""
    text = model.thinker.config.text_config
    pairs = sum(length**2 for length in batch.segments.lengths)
    total = 6.0 * text.num_hidden_layers * text.hidden_size * pairs
    units = {"vision_encoder": batch.patches.shape[0], "audio_encoder": 2 * len(batch.audio_index)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv3d):
            group = group_of(f"{name}.weight")
            total += (6 if group in trained else 2) * module.weight.numel() * units[group]
    return total


@pytest.mark.parametrize("frozen", [(), ("llm", "lm_head"), ("audio_encoder", "vision_encoder")])
def test_flops_are_those_that_torch_counts(
    built: tuple[ThinkerForTraining, ModelSpec], frozen: tuple[str, ...]
) -> None:
    model, spec = built
    samples = [make_sample(model.thinker, spec, MEDIA, seed=seed) for seed in range(4)]
    batch = collate([sample.encoded for sample in samples], spec)
    for name, param in model.named_parameters():
        param.requires_grad_(group_of(name) not in frozen)
    trained = {group_of(name) for name, param in model.named_parameters() if param.requires_grad}
    ours = flops.thinker_flops(model, batch) - rest(model, batch, trained)
    # The first trained layer's input needs no gradient: a little less than the definition.
    assert ours == pytest.approx(matmuls(model, batch), rel=0.02)
