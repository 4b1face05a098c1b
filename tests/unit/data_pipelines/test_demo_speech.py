"""Spoken replies of the demo corpus: held out by content, and errors that leave the sound alone."""

from __future__ import annotations

import random
from collections import Counter

from data_pipelines.demo_content import VOCABULARY, Split, split_of_words
from data_pipelines.demo_speech import (
    BASE_VOICES,
    misheard,
    plan_speech,
    punctuated,
    with_errors,
    words_of,
)
from data_pipelines.demo_tasks import SAY_PROMPTS, Recipe, SamplePlan, Speech

VOICES = ("en-us", "en-us+f2", "en-us+m3")


def plans(count: int = 400, split: Split = Split.train, seed: int = 5) -> list[SamplePlan]:
    return list(plan_speech(Recipe(count, split, VOICES, seed)))


def prompt(plan: SamplePlan) -> str:
    return str(plan.record["messages"][0]["content"][0]["text"])


def written(plan: SamplePlan) -> str:
    return str(plan.record["messages"][-1]["content"][0]["text"])


def spoken(plan: SamplePlan) -> str:
    ((member, speech),) = plan.media.items()
    assert plan.record["messages"][-1]["content"][1:] == [{"type": "speech", "speech": member}]
    assert isinstance(speech, Speech)
    assert speech.voice == plan.record["speaker"]
    return speech.text


def test_a_reply_says_what_it_writes_and_what_was_asked_for() -> None:
    made = plans()
    for plan in made:
        assert spoken(plan) == written(plan)
        assert prompt(plan) in {text.format(words=written(plan)) for text in SAY_PROMPTS}
        assert 1 <= len(written(plan).split()) <= 3
    assert len({prompt(plan).split()[0] for plan in made}) == len(SAY_PROMPTS)
    assert {plan.record["speaker"] for plan in made} == set(BASE_VOICES)


def test_another_voice_speaks_where_no_base_voice_is_understood() -> None:
    (plan,) = plan_speech(Recipe(1, Split.train, ("en-us+f2",), 0))
    assert plan.record["speaker"] == "en-us+f2"


def test_held_out_sequences_are_never_spoken_or_written_in_training() -> None:
    train = plans(3000)
    noisy = list(with_errors(train, 5))
    for plan in [*train, *noisy]:
        assert split_of_words(words_of(spoken(plan)), 5) is Split.train
        assert split_of_words(words_of(written(plan)), 5) is Split.train
        said = {" ".join(words_of(text)) for text in (spoken(plan), written(plan))}
        assert set(plan.record["meta"]["words"]) == said
    for plan in plans(100, Split.heldout):
        assert split_of_words(words_of(written(plan)), 5) is Split.heldout


def test_every_other_text_has_one_error_and_no_sound_has() -> None:
    clean = plans(1200)
    noisy = list(with_errors(clean, 5))
    kinds: Counter[str] = Counter()
    for number, (before, after) in enumerate(zip(clean, noisy, strict=True)):
        assert after.key == before.key
        assert after.media == before.media
        kinds[after.record["meta"]["error"]] += 1
        if number % 2 == 0:
            assert after.record == before.record
            continue
        assert written(after) != spoken(after)
        assert prompt(after) in {text.format(words=written(after)) for text in SAY_PROMPTS}
        assert edits([*words_of(spoken(after))], [*words_of(written(after))]) == 1
    assert kinds.pop("") == 600
    assert set(kinds) == {"wrong", "not spoken", "not written", "twice"}
    assert min(kinds.values()) > 80
    again = list(with_errors(plans(1200), 5))
    assert [plan.record for plan in again] == [plan.record for plan in noisy]
    other = list(with_errors(clean, 6))
    assert [plan.record for plan in other] != [plan.record for plan in noisy]


def test_commas_stand_between_words_and_go_with_their_word() -> None:
    texts = [written(plan) for plan in plans(600)]
    assert not any(text.endswith(",") for text in texts)
    boundaries = sum(len(words_of(text)) - 1 for text in texts)
    assert 0.2 < sum(text.count(",") for text in texts) / boundaries < 0.3
    rng = random.Random(1)
    for _ in range(200):
        kind, words = misheard(["apple,", "river"], rng)
        assert kind == "not written" or words[-1] == "river" or kind == "wrong", words
        assert " ".join(words).count(",") == (kind != "not written" or 0)
        assert not words[-1].endswith(",")
    assert punctuated(("river",), rng) == "river"


def test_a_single_word_is_not_left_out() -> None:
    rng = random.Random(0)
    made = [misheard(["river"], rng) for _ in range(200)]
    assert all(words for _, words in made)
    assert {kind for kind, _ in made} == {"wrong", "not spoken", "twice"}
    assert all(set(words) <= set(VOCABULARY) for _, words in made)


def edits(one: list[str], other: list[str]) -> int:
    """Levenshtein distance."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]
