"""Loss by task and by modality: the parts add up to the whole, and each is that of its samples."""

from __future__ import annotations

import pytest
import torch

from omni_train.data.collate import collate
from omni_train.data.types import EncodedSample
from omni_train.models.build import build_thinker
from omni_train.objectives.next_token import next_token
from tests.numerics.samples import make_sample, small_config, small_tokenizer


def test_parts_are_those_of_their_samples() -> None:
    tokenizer = small_tokenizer()
    config, spec = small_config(tokenizer)
    model = build_thinker(config, tokenizer, seed=1, dtype=torch.float32)
    kinds = [("asr", "audio"), ("asr", "audio"), ("caption", "image"), ("", "text")]
    sources = ["libri", "web", "web", "web"]
    samples: list[EncodedSample] = []
    for number, (task, modality) in enumerate(kinds):
        media = [] if modality == "text" else [modality]
        sample = make_sample(model.thinker, spec, media, seed=number).encoded
        sample.source, sample.task, sample.modality = sources[number], task, modality
        samples.append(sample)
    samples[0].labels[:] = -100
    whole = next_token(model, collate(samples, spec))
    alone = [next_token(model, collate([sample], spec)) for sample in samples]
    assert set(whole.metrics) == {
        *("loss_source/libri", "loss_source/web"),
        *("loss_task/asr", "loss_task/caption", "loss_task/unnamed"),
        *("loss_modality/audio", "loss_modality/image", "loss_modality/text"),
    }
    for prefix in ("loss_source", "loss_task", "loss_modality"):
        parts = [pair for name, pair in whole.metrics.items() if name.startswith(prefix)]
        assert sum(float(total) for total, _ in parts) == pytest.approx(float(whole.loss))
        assert sum(int(count) for _, count in parts) == whole.num_tokens
    total, count = whole.metrics["loss_task/asr"]
    assert float(total) == pytest.approx(float(alone[1].loss), rel=1e-5)
    assert count == alone[1].num_tokens
    # A rank without supervision keeps in step and says nothing.
    empty = next_token(model, collate([], spec))
    assert all(count == 0 and float(total) == 0.0 for total, count in empty.metrics.values())
