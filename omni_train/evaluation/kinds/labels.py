"""Classification (emotions, sounds, genres): the one label that the reply names, of a closed list.

A reply that names no label of the list, or several, is wrong.
"""

from __future__ import annotations

from omni_train.config.errors import DataError
from omni_train.evaluation.kinds.base import Answer, Kind, right_of
from omni_train.evaluation.metrics import Normalizer, normalize


def _counts(answer: Answer, normalizer: Normalizer) -> list[float]:
    labels = {normalize(option, normalizer) for option in answer.options}
    right = normalize(answer.reference, normalizer)
    if right not in labels:
        raise DataError(
            "bad_reference", f"{answer.reference!r} is no label of {answer.options}", key=answer.key
        )
    said = f" {normalize(answer.prediction, normalizer)} "
    named = {label for label in labels if f" {label} " in said}
    # Of "sad" and "very sad" the longer one was meant.
    named = {a for a in named if not any(a != b and f" {a} " in f" {b} " for b in named)}
    return right_of(named == {right})


LABELS = Kind(_counts)
