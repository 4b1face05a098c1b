"""Scores of predicted text against reference text, after a stated normaliser.

Error rates come from jiwer; the normalisers are Whisper's, as transformers carries them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from functools import cache

import jiwer
from transformers.models.whisper.english_normalizer import (
    BasicTextNormalizer,
    EnglishTextNormalizer,
)

from omni_train.config.errors import DataError


class Normalizer(Enum):
    """How text is folded before it is compared.

    basic: lower case, no punctuation. english: Whisper's, which also rewrites numbers, so that
    "seven thousand" and "7000" agree.
    """

    basic = "basic"
    english = "english"


class Metric(Enum):
    """What a task is scored by: word error rate, or share of replies equal to the reference."""

    wer = "wer"
    exact_match = "exact_match"


@cache
def _fold(normalizer: Normalizer) -> Callable[[str], str]:
    folds: dict[Normalizer, Callable[[], Callable[[str], str]]] = {
        Normalizer.basic: BasicTextNormalizer,
        Normalizer.english: lambda: EnglishTextNormalizer(english_spelling_mapping={}),
    }
    return folds[normalizer]()


def normalize(text: str, normalizer: Normalizer) -> str:
    """Fold one text; white space becomes single spaces."""
    return " ".join(_fold(normalizer)(text).split())


def word_error_rate(
    references: Sequence[str], predictions: Sequence[str], normalizer: Normalizer
) -> float:
    """Word errors over reference words, over all texts together (0 is perfect, may exceed 1).

    Raises:
        DataError: `empty_reference` where a reference has no word; jiwer itself would count it as
            a whole error without a message.
    """
    folded = [normalize(text, normalizer) for text in references]
    for text, original in zip(folded, references, strict=True):
        if not text:
            raise DataError("empty_reference", f"reference {original!r} has no word to compare")
    hypotheses = [normalize(text, normalizer) for text in predictions]
    return float(jiwer.wer(folded, hypotheses))


def exact_match(
    references: Sequence[str], predictions: Sequence[str], normalizer: Normalizer
) -> float:
    """Share of predictions that equal their reference after folding, 0..1."""
    pairs = zip(references, predictions, strict=True)
    return sum(normalize(r, normalizer) == normalize(p, normalizer) for r, p in pairs) / max(
        1, len(references)
    )


METRICS = {Metric.wer: word_error_rate, Metric.exact_match: exact_match}
