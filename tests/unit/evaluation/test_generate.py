"""Greedy decoding equals transformers' `generate` where that is right, and stops as told."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from omni_train.config.errors import ConfigError
from omni_train.data.types import ModelSpec
from omni_train.evaluation.generate import greedy, media_ids
from omni_train.models.build import build_thinker
from omni_train.models.thinker import ThinkerForTraining
from tests.numerics.samples import Sample, make_sample, small_config, small_tokenizer

NUM_NEW = 12
Models = tuple[ThinkerForTraining, Qwen2_5OmniThinkerForConditionalGeneration, ModelSpec]


@pytest.fixture(scope="module")
def models() -> Models:
    """A model whose weights are large enough to give varied replies, and transformers' own."""
    tokenizer = small_tokenizer()
    config, spec = small_config(tokenizer)
    model = build_thinker(config, tokenizer, seed=3, dtype=torch.float32)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim > 1:
                param.mul_(6.0 if "language_model" in name else 2.0)
    thinker_config = copy.deepcopy(model.thinker.config)
    for sub in (thinker_config, thinker_config.text_config):
        sub._attn_implementation = "sdpa"
    plain = Qwen2_5OmniThinkerForConditionalGeneration(thinker_config).eval()
    plain.load_state_dict(model.thinker.state_dict())
    return model, plain, spec


def theirs(models: Models, sample: Sample) -> list[int]:
    """What transformers generates for one prompt."""
    _, plain, spec = models
    inputs = {k: v for k, v in sample.hf.items() if k != "use_audio_in_video"}
    out = plain.generate(
        **inputs,
        use_audio_in_video=sample.hf["use_audio_in_video"],
        do_sample=False,
        max_new_tokens=NUM_NEW,
        suppress_tokens=media_ids(spec),
        pad_token_id=0,
        eos_token_id=None,
    )
    reply: list[int] = out[0, sample.encoded.num_tokens :].tolist()
    return reply


@pytest.mark.parametrize("kinds", [[], ["image"], ["audio"], ["video"], ["image", "audio"]])
def test_equals_transformers_on_one_prompt(models: Models, kinds: list[str]) -> None:
    model, plain, spec = models
    sample = make_sample(plain, spec, kinds, seed=21 + len(kinds), prompt=True)
    got = greedy(model, [sample.encoded], spec, max_new_tokens=NUM_NEW, stop_ids=())
    assert got == [theirs(models, sample)]
    assert len(set(got[0])) > 2, "the reply is too uniform to compare anything"


def test_a_padded_batch_equals_each_prompt_alone(models: Models) -> None:
    model, plain, spec = models
    mixes = [[], ["audio"], [], ["video"], ["av"], ["image"]]
    made = [make_sample(plain, spec, mix, seed=40 + i, prompt=True) for i, mix in enumerate(mixes)]
    got = greedy(model, [s.encoded for s in made], spec, max_new_tokens=NUM_NEW, stop_ids=())
    assert len({s.encoded.num_tokens for s in made}) == len(made)
    for sample, reply in zip(made, got, strict=True):
        assert reply == theirs(models, sample), sample.encoded.key


def test_stops_suppresses_and_restores(models: Models) -> None:
    model, plain, spec = models
    samples = [make_sample(plain, spec, [], seed=60 + i, prompt=True).encoded for i in range(3)]
    full = greedy(model, samples, spec, max_new_tokens=NUM_NEW, stop_ids=())
    assert all(len(reply) == NUM_NEW for reply in full)
    stop = full[0][4]
    stopped = greedy(model, samples, spec, max_new_tokens=NUM_NEW, stop_ids=[stop])
    for reply, whole in zip(stopped, full, strict=True):
        end = whole.index(stop) if stop in whole else NUM_NEW
        assert reply == whole[:end]
    banned = [*media_ids(spec), full[0][0]]
    without = greedy(model, samples, spec, max_new_tokens=NUM_NEW, stop_ids=(), suppress_ids=banned)
    assert not {token for reply in without for token in reply} & set(banned)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert greedy(model, [], spec, max_new_tokens=1, stop_ids=()) == []


def test_refuses_a_sharded_model(models: Models) -> None:
    model, plain, spec = models
    sharded = copy.deepcopy(model)
    next(sharded.parameters()).ds_id = 0
    sample = make_sample(plain, spec, [], seed=70, prompt=True).encoded
    with pytest.raises(ConfigError, match="plain replica"):
        greedy(sharded, [sample], spec, max_new_tokens=1, stop_ids=())
