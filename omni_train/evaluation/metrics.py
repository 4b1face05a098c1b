"""What texts can be scored by, and how they are folded before they are compared.

The normalisers are Whisper's, as transformers carries them, and those of seed-tts-eval.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from enum import Enum
from functools import cache

from transformers.models.whisper.english_normalizer import (
    BasicTextNormalizer,
    EnglishTextNormalizer,
)


class Normalizer(Enum):
    """How text is folded before it is compared.

    basic: lower case, no punctuation. english: Whisper's, which also rewrites numbers, so that
    "seven thousand" and "7000" agree. seed_tts: lower case, no punctuation but the apostrophe, as
    seed-tts-eval does for English. chinese: full width becomes half width, punctuation and white
    space go; for character error rates, as seed-tts-eval has them for Chinese. verbatim: white
    space alone, for formulas and numbers, whose signs are not punctuation.
    """

    basic = "basic"
    english = "english"
    seed_tts = "seed_tts"
    chinese = "chinese"
    verbatim = "verbatim"


class Metric(Enum):
    """What a task is scored by; the kinds are in `kinds/`, the table in `scoring.py`.

    wer, cer: word or character error rate. bleu: of translations, 0..100. exact_match,
    relaxed_match: share of replies that are a right answer, or for numbers near one. tempo: share
    within 4 %. anls: likeness to the nearest answer. vqa: share of people who agree. choice,
    choice_likelihood: share of right letters, generated or the most probable. label: share of right
    labels. grounding: share of boxes with an IoU of 0.5. answered: share of replies that say
    something, for sets that are judged elsewhere.
    """

    wer = "wer"
    cer = "cer"
    bleu = "bleu"
    exact_match = "exact_match"
    relaxed_match = "relaxed_match"
    tempo = "tempo"
    anls = "anls"
    vqa = "vqa"
    choice = "choice"
    choice_likelihood = "choice_likelihood"
    label = "label"
    grounding = "grounding"
    answered = "answered"


@cache
def _fold(normalizer: Normalizer) -> Callable[[str], str]:
    folds: dict[Normalizer, Callable[[], Callable[[str], str]]] = {
        Normalizer.basic: BasicTextNormalizer,
        Normalizer.english: lambda: EnglishTextNormalizer(english_spelling_mapping={}),
        Normalizer.seed_tts: lambda: _fold_seed_tts,
        Normalizer.chinese: lambda: _fold_chinese,
        Normalizer.verbatim: lambda: str,
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
