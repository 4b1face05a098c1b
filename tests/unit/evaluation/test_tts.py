"""Scores of spoken replies against counts made by hand, and on real speech."""

from __future__ import annotations

import numpy as np
import pytest
import soxr

from data_pipelines.demo_content import VOCABULARY
from data_pipelines.voices import speak
from omni_train.config.errors import DataError
from omni_train.evaluation.metrics import Normalizer, normalize
from omni_train.evaluation.tts import (
    Failure,
    SpokenScore,
    bootstrap_interval,
    count_errors,
    failure_of,
    score_reply,
    speech_rate,
    summarize,
)
from omni_train.speech.asr import PocketSphinxRecognizer, Transcript, Word
from omni_train.speech.pauses import PauseConfig, PauseErrors

BASIC = Normalizer.basic


@pytest.fixture(scope="module")
def recognizer() -> PocketSphinxRecognizer:
    return PocketSphinxRecognizer(VOCABULARY)


def score(recognizer: PocketSphinxRecognizer, text: str, wave: np.ndarray, **change: object):  # type: ignore[no-untyped-def]
    options = {"ended": True, "normalizer": BASIC, "pauses": PauseConfig(), **change}
    return score_reply(text, wave, 24_000, recognizer=recognizer, **options)  # type: ignore[arg-type]


def test_a_good_reply_and_a_wrong_one(recognizer: PocketSphinxRecognizer) -> None:
    wave = soxr.resample(speak("window paper river", "en-us+f2"), 16_000, 24_000)
    good = score(recognizer, "Window paper river.", wave)
    assert (good.errors, good.units, good.failure) == (0, 3, None)
    assert good.pauses is not None
    assert (good.pauses.missing, good.pauses.boundaries) == (0, 2)
    assert 1.0 < good.words_per_s < 5.0
    wrong = score(recognizer, "window doctor", wave)
    assert (wrong.errors, wrong.units, wrong.pauses) == (2, 2, None)


def test_no_wave_is_empty_and_no_text_is_refused(recognizer: PocketSphinxRecognizer) -> None:
    empty = score(recognizer, "window paper", np.zeros(0, np.float32))
    assert (empty.errors, empty.failure, empty.words_per_s) == (2, Failure.empty, 0.0)
    with pytest.raises(DataError, match="empty_reference"):
        score(recognizer, "...", np.zeros(0, np.float32))


@pytest.mark.parametrize(
    ("heard", "ended", "kind"),
    [
        ("a b c", True, None),
        ("", True, Failure.empty),
        ("a b c", False, Failure.no_end),
        ("a b b b c", True, Failure.repeated),
        ("a b a b a b c", True, Failure.repeated),
        ("a b a b c", True, None),
        ("go go go", True, None),
    ],
)
def test_kinds_of_failure(heard: str, ended: bool, kind: Failure | None) -> None:
    text = "go go go" if heard.startswith("go") else "a b c"
    assert failure_of(text.split(), heard.split(), ended=ended) is kind


def test_speech_rate_is_over_the_spoken_span() -> None:
    words = [Word("a", 1.0, 1.5), Word("b", 2.0, 3.0)]
    assert speech_rate(Transcript("a b", words)) == pytest.approx(1.0)
    assert speech_rate(Transcript("", [])) == 0.0


def test_chinese_counts_characters_after_folding() -> None:
    fold = Normalizer.chinese
    assert (
        normalize("\uff21\uff22\uff0c \u4f60\u597d\u3002\u201c\uff13\u201d", fold)
        == "ab\u4f60\u597d3"
    )
    assert count_errors("\u4f60\u597d", "\u4f60", fold) == (1, 2)


def test_seed_tts_folds_case_and_punctuation_but_the_apostrophe() -> None:
    fold = Normalizer.seed_tts
    assert normalize("Don't stop -- it's 7,000!", fold) == "don't stop it's 7000"
    assert normalize("\u201cYes\u201d\uff0c he said", fold) == "yes he said"


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(40):
        low, high = bootstrap_interval(rng.binomial(3, 0.2, 60) / 3)
        covered += low <= 0.2 <= high
    assert 34 <= covered <= 40
    assert bootstrap_interval([0.5]) == (0.5, 0.5)


def test_counts_are_added_before_they_are_divided() -> None:
    def one(
        errors: int, units: int, pauses: PauseErrors | None, kind: Failure | None
    ) -> SpokenScore:
        return SpokenScore("r", "h", errors, units, pauses, 2.0, kind)

    found = summarize(
        [
            one(1, 1, PauseErrors(1, 0, 1), None),
            one(0, 9, PauseErrors(0, 0, 3), None),
            one(0, 10, None, Failure.no_end),
            one(0, 0 + 5, None, Failure.empty),
        ]
    )
    assert found == {
        # seed-tts-eval's: the mean of 1, 0, 0 and 0.
        "wer": 0.25,
        "wer_pooled": 1 / 25,
        "pause_error": 0.25,
        "pause_scored": 0.5,
        "words_per_s": 2.0,
        "no_end": 0.25,
        "empty": 0.25,
        "repeated": 0.0,
    }
    with pytest.raises(DataError, match="no_samples"):
        summarize([])
