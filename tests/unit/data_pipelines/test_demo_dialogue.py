"""Dialogues of the demo: every kind is there, and held-out questions come in both ways."""

from __future__ import annotations

from collections import Counter

from data_pipelines.demo_content import Split
from data_pipelines.demo_dialogue import QUESTIONS, plan_dialogue, plan_question
from data_pipelines.demo_tasks import Picture, Recipe, SamplePlan, Speech

VOICES = ("en-us", "en-us+f2")


def text_of(plan: SamplePlan) -> str:
    """The question, read or heard."""
    (_, asked) = plan.record["messages"][0]["content"]
    if asked["type"] == "text":
        return str(asked["text"])
    said = plan.media[asked["audio"]]
    assert isinstance(said, Speech)
    return said.text


def test_held_out_questions_differ_in_nothing_but_the_voice() -> None:
    plans = list(plan_question(Recipe(16, Split.heldout, VOICES, 0)))
    for spoken, written in zip(plans[::2], plans[1::2], strict=True):
        assert spoken.record["meta"]["group"] == "voice"
        assert written.record["meta"]["group"] == "text"
        assert isinstance(spoken.media["0.png"], Picture)
        assert spoken.media["0.png"] == written.media["0.png"]
        assert set(written.media) == {"0.png"}
        assert set(spoken.media) == {"0.png", "1.wav"}
        assert text_of(spoken) == text_of(written)
        assert spoken.record["messages"][-1] == written.record["messages"][-1]
    asked = Counter(plan.record["meta"]["about"][0] for plan in plans)
    assert asked == dict.fromkeys(QUESTIONS, 4)


def test_training_asks_several_things_of_a_picture_in_either_way() -> None:
    plans = list(plan_question(Recipe(40, Split.train, VOICES, 0)))
    ways = Counter()
    for plan in plans:
        turns = plan.record["messages"]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * 3
        assert len(set(plan.record["meta"]["about"])) == 3
        assert plan.record["meta"]["group"] == ""
        ways.update(turn["content"][-1]["type"] for turn in turns[::2])
    assert min(ways["audio"], ways["text"]) > 40
    assert plans == list(plan_question(Recipe(40, Split.train, VOICES, 0)))
    # The number of samples changes none of them.
    assert plans[:8] == list(plan_question(Recipe(8, Split.train, VOICES, 0)))


def test_the_kinds_of_dialogue_come_in_turn_with_what_they_are_about() -> None:
    plans = list(plan_dialogue(Recipe(24, Split.heldout, VOICES, 0)))
    groups = Counter(plan.record["meta"]["group"] for plan in plans)
    assert set(groups.values()) == {4}
    for plan in plans:
        kinds = {name.rsplit(".", 1)[1] for name in plan.media}
        wanted = {
            "text": set(),
            "picture": {"png"},
            "speech": {"wav"},
            "clip": {"mp4"},
            "picture and speech": {"png", "wav"},
            "two pictures": {"png"},
        }[plan.record["meta"]["group"]]
        assert kinds == wanted
        assert len(plan.record["messages"]) >= 4
        assert bool(plan.record["speaker"]) == bool(kinds & {"wav"} or _says(plan))


def _says(plan: SamplePlan) -> bool:
    return plan.record["meta"]["group"] == "clip" and bool(plan.record["meta"]["words"])
