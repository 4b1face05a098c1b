"""Log-mel features of 16 kHz speech, equal to those of transformers' Whisper feature extractor
as Qwen2.5-Omni uses it (128 bins, 25 ms window, 10 ms hop), without padding to 300 s.

Done here: wave -> log-mel, and the lengths that follow from it. Not done here: decoding,
resampling, chunking for the audio tower.

Letters: S samples, L mel frames of 10 ms.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeVar

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor

SAMPLE_RATE_HZ = 16_000
NUM_FFT = 400
HOP_SAMPLES = 160
MAX_FREQUENCY_HZ = 8_000.0
# The extractor sees the clip followed by silence up to 300 s. So much silence is enough for every
# kept frame, and for every frame the maximum is taken over, to be the same as there.
SILENCE_SAMPLES = 560
FLOOR_POWER = 1e-10
DYNAMIC_RANGE = 8.0

IntOrArray = TypeVar("IntOrArray", int, NDArray[np.int64])


def to_16_khz(wave: NDArray[np.float32], rate_hz: int) -> NDArray[np.float32]:
    """Return a wave float32 [S] at the rate that this module and the recognisers take."""
    if rate_hz == SAMPLE_RATE_HZ or not len(wave):
        return wave
    resampled: NDArray[np.float32] = soxr.resample(wave, rate_hz, SAMPLE_RATE_HZ, quality="HQ")
    return resampled


def num_mel_frames(num_samples: IntOrArray) -> IntOrArray:
    """Return L = ceil(S / 160) for a number or an array of numbers."""
    return (num_samples + HOP_SAMPLES - 1) // HOP_SAMPLES


def num_audio_tokens(num_frames: IntOrArray) -> IntOrArray:
    """Return the audio tower's outputs for L mel frames (RECIPE.md section 4); 0 for L <= 2.

    Takes a number or an array of numbers.
    """
    tokens = ((num_frames - 1) // 2 + 1 - 2) // 2 + 1
    return tokens * (num_frames > 2)


def log_mel(wave: Tensor, num_mel_bins: int = 128) -> Tensor:
    """Return log-mel features float32 [num_mel_bins, L] of wave float32 [S] at 16 kHz mono.

    Log10 power, at most 8 below the clip's maximum, shifted and scaled as Whisper does.
    """
    if wave.ndim != 1:
        raise ValueError(f"wave must be [S], got {tuple(wave.shape)}")
    frames = num_mel_frames(wave.numel())
    if frames == 0:
        return torch.zeros(num_mel_bins, 0)
    padded = torch.nn.functional.pad(wave.to(torch.float32), (0, SILENCE_SAMPLES))
    spectrum = torch.stft(padded, NUM_FFT, HOP_SAMPLES, window=_window(), return_complex=True)
    # The sum of squares, since the root that `abs` takes would be undone at once. The extractor
    # drops its last frame too; the product is far slower on a strided view.
    power = (spectrum.real.square() + spectrum.imag.square())[:, :-1].contiguous()
    mel = (_filters(num_mel_bins) @ power).clamp_(min=FLOOR_POWER).log10_()
    mel = torch.maximum(mel, mel.max() - DYNAMIC_RANGE)[:, :frames]
    return ((mel + 4.0) / 4.0).contiguous()


@lru_cache(maxsize=1)
def _window() -> Tensor:
    return torch.hann_window(NUM_FFT)


@lru_cache(maxsize=4)
def _filters(num_mel_bins: int) -> Tensor:
    """Return triangular filters float32 [num_mel_bins, 201], Slaney's scale and area norm."""
    frequencies = np.linspace(0.0, SAMPLE_RATE_HZ / 2, NUM_FFT // 2 + 1)
    mels = np.linspace(0.0, float(_hz_to_mel(np.array(MAX_FREQUENCY_HZ))), num_mel_bins + 2)
    edges = _mel_to_hz(mels)
    rising = (frequencies[None] - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - frequencies[None]) / np.diff(edges)[1:, None]
    weights = np.maximum(0.0, np.minimum(rising, falling))
    weights *= (2.0 / (edges[2:] - edges[:-2]))[:, None]
    return torch.from_numpy(weights.astype(np.float32))


# Slaney's mel scale: 3 mel per 200 Hz up to 1 kHz, then 27 mel per factor 6.4.
_LINEAR_UP_TO_HZ = 1000.0
_MEL_PER_HZ = 3.0 / 200.0
_LOG_STEP = 27.0 / np.log(6.4)


def _hz_to_mel(hz: NDArray[np.float64]) -> NDArray[np.float64]:
    log_part = _LINEAR_UP_TO_HZ * _MEL_PER_HZ + np.log(np.maximum(hz, 1.0) / 1000.0) * _LOG_STEP
    return np.where(hz < _LINEAR_UP_TO_HZ, hz * _MEL_PER_HZ, log_part)


def _mel_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    knee = _LINEAR_UP_TO_HZ * _MEL_PER_HZ
    return np.where(mel < knee, mel / _MEL_PER_HZ, 1000.0 * np.exp((mel - knee) / _LOG_STEP))
