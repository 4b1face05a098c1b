"""How often each utterance comes in an epoch, so that no word belongs to one voice alone.

Where a word is mostly spoken by one speaker, a Talker learns to say it in that voice, whoever is
asked (the paper's reason for timbre disentanglement). So every cell (word, speaker) should come as
often as the fullest cell of the same word. A sample is repeated as its rarest cell demands; what
is common is never left out. Words of one speaker alone have nothing to be balanced with.

Pure functions of texts and speakers; nothing is read here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from omni_train.data.split import UNSPACED_LANGUAGES

# (word, speaker), and (text, language, speaker).
Cell = tuple[str, str]
Utterance = tuple[str, str, str]

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")


def words_of(text: str, language: str) -> set[str]:
    """Return the words of a text in lower case; the characters, where words are not spaced."""
    words = _WORD.findall(text.lower())
    return set("".join(words)) if language in UNSPACED_LANGUAGES else set(words)


def count_cells(utterances: Iterable[Utterance]) -> Counter[Cell]:
    """Return in how many utterances each word comes in each speaker's voice."""
    counts: Counter[Cell] = Counter()
    for text, language, speaker in utterances:
        counts.update((word, speaker) for word in words_of(text, language))
    return counts


def most_by_word(counts: Mapping[Cell, int]) -> dict[str, int]:
    """Return the count of each word's fullest cell."""
    most: dict[str, int] = {}
    for (word, _), count in counts.items():
        most[word] = max(most.get(word, 0), count)
    return most


def repeats_of(
    utterance: Utterance,
    counts: Mapping[Cell, int],
    most: Mapping[str, int],
    *,
    max_repeats: int,
) -> int:
    """Return how often an utterance should come, 1 to `max_repeats`."""
    text, language, speaker = utterance
    # A sample that was not counted, as it is left out, asks for nothing.
    factors = [
        most[word] / counts[word, speaker]
        for word in words_of(text, language)
        if counts.get((word, speaker))
    ]
    return min(max(1, round(max(factors, default=1.0))), max_repeats)
