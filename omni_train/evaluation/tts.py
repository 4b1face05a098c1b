"""Scores of spoken replies: word errors by a recogniser, pauses, speech rate, kinds of failure.

    wave + text it should say -> SpokenScore -> summarize: one figure each over all replies

`wer` follows seed-tts-eval (BytedanceSpeech/seed-tts-eval, average_wer.py): the mean over replies
of each one's rate, so a short reply counts as much as a long one; `wer_pooled` adds the counts up
before it divides. The text is scored by the recogniser's hearing, so raw recordings of the same
voice belong beside every figure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import jiwer
import numpy as np
from numpy.typing import NDArray

from omni_train.config.errors import DataError
from omni_train.evaluation.metrics import Normalizer, normalize
from omni_train.speech.asr import Recognizer, Transcript
from omni_train.speech.mel import to_16_khz
from omni_train.speech.pauses import PauseConfig, PauseErrors, count_pause_errors

_MAX_LOOP_WORDS = 4
_LOOPS = 3
_BOOTSTRAPS, _BOOTSTRAP_SEED = 2000, 0


class Failure(Enum):
    """How a reply fails as a whole.

    no_end: sampling reached its limit. empty: no word was heard. repeated: one to four words come
    three times in a row, which the text does not say.
    """

    no_end = "no_end"
    empty = "empty"
    repeated = "repeated"


@dataclass(frozen=True, slots=True)
class SpokenScore:
    """One reply.

    Args:
        reference: text after the normaliser.
        heard: what the recogniser heard, after the normaliser.
        errors, units: word errors and reference words; characters for Chinese.
        pauses: pause errors; None where another number of words was heard than written.
        words_per_s: from the first word's start to the last one's end; 0 without a word.
        failure: the first kind that applies, or None.
    """

    reference: str
    heard: str
    errors: int
    units: int
    pauses: PauseErrors | None
    words_per_s: float
    failure: Failure | None

    @property
    def wer(self) -> float:
        """Errors over reference units; above 1 where much was heard that is not written."""
        return self.errors / self.units


def score_reply(
    text: str,
    wave: NDArray[np.float32],
    sample_rate_hz: int,
    *,
    ended: bool,
    recognizer: Recognizer,
    normalizer: Normalizer,
    pauses: PauseConfig,
) -> SpokenScore:
    """Score one reply.

    Args:
        text: what should be said, with punctuation.
        wave: float32 [S]; empty where nothing was sampled.
        sample_rate_hz: of the wave.
        ended: whether sampling stopped by itself.
        recognizer, normalizer, pauses: how it is heard and compared.

    Raises:
        DataError: `empty_reference`, and what the recogniser refuses.
    """
    reference = normalize(text, normalizer)
    if not reference:
        raise DataError("empty_reference", f"text {text!r} has no word to compare")
    wave = to_16_khz(wave, sample_rate_hz)
    transcript = recognizer.transcribe(wave) if len(wave) else Transcript("", [])
    heard = normalize(transcript.text, normalizer)
    errors, units = count_errors(reference, heard, normalizer)
    try:
        found = count_pause_errors(text, transcript.words, wave, pauses)
    except DataError as error:
        if error.reason != "word_mismatch":
            raise
        found = None
    return SpokenScore(
        reference=reference,
        heard=heard,
        errors=errors,
        units=units,
        pauses=found,
        words_per_s=speech_rate(transcript),
        failure=failure_of(reference.split(), heard.split(), ended=ended),
    )


def count_errors(reference: str, heard: str, normalizer: Normalizer) -> tuple[int, int]:
    """Return (errors, reference units) of normalised texts: characters for Chinese, else words."""
    characters = normalizer is Normalizer.chinese
    counted = (jiwer.process_characters if characters else jiwer.process_words)(reference, heard)
    units = counted.hits + counted.substitutions + counted.deletions
    return counted.substitutions + counted.deletions + counted.insertions, units


def speech_rate(transcript: Transcript) -> float:
    """Words per second between the first word's start and the last one's end."""
    if not transcript.words:
        return 0.0
    seconds = transcript.words[-1].end_s - transcript.words[0].start_s
    return len(transcript.words) / seconds if seconds > 0 else 0.0


def failure_of(reference: Sequence[str], heard: Sequence[str], *, ended: bool) -> Failure | None:
    """Return the first kind of failure that applies, or None."""
    if not ended:
        return Failure.no_end
    if not heard:
        return Failure.empty
    loops = _loops(heard) - _loops(reference)
    return Failure.repeated if loops else None


def _loops(words: Sequence[str]) -> set[tuple[str, ...]]:
    """Runs of one to four words that come three times in a row."""
    found = set()
    for size in range(1, _MAX_LOOP_WORDS + 1):
        for start in range(len(words) - size * _LOOPS + 1):
            run = tuple(words[start : start + size])
            if run * _LOOPS == tuple(words[start : start + size * _LOOPS]):
                found.add(run)
    return found


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean, by the percentile bootstrap with a fixed seed.

    Args:
        values: independent of one another; of several samples of one text, their mean.
    """
    rng, array = np.random.default_rng(_BOOTSTRAP_SEED), np.asarray(values, dtype=np.float64)
    means = [rng.choice(array, len(array)).mean() for _ in range(_BOOTSTRAPS)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summarize(scores: Sequence[SpokenScore]) -> dict[str, float]:
    """Return `wer`, `wer_pooled`, `pause_error`, `pause_scored`, `words_per_s` and failure shares.

    `pause_error` is over all boundaries of the replies whose number of words was heard, and
    `pause_scored` the share of these; `words_per_s` is the mean over replies with a word.

    Raises:
        DataError: `no_samples` without any score.
    """
    if not scores:
        raise DataError("no_samples", "there is no reply to score")
    pauses = [score.pauses for score in scores if score.pauses is not None]
    boundaries = sum(found.boundaries for found in pauses)
    rates = [score.words_per_s for score in scores if score.words_per_s > 0]
    kinds = Counter(score.failure for score in scores)
    return {
        "wer": sum(score.wer for score in scores) / len(scores),
        "wer_pooled": sum(score.errors for score in scores) / sum(score.units for score in scores),
        "pause_error": sum(f.missing + f.extra for f in pauses) / max(boundaries, 1),
        "pause_scored": len(pauses) / len(scores),
        "words_per_s": sum(rates) / max(len(rates), 1),
        **{kind.name: kinds[kind] / len(scores) for kind in Failure},
    }
