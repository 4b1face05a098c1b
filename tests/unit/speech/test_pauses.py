"""Pauses against punctuation, on waves whose silences are known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipelines.demo_content import VOCABULARY
from data_pipelines.voices import speak
from omni_train.config.errors import ConfigError, DataError
from omni_train.speech.asr import PocketSphinxRecognizer, Word
from omni_train.speech.pauses import PauseConfig, count_pause_errors, pause_boundaries

RATE = 16_000
CONFIG = PauseConfig()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("apple, banana garden.", [True, False]),
        ("well... it's a two-word text!", [True, False, False, False]),
        ("one", []),
        ("apple ,banana\u3002garden", [True, True]),
        ('"apple" banana', [False]),
    ],
)
def test_boundaries_of_a_text(text: str, wanted: list[bool]) -> None:
    assert pause_boundaries(text) == wanted


def tones(gaps_ms: list[int]) -> tuple[NDArray[np.float32], list[Word]]:
    """300 ms of tone a word with silences between, and the words' true times."""
    parts, words, at = [], [], 0.0
    for gap in [*gaps_ms, 0]:
        parts += [0.3 * np.sin(np.arange(4_800) * 0.2), np.zeros(gap * 16)]
        words.append(Word("x", at, at + 0.3))
        at += 0.3 + gap / 1000
    return np.concatenate(parts).astype(np.float32), words


@pytest.mark.parametrize(
    ("gaps_ms", "missing", "extra"),
    [
        ([200, 0], 0, 0),
        ([120, 110], 0, 0),
        ([100, 0], 1, 0),
        ([200, 200], 0, 1),
        ([0, 200], 1, 1),
    ],
)
def test_errors_are_counted(gaps_ms: list[int], missing: int, extra: int) -> None:
    wave, words = tones(gaps_ms)
    found = count_pause_errors("a, b c", words, wave, CONFIG)
    assert (found.missing, found.extra, found.boundaries) == (missing, extra, 2)
    assert found.rate == (missing + extra) / 2


def test_faint_noise_in_a_pause_is_quiet_and_a_word_is_not() -> None:
    wave, words = tones([200])
    noise = np.random.default_rng(0).normal(0, 0.001, len(wave)).astype(np.float32)
    assert count_pause_errors("a, b", words, wave + noise, CONFIG).missing == 0
    assert count_pause_errors("a, b", words, wave + 100 * noise, CONFIG).missing == 1


def test_on_recognised_speech() -> None:
    recognizer = PocketSphinxRecognizer(VOCABULARY)
    first, second = (speak(words, "en-us+f2") for words in ("window paper", "river"))
    wave = np.concatenate([first, np.zeros(RATE // 4, np.float32), second])
    words = recognizer.transcribe(wave).words
    right = count_pause_errors("window paper, river", words, wave, CONFIG)
    wrong = count_pause_errors("window, paper river", words, wave, CONFIG)
    assert (right.missing, right.extra) == (0, 0)
    assert (wrong.missing, wrong.extra) == (1, 1)


def test_another_number_of_words_cannot_be_placed() -> None:
    wave, words = tones([200])
    with pytest.raises(DataError, match="word_mismatch"):
        count_pause_errors("a, b c", words, wave, CONFIG)
    with pytest.raises(ConfigError, match=r"pauses\.min_pause_s"):
        PauseConfig(min_pause_s=0.0)
