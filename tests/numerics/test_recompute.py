"""Layers that run twice give the same gradients and keep less; the estimate knows how much."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from omni_train.config.errors import ConfigError
from omni_train.data.collate import collate
from omni_train.data.types import Batch
from omni_train.engine import recompute
from omni_train.engine.deepspeed import DeepSpeedConfig, build_engine
from omni_train.engine.optim import OptimConfig
from omni_train.engine.recompute import (
    POLICIES,
    Checkpointing,
    activation_bytes,
    checkpoint_layers,
    choose,
)
from omni_train.models.build import build_thinker
from omni_train.models.config import ModelConfig, TinySizes
from omni_train.models.thinker import ThinkerForTraining
from omni_train.objectives.next_token import next_token
from tests.numerics.samples import make_sample, small_tokenizer

SIZES = TinySizes(
    text_width=64, text_layers=4, audio_width=64, audio_layers=2, vision_width=64, vision_layers=2
)


@pytest.fixture(scope="module")
def model() -> ThinkerForTraining:
    config = ModelConfig(tokenizer="in memory", tiny=SIZES)
    return build_thinker(config, small_tokenizer(), seed=1, dtype=torch.float32)


def batch_of(model: ThinkerForTraining, kinds: list[list[str]]) -> Batch:
    made = [make_sample(model.thinker, model.spec, kind, seed=i) for i, kind in enumerate(kinds)]
    return collate([sample.encoded for sample in made], model.spec)


def run(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    loss = next_token(model, batch).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), grads


@pytest.mark.parametrize("offload", [False, True])
def test_gradients_do_not_change(model: ThinkerForTraining, offload: bool) -> None:
    batch = batch_of(model, [["av"], ["image", "audio"], []])
    checkpoint_layers(model, Checkpointing.none, offload=False)
    want, grads = run(model, batch)
    for policy, count in ((Checkpointing.selective, 4), (Checkpointing.full, 8)):
        assert checkpoint_layers(model, policy, offload=offload) == count
        loss, ours = run(model, batch)
        assert torch.equal(loss, want)
        assert ours.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(ours[name], grad, rtol=1e-5, atol=1e-6)


def test_a_frozen_tower_is_just_run(model: ThinkerForTraining) -> None:
    """Nothing of it needs a gradient, so nothing runs twice; the rest is trained all the same."""
    model.requires_grad_(False)
    model.thinker.model.audio_tower.proj.requires_grad_(True)
    try:
        batch = batch_of(model, [["audio"]])
        checkpoint_layers(model, Checkpointing.none, offload=False)
        _, want = run(model, batch)
        checkpoint_layers(model, Checkpointing.full, offload=False)
        _, got = run(model, batch)
        assert (
            set(got)
            == set(want)
            == {f"thinker.model.audio_tower.proj.{n}" for n in ("weight", "bias")}
        )
        for name, grad in want.items():
            torch.testing.assert_close(got[name], grad, rtol=1e-5, atol=1e-6)
    finally:
        model.requires_grad_(True)
        checkpoint_layers(model, Checkpointing.none, offload=False)


def kept_bytes(model: ThinkerForTraining, batch: Batch) -> int:
    """What autograd holds of a forward pass through the language model, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    alive = []
    with saved_tensors_hooks(lambda t: alive.append(t) or note(t), lambda t: t):
        hidden = model.hidden(batch)
    assert hidden.requires_grad
    return sum(held.values())


@pytest.mark.parametrize("policy", POLICIES)
def test_the_estimate_is_what_autograd_keeps(
    model: ThinkerForTraining, policy: Checkpointing
) -> None:
    """Within a fifth, of a pack of text; the layer that is run again is not there yet."""
    batch = batch_of(model, [[]] * 60)
    checkpoint_layers(model, policy, offload=False)
    try:
        kept = kept_bytes(model, batch)
    finally:
        checkpoint_layers(model, Checkpointing.none, offload=False)
    language = model.thinker.model.language_model
    estimate = activation_bytes(language, policy, batch.num_tokens, 4)
    estimate -= max(
        round(recompute._kept_values(layer)) * batch.num_tokens * 4 for layer in language.layers
    )
    # Outside the layers: embeddings, and the final norm with its copy in fp32.
    ends = 3 * batch.num_tokens * SIZES.text_width * 4
    assert 0.8 * estimate < kept < 1.2 * estimate + ends


def test_auto_takes_the_cheapest_that_fits(model: ThinkerForTraining) -> None:
    needs = [activation_bytes(model, policy, 1000, 2) for policy in POLICIES]
    assert needs == sorted(needs, reverse=True)
    assert needs[0] > 1.3 * needs[1] > 1.3 * needs[2]
    for free, want in (
        (2 * needs[0], Checkpointing.none),
        (needs[0], Checkpointing.selective),
        (needs[1], Checkpointing.full),
        (0, Checkpointing.full),
    ):
        assert choose(model, pack_tokens=1000, value_bytes=2, free_bytes=free) is want


def test_ranks_agree_on_the_one_that_does_most_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "gather_json", lambda number: [0, number, 2])
    assert recompute.agreed_policy(Checkpointing.selective) is Checkpointing.full


def test_settings_without_effect_are_refused(model: ThinkerForTraining, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to keep"):
        DeepSpeedConfig(offload_activations=True)
    full, auto = Checkpointing.full, Checkpointing.auto
    settings = DeepSpeedConfig(activation_checkpointing=auto)
    with pytest.raises(ConfigError, match="length of packs"):
        build_engine(nn.Linear(1, 1), [], OptimConfig(), settings)
    if not torch.cuda.is_available():
        settings = DeepSpeedConfig(activation_checkpointing=full, offload_activations=True)
        with pytest.raises(ConfigError, match="without a GPU"):
            build_engine(nn.Linear(1, 1), [], OptimConfig(), settings)
