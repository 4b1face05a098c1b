"""Questions about pictures, clips and sound: exact match, and the relaxed one of ChartQA.

Relaxed: where reference and reply are numbers, one within 5 % of the other is right (Masry et al.,
arXiv 2203.10244); a percent sign and thousands' commas count for nothing. Tempo: the same within
4 %, the Accuracy 1 of tempo estimation (Gouyon et al., 2006). Answered: for sets that a judge or a
run of code scores elsewhere; the figure only says that there is something to judge.
"""

from __future__ import annotations

import math

from omni_train.evaluation.kinds.base import Answer, Kind, right_of
from omni_train.evaluation.metrics import Normalizer, normalize

_TOLERANCE = 0.05
_TEMPO_TOLERANCE = 0.04


def _same(reference: str, prediction: str, normalizer: Normalizer) -> bool:
    return normalize(reference, normalizer) == normalize(prediction, normalizer)


def _exact(answer: Answer, normalizer: Normalizer) -> list[float]:
    return right_of(any(_same(r, answer.prediction, normalizer) for r in answer.references))


def _relaxed(answer: Answer, normalizer: Normalizer) -> list[float]:
    return right_of(any(_near(r, answer.prediction, normalizer) for r in answer.references))


def _tempo(answer: Answer, normalizer: Normalizer) -> list[float]:
    right = any(
        _near(r, answer.prediction, normalizer, _TEMPO_TOLERANCE) for r in answer.references
    )
    return right_of(right)


def _answered(answer: Answer, normalizer: Normalizer) -> list[float]:
    return right_of(bool(answer.prediction.strip()))


def _near(
    reference: str, prediction: str, normalizer: Normalizer, tolerance: float = _TOLERANCE
) -> bool:
    right, said = _number(reference), _number(prediction)
    if right is None or said is None:
        return _same(reference, prediction, normalizer)
    return said == right if right == 0 else abs(said - right) <= tolerance * abs(right)


def _number(text: str) -> float | None:
    try:
        number = float(text.strip().removesuffix(".").removesuffix("%").replace(",", ""))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


EXACT = Kind(_exact)
RELAXED = Kind(_relaxed)
TEMPO = Kind(_tempo)
ANSWERED = Kind(_answered)
