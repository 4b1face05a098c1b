"""Multiple choice: the reference is a letter, and the options stand in the prompt under letters.

By generation the letter is read out of the reply; by likelihood the most probable letter is the
reply. What names no option, or two, is wrong.
"""

from __future__ import annotations

import re
import string

from omni_train.config.errors import DataError
from omni_train.evaluation.kinds.base import Answer, Kind, right_of
from omni_train.evaluation.metrics import Normalizer, normalize

LETTERS = string.ascii_uppercase
# "B", "(B)", "B.", "B: red", "Answer: B", "the answer is B".
_ALONE = re.compile(r"^\W*([A-Z])(?:\W|$)")
_SAID = re.compile(r"(?i:answer|option|choice)(?:\s+(?i:is))?\W{0,3}\s*\(?([A-Z])(?:\W|$)")


def letters_of(options: tuple[str, ...], key: str) -> tuple[str, ...]:
    """Return the letters of a question's options.

    Raises:
        DataError: `no_options` where there are fewer than two, or more than letters.
    """
    if not 2 <= len(options) <= len(LETTERS):
        raise DataError("no_options", f"a choice among {len(options)} options", key=key)
    return tuple(LETTERS[: len(options)])


def read_letter(text: str, options: tuple[str, ...], normalizer: Normalizer) -> str:
    """Return the letter that a reply names, by itself or by the option's text; empty for none."""
    letters = LETTERS[: len(options)]
    for pattern in (_ALONE, _SAID):
        found = pattern.search(text)
        # "A dog" is no letter, unless it is the text of an option too.
        if found and found[1] in letters and not _is_article(text, found):
            return found[1]
    said = f" {normalize(text, normalizer)} "
    texts = [normalize(option, normalizer) for option in options]
    named = [i for i, option in enumerate(texts) if option and f" {option} " in said]
    # "not red" is also in "red, not blue": the longest text that holds all others is meant.
    kept = [
        i for i in named if not any(texts[i] in texts[j] and texts[i] != texts[j] for j in named)
    ]
    return letters[kept[0]] if len(kept) == 1 else ""


def _is_article(text: str, found: re.Match[str]) -> bool:
    rest = text[found.end(1) :]
    return found[1] in "AI" and bool(re.match(r"\s+\w", rest))


def _counts(answer: Answer, normalizer: Normalizer) -> list[float]:
    letters = letters_of(answer.options, answer.key)
    right = answer.reference.strip()
    if right not in letters:
        raise DataError("bad_reference", f"{right!r} is none of {''.join(letters)}", key=answer.key)
    return right_of(read_letter(answer.prediction, answer.options, normalizer) == right)


CHOICE = Kind(_counts)
LIKELIHOOD = Kind(_counts, likelihood=True)
