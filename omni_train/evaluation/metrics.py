"""Scores of predicted text against reference text, after a stated normaliser.

Error rates come from jiwer; the normalisers are Whisper's, as transformers carries them.
"""

from __future__ import annotations

import unicodedata
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
    "seven thousand" and "7000" agree. seed_tts: lower case, no punctuation but the apostrophe, as
    seed-tts-eval does for English. chinese: full width becomes half width, punctuation and white
    space go; for character error rates, as seed-tts-eval has them for Chinese.
    """

    basic = "basic"
    english = "english"
    seed_tts = "seed_tts"
    chinese = "chinese"


class Metric(Enum):
    """What a task is scored by: word or character error rate, or share of equal replies."""

    wer = "wer"
    cer = "cer"
    exact_match = "exact_match"


@cache
def _fold(normalizer: Normalizer) -> Callable[[str], str]:
    folds: dict[Normalizer, Callable[[], Callable[[str], str]]] = {
        Normalizer.basic: BasicTextNormalizer,
        Normalizer.english: lambda: EnglishTextNormalizer(english_spelling_mapping={}),
        Normalizer.seed_tts: lambda: _fold_seed_tts,
        Normalizer.chinese: lambda: _fold_chinese,
    }
    return folds[normalizer]()


def _fold_seed_tts(text: str) -> str:
    # Its list is ASCII's punctuation, which has some symbols, and that of Chinese.
    kept = (c for c in text if c == "'" or unicodedata.category(c)[0] not in "PS")
    return "".join(kept).lower()


def _fold_chinese(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).lower()
    # Punctuation, symbols and separators; letters, marks and numbers stay.
    return "".join(c for c in folded if unicodedata.category(c)[0] in "LMN")


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
    folded = _references(references, normalizer)
    return float(jiwer.wer(folded, [normalize(text, normalizer) for text in predictions]))


def character_error_rate(
    references: Sequence[str], predictions: Sequence[str], normalizer: Normalizer
) -> float:
    """Character errors over reference characters, over all texts together; raises as for words."""
    folded = _references(references, normalizer)
    return float(jiwer.cer(folded, [normalize(text, normalizer) for text in predictions]))


def _references(texts: Sequence[str], normalizer: Normalizer) -> list[str]:
    folded = [normalize(text, normalizer) for text in texts]
    for text, original in zip(folded, texts, strict=True):
        if not text:
            raise DataError("empty_reference", f"reference {original!r} has no word to compare")
    return folded


def exact_match(
    references: Sequence[str], predictions: Sequence[str], normalizer: Normalizer
) -> float:
    """Share of predictions that equal their reference after folding, 0..1."""
    pairs = zip(references, predictions, strict=True)
    return sum(normalize(r, normalizer) == normalize(p, normalizer) for r, p in pairs) / max(
        1, len(references)
    )


METRICS = {
    Metric.wer: word_error_rate,
    Metric.cer: character_error_rate,
    Metric.exact_match: exact_match,
}
