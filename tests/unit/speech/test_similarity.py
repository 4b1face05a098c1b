"""Which voice is it: the embedded measure on the demo's voices, WavLM on a tiny random model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import WavLMConfig, WavLMForXVector

from data_pipelines.demo_content import VOCABULARY
from data_pipelines.voices import speak
from omni_train.config.errors import ConfigError, DataError
from omni_train.speech.similarity import (
    MelCentroids,
    SimilarityConfig,
    SimilarityKind,
    Voices,
    WavLmVoices,
    similarity,
)

VOICES = ("en-us", "en-us+m1", "en-us+f2", "en-us+klatt")


def utterances(voice: str, count: int, seed: int) -> list[Tensor]:
    rng = random.Random(seed)
    texts = [" ".join(rng.sample(VOCABULARY, 3)) for _ in range(count)]
    return [torch.from_numpy(speak(text, voice)) for text in texts]


@pytest.fixture(scope="module")
def known() -> dict[str, list[Tensor]]:
    return {voice: utterances(voice, 6, seed=1) for voice in VOICES}


@pytest.fixture(scope="module")
def voices(known: dict[str, list[Tensor]]) -> Voices:
    return Voices(MelCentroids(known), known)


def test_voices_of_other_words_are_told_apart(voices: Voices) -> None:
    right, own, other = [], [], []
    for voice in VOICES:
        for wave in utterances(voice, 6, seed=2):
            found = voices.similarities(wave)
            right.append(voices.nearest(wave) == voice)
            own.append(found.pop(voice))
            other += found.values()
    accuracy = sum(right) / len(right)
    print(f"accuracy {accuracy:.3f}, cosine own {sum(own) / len(own):.2f}")
    assert accuracy >= 0.9
    assert sum(own) / len(own) > 0.5 > 0.0 > sum(other) / len(other)


def test_loudness_does_not_count(voices: Voices, known: dict[str, list[Tensor]]) -> None:
    wave = known["en-us"][0]
    assert similarity(voices.encoder, wave, 0.1 * wave) == pytest.approx(1.0, abs=1e-3)


def test_settings_are_checked() -> None:
    wavlm = SimilarityKind.wavlm
    for wrong, key in (
        ({"path": "p", "model": "x"}, "model"),
        ({"path": "p", "kind": wavlm}, "model"),
        ({"kind": wavlm, "model": "x"}, "path"),
        ({"path": "p", "per_voice": 0}, "per_voice"),
    ):
        with pytest.raises(ConfigError, match=rf"similarity\.{key}"):
            SimilarityConfig(**wrong)  # type: ignore[arg-type]


def test_voices_need_waves() -> None:
    wave = torch.randn(16_000)
    for waves in ({}, {"a": [wave]}, {"a": [wave], "b": []}):
        with pytest.raises(ConfigError, match=r"similarity\.voices"):
            MelCentroids(waves)
    with pytest.raises(DataError, match="non_finite"):
        MelCentroids({"a": [wave], "b": [wave / 0]})


def test_wavlm(tmp_path: Path, known: dict[str, list[Tensor]]) -> None:
    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=[8, 8],
        conv_stride=[5, 64],
        conv_kernel=[10, 64],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        tdnn_dim=[8, 8, 8],
        tdnn_kernel=[3, 3, 1],
        tdnn_dilation=[1, 2, 1],
        xvector_output_dim=8,
    )
    WavLMForXVector(config).save_pretrained(tmp_path)
    encoder = WavLmVoices(str(tmp_path))
    one, other = known["en-us"][0], known["en-us+f2"][0]
    embedding = encoder.embed(one)
    assert embedding.shape == (8,)
    assert float(embedding.norm()) == pytest.approx(1.0, abs=1e-5)
    assert similarity(encoder, one, 0.1 * one) == pytest.approx(1.0, abs=1e-3)
    assert similarity(encoder, one, other) < 0.9999
    with pytest.raises(ConfigError, match="WavLM"):
        WavLmVoices(str(tmp_path / "none"))
