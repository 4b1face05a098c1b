"""Speech recognition: errors over reference words, or over characters (Chinese, Cantonese)."""

from __future__ import annotations

import jiwer

from omni_train.config.errors import DataError
from omni_train.evaluation.kinds.base import Answer, Kind
from omni_train.evaluation.metrics import Normalizer, normalize


def _words(answer: Answer, normalizer: Normalizer) -> list[float]:
    found = jiwer.process_words(_reference(answer, normalizer), _heard(answer, normalizer))
    return _counts(found)


def _characters(answer: Answer, normalizer: Normalizer) -> list[float]:
    found = jiwer.process_characters(_reference(answer, normalizer), _heard(answer, normalizer))
    return _counts(found)


def _reference(answer: Answer, normalizer: Normalizer) -> str:
    folded = normalize(answer.reference, normalizer)
    if not folded:
        # jiwer itself counts it as a whole error, without a message.
        raise DataError(
            "empty_reference", f"{answer.reference!r} has no word to compare", key=answer.key
        )
    return folded


def _heard(answer: Answer, normalizer: Normalizer) -> str:
    return normalize(answer.prediction, normalizer)


def _counts(found: jiwer.WordOutput | jiwer.CharacterOutput) -> list[float]:
    errors = found.substitutions + found.deletions + found.insertions
    return [errors, found.hits + found.substitutions + found.deletions]


WORDS = Kind(_words)
CHARACTERS = Kind(_characters)
