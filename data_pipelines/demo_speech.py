"""Spoken replies of the demo corpus: a user asks for words, the assistant says them.

    speech          request in one of several wordings -> the words, written and spoken
    speech_noisy    the same sounds under the same keys; every other sample's text has one error
    speaker         the same kind of request, answered by a voice that nothing before was spoken in

A comma stands between some of the words, where the voice pauses.

The errors are those of a careless transcript, and are what preference training is for (section 4.2
of the report, arXiv 2503.20215): a Talker that learns from them says the wrong words at times. The
request quotes the text, so that nothing but the sound tells of an error.

Not done here: sound, codes.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import Any

from data_pipelines.demo_content import VOCABULARY, Split, split_of_words
from data_pipelines.demo_tasks import (
    Recipe,
    SamplePlan,
    Speech,
    draw_utterances,
    reply_message,
    sample_record,
    say_prompt,
    user_message,
)

# The Talker's voices; the others are there for a later stage to add one of them.
BASE_VOICES = ("en-us", "en-us+m3")
TARGET_VOICE = "en-us+f2"
REPLY = "reply.wav"
# Share of 1, 2 and 3 words: many different sequences, for a few are learnt by heart.
_LENGTH_SHARES = (0.10, 0.25, 0.65)
_ERRORS = ("wrong", "not spoken", "not written", "twice")
_COMMA = ","
# Of the boundaries between two words.
_COMMA_SHARE = 0.25


def plan_speech(recipe: Recipe) -> Iterator[SamplePlan]:
    """Spoken replies in the base voices that are understood, or where none is, in all that are."""
    yield from _spoken(recipe, "speech", BASE_VOICES)


def plan_speaker(recipe: Recipe) -> Iterator[SamplePlan]:
    """Spoken replies of the voice that a late stage adds."""
    yield from _spoken(recipe, "speaker", (TARGET_VOICE,))


def _spoken(recipe: Recipe, subset: str, wanted: tuple[str, ...]) -> Iterator[SamplePlan]:
    voices = tuple(v for v in wanted if v in recipe.voices) or recipe.voices
    drawn = draw_utterances(recipe, subset, _LENGTH_SHARES, voices)
    for key, (words, voice) in zip(recipe.keys(subset), drawn, strict=True):
        text = punctuated(words, random.Random(f"{recipe.seed} comma {key}"))
        meta = {"words": [" ".join(words)], "scenes": [], "error": ""}
        record = sample_record(_dialogue(key, text), "speech", meta, voice)
        yield SamplePlan(key, record, {REPLY: Speech(text, voice)})


def with_errors(plans: Iterable[SamplePlan], seed: int) -> Iterator[SamplePlan]:
    """Return the samples with one error in the text of every other one; the sound stays.

    Args:
        plans: of `plan_speech`, the training side.
        seed: of the corpus.
    """
    for number, plan in enumerate(plans):
        record = deepcopy(plan.record)
        if number % 2:
            (spoken,) = record["meta"]["words"]
            text = record["messages"][-1]["content"][0]["text"]
            rng = random.Random(f"{seed} error {plan.key}")
            kind, written = misheard(text.split(), rng)
            # Held-out content stays out of the texts too.
            while split_of_words(words_of(" ".join(written)), seed) is Split.heldout:
                kind, written = misheard(text.split(), rng)
            said = " ".join(words_of(" ".join(written)))
            record["meta"] |= {"words": [spoken, said], "error": kind}
            record["messages"] = _dialogue(plan.key, " ".join(written))
        yield SamplePlan(plan.key, record, plan.media)


def punctuated(words: tuple[str, ...], rng: random.Random) -> str:
    """Return the words as a text with commas at some boundaries."""
    marks = [_COMMA if rng.random() < _COMMA_SHARE else "" for _ in words[1:]]
    return " ".join(word + mark for word, mark in zip(words, [*marks, ""], strict=True))


def words_of(text: str) -> tuple[str, ...]:
    """Return the words of a text without its commas."""
    return tuple(text.replace(_COMMA, "").split())


def misheard(words: list[str], rng: random.Random) -> tuple[str, list[str]]:
    """Return the kind of an error and the words with it: one wrong, one more, one less, one twice.

    A single word is never left out: a reply without text cannot be asked for. A word keeps the
    comma behind it.
    """
    kinds = _ERRORS if len(words) > 1 else tuple(k for k in _ERRORS if k != "not written")
    kind = rng.choice(kinds)
    place = rng.randrange(len(words))
    bare = words_of(" ".join(words))
    other = rng.choice([word for word in VOCABULARY if word not in bare])
    before, word, after = words[:place], words[place], words[place + 1 :]
    mark = word.removeprefix(bare[place])
    changed = {
        "wrong": [other + mark],
        "not spoken": [other, word],
        "not written": [],
        "twice": [bare[place], word],
    }[kind]
    text = " ".join([*before, *changed, *after])
    return kind, text.rstrip(_COMMA).split()


def _dialogue(key: str, text: str) -> list[dict[str, Any]]:
    return [user_message(say_prompt(key, text)), reply_message(text, speech=REPLY)]
