"""How near a wave is to a voice.

    MelCentroids   the default: mean log-mel of loud frames, cosine to each known voice's centroid
    WavLmVoices    WavLM speaker verification through transformers, for production

Both embed a wave; two waves are compared by the cosine of their embeddings, -1 to 1.

Letters: S samples, E numbers of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from omni_train.config.errors import ConfigError, check_fields
from omni_train.engine.foreign import refuse_pickles
from omni_train.speech.codec import check_wave
from omni_train.speech.mel import log_mel

_NUM_MEL_BINS = 80
_LOUD_NATS = 4.0
# Whisper's values are decimal logarithms of power, divided by 4.
_NATS = 4.0 * math.log(10.0)


class SimilarityKind(Enum):
    """Implementations."""

    mel_centroids = "mel_centroids"
    wavlm = "wavlm"


@dataclass(kw_only=True, slots=True)
class SimilarityConfig:
    """How voices are compared, and with which recordings of them.

    Args:
        path: directory of shards with one recording a sample and its `speaker`; empty compares
            nothing.
        kind: measure.
        model: WavLM alone: directory of an x-vector model.
        per_voice: recordings whose mean is a voice; as many more tell how often the measure is
            right.
    """

    path: str = ""
    kind: SimilarityKind = SimilarityKind.mel_centroids
    model: str = ""
    per_voice: int = 16

    def __post_init__(self) -> None:
        needed = self.kind is SimilarityKind.wavlm
        kind = f"similarity.kind={self.kind.name}"
        check_fields(
            self,
            "similarity",
            ("path", bool(self.path) or not needed, f"is needed with {kind}"),
            ("model", bool(self.model) == needed, f"is for wavlm, and needed there; {kind}"),
            ("per_voice", self.per_voice >= 1, "must be at least 1"),
            remedy="set or remove it, or choose another similarity.kind",
        )


class VoiceEncoder(Protocol):
    """Waves to embeddings that tell voices apart."""

    def embed(self, wave: Tensor) -> Tensor:
        """Return float32 [E] of length 1 of wave float32 [S] at 16 kHz.

        Raises:
            DataError: `bad_wave`, `non_finite`.
        """
        ...


def similarity(encoder: VoiceEncoder, one: Tensor, other: Tensor) -> float:
    """Return the cosine of two waves' embeddings, -1 to 1."""
    return float(encoder.embed(one) @ encoder.embed(other))


class Voices:
    """Known voices, each the mean embedding of some of its waves.

    Args:
        encoder: embeds waves.
        waves: some waves [S] at 16 kHz of every voice, by name.

    Raises:
        ConfigError: no voice, or a voice without a wave.
    """

    def __init__(self, encoder: VoiceEncoder, waves: Mapping[str, Sequence[Tensor]]) -> None:
        if not waves or not all(waves.values()):
            raise _no_voice({name: len(of) for name, of in waves.items()})
        self.encoder, self.names = encoder, list(waves)
        means = [torch.stack([encoder.embed(w) for w in of]).mean(dim=0) for of in waves.values()]
        self._centroids = torch.nn.functional.normalize(torch.stack(means), dim=1)

    def similarities(self, wave: Tensor) -> dict[str, float]:
        """Return the cosine to each voice's centroid."""
        cosines = self._centroids @ self.encoder.embed(wave)
        return dict(zip(self.names, cosines.tolist(), strict=True))

    def nearest(self, wave: Tensor) -> str:
        """Return the voice with the largest cosine."""
        found = self.similarities(wave)
        return max(found, key=lambda name: found[name])


def mel_profile(wave: Tensor) -> Tensor:
    """Return float32 [80]: mean log-mel over frames within 4 nats of the loudest, of mean 0.

    The mean over bins is taken off, so that loudness does not count.
    """
    check_wave(wave)
    mel = log_mel(wave, _NUM_MEL_BINS)
    level = torch.logsumexp(mel * _NATS, dim=0)
    loud = level > level.max() - _LOUD_NATS
    profile = mel[:, loud].mean(dim=1)
    return profile - profile.mean()


class MelCentroids:
    """Mean log-mel of loud frames minus its mean over known voices (DEMO.md, "A new voice").

    Args:
        waves: some waves [S] at 16 kHz of every voice, by name; two voices at least.

    Raises:
        ConfigError: fewer than two voices, or a voice without a wave.
    """

    def __init__(self, waves: Mapping[str, Sequence[Tensor]]) -> None:
        if len(waves) < 2 or not all(waves.values()):
            raise _no_voice({name: len(of) for name, of in waves.items()})
        means = [torch.stack([mel_profile(w) for w in of]).mean(dim=0) for of in waves.values()]
        self._mean = torch.stack(means).mean(dim=0)

    def embed(self, wave: Tensor) -> Tensor:
        """Return float32 [80] of length 1."""
        return torch.nn.functional.normalize(mel_profile(wave) - self._mean, dim=0)


class WavLmVoices:
    """Speaker embeddings of a WavLM x-vector model, such as `wavlm-base-plus-sv`.

    Args:
        path: directory with `config.json` and safetensors; nothing is downloaded.
        device: where it computes.

    Raises:
        ConfigError: no such model there.
    """

    def __init__(self, path: str, device: torch.device | None = None) -> None:
        from transformers import WavLMForXVector

        refuse_pickles(Path(path), key="similarity.path")
        try:
            model: Any = WavLMForXVector.from_pretrained(
                path, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                key="similarity.path",
                value=path,
                rule=f"no WavLM x-vector model: {error}",
                remedy="give a directory with its config.json and safetensors",
            ) from error
        self._model = model.eval().to(device or torch.device("cpu"))

    @torch.no_grad()
    def embed(self, wave: Tensor) -> Tensor:
        """Return float32 [E] of length 1."""
        check_wave(wave)
        wave = wave.to(self._model.device, torch.float32)
        # The feature extractor's normalisation: mean 0, variance 1.
        wave = (wave - wave.mean()) / (wave.var(unbiased=False) + 1e-7).sqrt()
        embedding = self._model(wave[None]).embeddings[0].float().cpu()
        return torch.nn.functional.normalize(embedding, dim=0)


def known_voices(
    config: SimilarityConfig, waves: Mapping[str, Sequence[Tensor]], device: torch.device
) -> Voices:
    """Return the voices of some recordings [S] at 16 kHz by name, in the measure of a config.

    Raises:
        ConfigError: no model, or a voice without a recording.
    """
    if config.kind is SimilarityKind.wavlm:
        return Voices(WavLmVoices(config.model, device), waves)
    return Voices(MelCentroids(waves), waves)


def _no_voice(value: object) -> ConfigError:
    return ConfigError(
        key="similarity.voices",
        value=value,
        rule="needs voices with a wave each; the embedded measure at least two voices",
        remedy="give some waves of every voice",
    )
