"""Synthetic speech: the same in any order, thread and process; cut; refused where it cannot be."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import threading

import numpy as np
import pytest

from data_pipelines.voices import KEPT_SILENCE_S, SAMPLE_RATE_HZ, speak
from omni_train.config.errors import ConfigError

VOICES = ("en-us", "en-us+m1", "en-us+f2", "en-us+klatt", "en-us+m3", "en-gb")
TEXTS = ("apple", "river thousand", "window doctor seven")
CASES = [(text, voice) for text in TEXTS for voice in VOICES]


def digest(text: str, voice: str) -> str:
    return hashlib.sha256(speak(text, voice).tobytes()).hexdigest()


def test_order_of_calls_does_not_matter() -> None:
    first = {case: digest(*case) for case in CASES}
    again = CASES * 2
    random.Random(0).shuffle(again)
    assert [digest(*case) for case in again] == [first[case] for case in again]
    assert len(set(first.values())) == len(CASES)


def test_another_process_says_the_same() -> None:
    code = (
        "import hashlib, json, sys\n"
        "from data_pipelines.voices import speak\n"
        "cases = json.loads(sys.argv[1])\n"
        "print(json.dumps([hashlib.sha256(speak(*c).tobytes()).hexdigest() for c in cases]))\n"
    )
    backwards = CASES[::-1]
    command = [sys.executable, "-c", code, json.dumps(backwards)]
    said = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert json.loads(said) == [digest(*case) for case in backwards]


def test_threads_do_not_mix() -> None:
    wanted = {case: digest(*case) for case in CASES[:4]}
    found: dict[tuple[str, str], list[str]] = {case: [] for case in wanted}

    def work(case: tuple[str, str]) -> None:
        found[case] += [digest(*case) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(case,)) for case in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {case: [value] * 5 for case, value in wanted.items()}


def test_a_wave_is_cut_and_at_16_khz() -> None:
    wave = speak("apple", "en-us")
    assert wave.dtype == np.float32
    assert wave.ndim == 1
    assert 0.3 < len(wave) / SAMPLE_RATE_HZ < 0.6
    keep = round(KEPT_SILENCE_S * SAMPLE_RATE_HZ)
    peak = np.abs(wave).max()
    assert 0.2 < peak <= 1.0
    for edge in (wave[: keep - 1], wave[-keep + 1 :]):
        assert np.abs(edge).max() <= 0.01 * peak
    assert np.abs(wave[keep]) > 0.01 * peak


def test_faster_speech_is_shorter() -> None:
    slow, fast = (speak("window doctor", "en-us", words_per_minute=rate) for rate in (120, 220))
    assert len(fast) < 0.75 * len(slow)


@pytest.mark.parametrize("voice", ["en-xx", "en-us+nobody", "en-us+../m1", "en-us+", ""])
def test_unknown_voices_are_refused(voice: str) -> None:
    with pytest.raises(ConfigError, match="voice"):
        speak("apple", voice)


@pytest.mark.parametrize("text", ["", "  "])
def test_a_text_without_sound_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no sound"):
        speak(text, "en-us")


def test_a_rate_that_espeak_would_clip_is_refused() -> None:
    with pytest.raises(ConfigError, match="words_per_minute"):
        speak("apple", "en-us", words_per_minute=20)
