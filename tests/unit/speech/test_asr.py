"""PocketSphinx with a closed vocabulary, on waves that the speech engine makes."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipelines.demo_content import VOCABULARY
from data_pipelines.voices import SAMPLE_RATE_HZ, speak
from omni_train.config.errors import ConfigError, DataError
from omni_train.speech.asr import PocketSphinxRecognizer

TEXTS = ("river", "window doctor", "happy paper thousand", "monday summer computer")


@pytest.fixture(scope="module")
def recognizer() -> PocketSphinxRecognizer:
    return PocketSphinxRecognizer(VOCABULARY)


@pytest.mark.parametrize("text", TEXTS)
def test_words_come_back(recognizer: PocketSphinxRecognizer, text: str) -> None:
    transcript = recognizer.transcribe(speak(text, "en-us+f2"))
    assert transcript.text == text
    assert [word.text for word in transcript.words] == text.split()


def test_times_are_those_of_the_wave(recognizer: PocketSphinxRecognizer) -> None:
    first, second = (speak(word, "en-us+f2") for word in ("window", "paper"))
    pause = np.zeros(SAMPLE_RATE_HZ // 2, np.float32)
    wave = np.concatenate([pause, first, pause, second, pause])
    one, two = recognizer.transcribe(wave).words
    starts = [len(pause), 2 * len(pause) + len(first)]
    for word, start, length in zip((one, two), starts, (len(first), len(second)), strict=True):
        assert word.start_s == pytest.approx(start / SAMPLE_RATE_HZ, abs=0.08)
        assert word.end_s == pytest.approx((start + length) / SAMPLE_RATE_HZ, abs=0.08)


def test_what_was_heard_before_changes_nothing(recognizer: PocketSphinxRecognizer) -> None:
    waves = [speak(text, voice) for text in TEXTS for voice in ("en-us", "en-gb", "en-us+f3")]
    there = [recognizer.transcribe(wave) for wave in waves]
    back = [recognizer.transcribe(wave) for wave in waves[::-1]]
    assert back[::-1] == there


def test_silence_has_no_words(recognizer: PocketSphinxRecognizer) -> None:
    transcript = recognizer.transcribe(np.zeros(SAMPLE_RATE_HZ, np.float32))
    assert (transcript.text, transcript.words) == ("", [])


def test_bad_waves_are_refused(recognizer: PocketSphinxRecognizer) -> None:
    with pytest.raises(DataError, match="bad_wave"):
        recognizer.transcribe(np.zeros((2, 8), np.float32))
    with pytest.raises(DataError, match="bad_wave"):
        recognizer.transcribe(np.zeros(0, np.float32))
    with pytest.raises(DataError, match="non_finite"):
        recognizer.transcribe(np.array([0.0, np.nan], np.float32))


@pytest.mark.parametrize("vocabulary", [[], ["Apple"], ["apple; quit"], ["qqzx"]])
def test_bad_vocabularies_are_refused(vocabulary: list[str]) -> None:
    with pytest.raises(ConfigError, match="vocabulary"):
        PocketSphinxRecognizer(vocabulary)
