"""What the demo corpus is about: words, scenes, and which of them are held out.

Done here: the vocabulary, pictures and clips as plain descriptions, and the split, which is a
function of the content and the seed alone. Not done here: sound, pixels, files, question wordings.

A word sequence or a scene (colour, shape, size, place) is either training or held-out content,
in every subset and every voice. Single words are training content, and every pair of colour and
shape occurs in training: unseen pairs are not learnable at this size (DEMO.md).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import permutations, product

import xxhash

# RECIPE.md section 6: recognised almost without errors by PocketSphinx under a closed grammar.
VOCABULARY = (
    *("apple", "banana", "garden", "window", "yellow", "monday", "summer", "winter"),
    *("river", "doctor", "paper", "purple", "happy", "seven", "thousand", "computer"),
)
MAX_WORDS = 3
COLORS = {
    "red": (222, 40, 40),
    "green": (40, 180, 70),
    "blue": (50, 90, 235),
    "orange": (250, 145, 30),
    "pink": (245, 130, 200),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
# Name -> direction of the shape's centre from the middle of the picture.
PLACES = {
    "in the middle": (0, 0),
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
}
_HELD_OUT_PERCENT = 15


class Split(Enum):
    """Training or held-out content."""

    train = "train"
    heldout = "heldout"


@dataclass(frozen=True, slots=True)
class Scene:
    """One shape in one picture or one moment of a clip; keys of the tables above."""

    color: str
    shape: str
    size: str
    place: str

    @property
    def caption(self) -> str:
        """`a large red circle`."""
        return f"a {self.size} {self.color} {self.shape}"

    @property
    def content(self) -> str:
        """All that the split is about: `large red circle at the top`."""
        return f"{self.size} {self.color} {self.shape} {self.place}"

    @property
    def name(self) -> str:
        """`red circle`."""
        return f"{self.color} {self.shape}"


def pick(options: tuple[str, ...], key: str) -> str:
    """Choose by the hash of a key, so that a sample's wording depends on nothing else."""
    return options[xxhash.xxh3_64_intdigest(key.encode()) % len(options)]


def split_of_words(words: tuple[str, ...], seed: int) -> Split:
    """Side on which a word sequence lies, wherever it is written, said or asked for.

    Every single word is training content: a held-out one would be a word whose end was never heard.
    """
    if len(words) == 1:
        return Split.train
    return _split("words " + " ".join(words), seed)


@lru_cache(maxsize=4)
def scenes(split: Split, seed: int) -> tuple[Scene, ...]:
    """All scenes of one side; of each pair of colour and shape, some are always in training."""
    chosen = []
    for color, shape in product(COLORS, SHAPES):
        variants = [Scene(color, shape, size, place) for size, place in product(SIZES, PLACES)]
        sides = [_split(f"scene {scene}", seed) for scene in variants]
        if Split.train not in sides:
            sides[0] = Split.train
        chosen += [scene for scene, side in zip(variants, sides, strict=True) if side is split]
    return tuple(chosen)


@lru_cache(maxsize=16)
def word_sequences(length: int, split: Split, seed: int) -> tuple[tuple[str, ...], ...]:
    """All sequences of so many different words on one side."""
    # Without repeats: a word said twice in a row is one word stuttered in the text task.
    every = permutations(VOCABULARY, length)
    return tuple(words for words in every if split_of_words(words, seed) is split)


def draw_words(rng: random.Random, length: int, split: Split, seed: int) -> tuple[str, ...]:
    """Draw a sequence of so many different words that lies on one side."""
    if length <= MAX_WORDS:
        pool = word_sequences(length, split, seed)
        # The held-out side has no single words; there are always longer sequences.
        return rng.choice(pool) if pool else draw_words(rng, length + 1, split, seed)
    while True:
        drawn = tuple(rng.sample(VOCABULARY, length))
        if split_of_words(drawn, seed) is split:
            return drawn


def _split(content: str, seed: int) -> Split:
    number = xxhash.xxh3_64_intdigest(content.encode(), seed=seed)
    return Split.heldout if number % 100 < _HELD_OUT_PERCENT else Split.train
