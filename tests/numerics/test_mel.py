"""Log-mel against transformers' Whisper feature extractor with its own padding, trimmed by mask."""

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from omni_train.speech.mel import _filters, log_mel, num_audio_tokens, num_mel_frames

# 30 s instead of the released 300 s: the padding is silence in both, and the test stays quick.
EXTRACTOR = WhisperFeatureExtractor(feature_size=128, n_fft=400, hop_length=160, chunk_length=30)


def reference(wave: np.ndarray) -> np.ndarray:
    out = EXTRACTOR(wave, sampling_rate=16_000, padding="max_length", return_attention_mask=True)
    return out["input_features"][0][:, : int(out["attention_mask"][0].sum())]


def speech_like(num_samples: int, seed: int) -> np.ndarray:
    """Loud and near-silent stretches, so that the floor under the maximum matters."""
    rng = np.random.default_rng(seed)
    time = np.arange(num_samples) / 16_000
    envelope = np.where(np.sin(2 * np.pi * 1.7 * time + seed) > 0, 1.0, 1e-3)
    tone = np.sin(2 * np.pi * (200 + 300 * time) * time)
    return (envelope * (0.3 * tone + 0.05 * rng.standard_normal(num_samples))).astype(np.float32)


@pytest.mark.parametrize(
    "num_samples",
    [1, 80, 159, 160, 161, 199, 200, 201, 399, 400, 640, 1_601, 16_040, 31_999, 123_457, 470_001],
)
def test_equals_extractor_on_every_frame(num_samples):
    wave = speech_like(num_samples, seed=num_samples)
    expected = reference(wave)
    ours = log_mel(torch.from_numpy(wave))
    assert ours.shape == expected.shape == (128, num_mel_frames(num_samples))
    assert ours.dtype == torch.float32
    assert np.abs(ours.numpy() - expected).max() <= 1e-5


def test_loudest_moment_after_the_last_kept_frame_still_sets_the_floor():
    wave = np.full(1_600, 1e-4, dtype=np.float32)
    wave[-1] = 0.9
    expected = reference(wave)
    assert np.abs(log_mel(torch.from_numpy(wave)).numpy() - expected).max() <= 1e-5


def test_silence_is_finite_and_equal():
    wave = np.zeros(3_333, dtype=np.float32)
    assert np.abs(log_mel(torch.from_numpy(wave)).numpy() - reference(wave)).max() <= 1e-5


def test_empty_wave_has_no_frames():
    assert log_mel(torch.zeros(0)).shape == (128, 0)


def test_other_bin_counts():
    small = WhisperFeatureExtractor(feature_size=80, chunk_length=30)
    wave = speech_like(5_000, seed=5)
    out = small(wave, sampling_rate=16_000, return_attention_mask=True)
    expected = out["input_features"][0][:, :32]
    assert np.abs(log_mel(torch.from_numpy(wave), 80).numpy() - expected).max() <= 1e-5


def test_filterbank_equals_the_extractors():
    np.testing.assert_allclose(_filters(128).numpy().T, EXTRACTOR.mel_filters, atol=1e-8)


def test_token_count_formula():
    frames = np.arange(0, 2_000)
    tokens = num_audio_tokens(frames)
    assert tokens[:3].tolist() == [0, 0, 0]
    assert tokens[3] == 1
    for length in (3, 4, 5, 6, 7, 199, 200, 201, 1_999):
        assert num_audio_tokens(length) == ((length - 1) // 2 + 1 - 2) // 2 + 1 == tokens[length]
    assert num_audio_tokens(2) == 0
    assert num_audio_tokens(100) == 25


def test_stereo_input_is_refused():
    with pytest.raises(ValueError, match="wave must be"):
        log_mel(torch.zeros(2, 100))
