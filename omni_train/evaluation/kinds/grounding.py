"""Grounding: a box in the reply's text that covers the reference's with an IoU of at least 0.5.

A box is the first four numbers inside brackets: `[x1, y1, x2, y2]`, `(x1,y1),(x2,y2)`, or a list in
JSON. Both texts must speak of the same pixels; which, is for the data to say.
"""

from __future__ import annotations

import re

from omni_train.config.errors import DataError
from omni_train.evaluation.kinds.base import Answer, Kind, right_of
from omni_train.evaluation.metrics import Normalizer

_MIN_IOU = 0.5
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"[\[(]{_NUMBER},{_NUMBER}[\])]?\s*,\s*[\[(]?{_NUMBER},{_NUMBER}[\])]")

Box = tuple[float, float, float, float]


def read_box(text: str) -> Box | None:
    """Return the first box of a text, its corners in order; None where there is none."""
    found = _BOX.search(text)
    if found is None:
        return None
    x1, y1, x2, y2 = (float(number) for number in found.groups())
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def overlap(one: Box, other: Box) -> float:
    """Return the area that both boxes share, over the area that either has."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    either = sum(areas) - shared
    return shared / either if either > 0 else 0.0


def _counts(answer: Answer, normalizer: Normalizer) -> list[float]:
    right = read_box(answer.reference)
    if right is None:
        raise DataError("bad_reference", f"{answer.reference!r} has no box", key=answer.key)
    said = read_box(answer.prediction)
    return right_of(said is not None and overlap(right, said) >= _MIN_IOU)


GROUNDING = Kind(_counts)
