"""What a released decoder is told of a new speaker: its mel, and where its embedding is from."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from omni_train.config.errors import ConfigError
from omni_train.speech.new_voice import CondSource, VoiceConfig, log_mel_24k, reference_mel

RATE = 24_000


def tone(seconds: float, hertz: float) -> torch.Tensor:
    return 0.5 * torch.sin(2 * torch.pi * hertz * torch.arange(round(seconds * RATE)) / RATE)


def test_the_mel_has_a_frame_each_10_ms_and_knows_low_from_high() -> None:
    low, high = (log_mel_24k(tone(1.0, hertz)) for hertz in (200.0, 4000.0))
    assert low.shape == high.shape == (100, 80)
    assert int(low[50].argmax()) < int(high[50].argmax())
    # The floor: silence is the logarithm of 1e-5 everywhere.
    silent = log_mel_24k(torch.zeros(RATE))
    torch.testing.assert_close(silent, torch.full((100, 80), np.log(1e-5)))


def test_a_recording_of_any_rate_gives_at_most_four_seconds(tmp_path: Path) -> None:
    sink = io.BytesIO()
    wave = np.tile(tone(3.0, 300.0).numpy()[::3], 3)
    soundfile.write(sink, np.stack([wave, wave], axis=1), RATE // 3, format="WAV")
    (tmp_path / "voice.wav").write_bytes(sink.getvalue())
    mel = reference_mel(str(tmp_path / "voice.wav"))
    assert mel.shape == (1, 400, 80)
    for name, data in (("none.wav", None), ("text.wav", b"no sound")):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match="no readable sound"):
            reference_mel(str(tmp_path / name))
    with pytest.raises(ConfigError, match="shorter than one window"):
        log_mel_24k(torch.zeros(500))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"known": "a", "given": "x.npy"},
        {"cond": CondSource.given},
        {"cond": CondSource.given, "given": "x.npy", "known": "a"},
        {"cond": CondSource.fitted, "known": "a"},
        {"cond": CondSource.copied, "known": "a", "codes": "x.npy"},
        {"known": "a", "fit_steps": 0},
    ],
)
def test_what_does_not_belong_to_its_source_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        VoiceConfig(recording="voice.wav", **values)
