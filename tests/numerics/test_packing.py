"""Packing changes nothing: packed loss and gradients equal the unpacked ones and transformers'."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from omni_train.data.collate import collate
from omni_train.data.types import ModelSpec
from omni_train.models.build import build_thinker
from omni_train.models.thinker import ThinkerForTraining
from omni_train.objectives.next_token import next_token
from tests.numerics.samples import Sample, make_sample, small_config, small_tokenizer

MIXES = [[], ["image"], ["audio"], ["video"], ["av"], ["image", "audio", "video", "image"]]
Reference = tuple[ThinkerForTraining, Qwen2_5OmniThinkerForConditionalGeneration, ModelSpec]


@pytest.fixture(scope="module")
def models() -> Reference:
    """Our model and transformers' own with the same weights, fp32."""
    tokenizer = small_tokenizer()
    config, spec = small_config(tokenizer)
    model = build_thinker(config, tokenizer, seed=1, dtype=torch.float32)
    thinker_config = copy.deepcopy(model.thinker.config)
    for sub in (thinker_config, thinker_config.text_config):
        sub._attn_implementation = "sdpa"
    plain = Qwen2_5OmniThinkerForConditionalGeneration(thinker_config)
    plain.load_state_dict(model.thinker.state_dict())
    return model, plain, spec


@pytest.fixture(scope="module")
def samples(models: Reference) -> list[Sample]:
    _, plain, spec = models
    return [make_sample(plain, spec, mix, seed=i) for i, mix in enumerate(MIXES)]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by name, then cleared."""
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_same_gradients(
    got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], *, tolerance: float = 1e-5
) -> None:
    for name, grad in want.items():
        scale = max(1.0, float(grad.abs().max()))
        torch.testing.assert_close(
            got[name], grad, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("index", range(len(MIXES)), ids=["+".join(m) or "text" for m in MIXES])
def test_loss_and_gradients_equal_transformers(
    models: Reference, samples: list[Sample], index: int
) -> None:
    model, plain, spec = models
    sample = samples[index]
    out = next_token(model, collate([sample.encoded], spec))
    out.loss.backward()
    ours = gradients(model)
    reference = plain(**sample.hf, labels=sample.encoded.labels[None]).loss * out.num_tokens
    reference.backward()
    theirs = {f"thinker.{name}": grad for name, grad in gradients(plain).items()}
    torch.testing.assert_close(out.loss, reference, rtol=1e-5, atol=1e-5)
    assert any(grad.abs().max() > 1e-3 for grad in theirs.values())
    assert_same_gradients(ours, theirs)
    # A tower without media took part with a gradient of exactly zero.
    for name in set(ours) - set(theirs):
        assert not ours[name].any(), name


def test_packed_equals_unpacked(models: Reference, samples: list[Sample]) -> None:
    model, _, spec = models
    encoded = [sample.encoded for sample in samples]
    total = torch.zeros(())
    for sample in encoded:
        loss = next_token(model, collate([sample], spec)).loss
        loss.backward()
        total = total + loss.detach()
    alone = gradients(model)
    for order in (encoded, encoded[::-1]):
        packed = next_token(model, collate(order, spec))
        packed.loss.backward()
        torch.testing.assert_close(packed.loss.detach(), total, rtol=1e-5, atol=1e-5)
        assert packed.num_tokens == sum(int((s.labels[1:] != -100).sum()) for s in encoded)
        assert_same_gradients(gradients(model), alone)


def test_documents_do_not_see_each_other(models: Reference, samples: list[Sample]) -> None:
    """A weight of the first document cannot change the log-probabilities of the second."""
    model, _, spec = models
    first, second = samples[1].encoded, samples[2].encoded
    with torch.no_grad():
        behind = model(collate([first, second], spec))
        changed = copy.deepcopy(first)
        changed.input_ids[2] = (changed.input_ids[2] + 1) % 200
        behind_changed = model(collate([changed, second], spec))
    own = int((second.labels[1:] != -100).sum())
    torch.testing.assert_close(behind[-own:], behind_changed[-own:], rtol=0, atol=0)
    assert not torch.equal(behind[:-own], behind_changed[:-own])


def test_batch_without_supervision_or_samples_gives_zero(models: Reference) -> None:
    model, _, spec = models
    out = next_token(model, collate([], spec))
    out.loss.backward()
    grads = gradients(model)
    assert out.loss.item() == 0.0
    assert out.num_tokens == 0
    # Both towers took part, and nothing but exact zeros came of it.
    assert {name.split(".")[2] for name in grads if ".model." in name} == {
        "audio_tower",
        "visual",
        "language_model",
    }
    assert not any(grad.any() for grad in grads.values())


def test_bf16_is_close_to_fp32(models: Reference, samples: list[Sample]) -> None:
    model, _, spec = models
    half = copy.deepcopy(model)
    for param in half.parameters():
        param.data = param.data.to(torch.bfloat16)
    batch = collate([sample.encoded for sample in samples], spec)
    with torch.no_grad():
        full, low = model(batch), half(batch)
    assert full.dtype == low.dtype == torch.float32
    assert (full - low).abs().max() < 0.05
    next_token(half, batch).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in half.parameters())


def test_frozen_language_model_still_trains_the_tower(
    models: Reference, samples: list[Sample]
) -> None:
    model, _, spec = models
    trained = copy.deepcopy(model)
    trained.requires_grad_(False)
    tower = trained.thinker.model.audio_tower
    tower.proj.requires_grad_(True)
    batch = collate([sample.encoded for sample in samples], spec)
    next_token(trained, batch).loss.backward()
    next_token(model, batch).loss.backward()
    want = gradients(model)["thinker.model.audio_tower.proj.weight"]
    torch.testing.assert_close(tower.proj.weight.grad, want, rtol=1e-4, atol=1e-5)
    next_token(trained, collate([samples[0].encoded], spec)).loss.backward()
