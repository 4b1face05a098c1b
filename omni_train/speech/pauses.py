"""Pauses of speech against the punctuation of its text (RECIPE.md section 7).

A boundary lies between two neighbouring words. There is a pause where at least 120 ms in a row are
quiet there; there should be one where the text has punctuation, and none elsewhere. Word times are
the recogniser's; quiet is measured on the wave.

Not done here: recognising (asr.py), error rates over words (evaluation).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from omni_train.config.errors import DataError, check_fields
from omni_train.speech.asr import SAMPLE_RATE_HZ, Word

_HOP_S = 0.01
# A recogniser ends a word anywhere in the silence around it, often inside the next sound.
_SLACK_S = 0.1
_FLOOR = 1e-10
# Word characters with inner apostrophes and hyphens, or a run of marks that a reader pauses at.
_TOKEN = re.compile(
    r"[\w]+(?:['\u2019-][\w]+)*|[.,;:!?\u2026\u3001\u3002\uff0c\uff1b\uff1a\uff01\uff1f]+"
)


@dataclass(kw_only=True, slots=True)
class PauseConfig:
    """What counts as a pause.

    Args:
        min_pause_s: shortest run of quiet.
        threshold_db: quiet is so far below the wave's loud part (its 95th percentile), in dB.
    """

    min_pause_s: float = 0.12
    threshold_db: float = 35.0

    def __post_init__(self) -> None:
        check_fields(
            self,
            "pauses",
            ("min_pause_s", self.min_pause_s > 0, "must be positive"),
            ("threshold_db", self.threshold_db > 0, "must be positive"),
            remedy="leave it out for the default",
        )


@dataclass(frozen=True, slots=True)
class PauseErrors:
    """Counts over the boundaries of one text; add them up over texts before dividing.

    Args:
        missing: punctuation boundaries without a pause.
        extra: other boundaries with one.
        boundaries: all boundaries, one fewer than words.
    """

    missing: int
    extra: int
    boundaries: int

    @property
    def rate(self) -> float:
        """Errors over boundaries; 0 for a single word, which has none."""
        return (self.missing + self.extra) / max(self.boundaries, 1)


def pause_boundaries(text: str) -> list[bool]:
    """Return for each boundary between the words of `text` whether punctuation stands there."""
    tokens = _TOKEN.findall(text)
    spoken = [number for number, token in enumerate(tokens) if _is_word(token)]
    return [after - before > 1 for before, after in pairwise(spoken)]


def _is_word(token: str) -> bool:
    return token[0].isalnum() or token[0] == "_"


def count_pause_errors(
    text: str, words: Sequence[Word], wave: NDArray[np.float32], config: PauseConfig
) -> PauseErrors:
    """Compare the pauses of a wave with the punctuation of the text it should say.

    Args:
        text: what should be said, with punctuation.
        words: what was heard, with times; as many words as the text has.
        wave: float32 [S] at 16 kHz.
        config: what counts as a pause.

    Raises:
        DataError: `word_mismatch` where other than the text's number of words was heard: then no
            boundary can be placed, and the text's word errors already count against it.
    """
    wanted = pause_boundaries(text)
    if len(words) != len(wanted) + 1:
        raise DataError("word_mismatch", f"{len(words)} words heard, {len(wanted) + 1} in {text!r}")
    quiet = _quiet(wave, config)
    missing = extra = 0
    for should, before, after in zip(wanted, words, words[1:], strict=False):
        # Between the middles of the two words at most, so that no other boundary's quiet counts.
        start = max(before.end_s - _SLACK_S, (before.start_s + before.end_s) / 2)
        stop = min(after.start_s + _SLACK_S, (after.start_s + after.end_s) / 2)
        run = _longest_run(quiet[round(start / _HOP_S) : round(stop / _HOP_S)])
        paused = run * _HOP_S >= config.min_pause_s - _HOP_S / 2
        missing += should and not paused
        extra += paused and not should
    return PauseErrors(missing, extra, len(wanted))


def _quiet(wave: NDArray[np.float32], config: PauseConfig) -> NDArray[np.bool_]:
    """Whether each 10 ms of the wave are below the threshold."""
    hop = round(_HOP_S * SAMPLE_RATE_HZ)
    padded = np.pad(wave.astype(np.float64), (0, -len(wave) % hop))
    power = (padded.reshape(-1, hop) ** 2).mean(axis=1)
    level = 10.0 * np.log10(np.maximum(power, _FLOOR))
    result: NDArray[np.bool_] = level < np.percentile(level, 95) - config.threshold_db
    return result


def _longest_run(flags: NDArray[np.bool_]) -> int:
    best = run = 0
    for flag in flags.tolist():
        run = run + 1 if flag else 0
        best = max(best, run)
    return best
