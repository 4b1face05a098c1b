"""Prompts in words: deterministic, varied, and free of tags."""

from __future__ import annotations

import pytest

from data_pipelines.prompts import PROMPTS, Task, find_tag, prompt_for
from omni_train.config.errors import DataError
from omni_train.data.types import MediaKind

FIELDS = {"question": "What is it?", "phrase": "the red cup", "target_language": "de"}
PAIRS = [(task, kind) for task, kinds in PROMPTS.items() for kind in kinds]


@pytest.mark.parametrize(("task", "kind"), PAIRS)
def test_wordings_vary_with_the_key_and_hold_no_tag(task: Task, kind: MediaKind) -> None:
    keys = [f"s-{number}" for number in range(200)]
    prompts = [prompt_for(task.name, kind, key=key, fields=FIELDS) for key in keys]
    assert prompts == [prompt_for(task.name, kind, key=key, fields=FIELDS) for key in keys]
    assert len(set(prompts)) == len(PROMPTS[task][kind]) >= 3
    for prompt in prompts:
        assert find_tag(prompt) == ""
        assert not set("<>[]{}|") & set(prompt)


def test_every_task_has_wordings() -> None:
    assert set(PROMPTS) == set(Task)


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("<|asr|>hello", "<|asr|>"),
        ("hello <|endoftext|>", "<|endoftext|>"),
        ("<|zh|><|HAPPY|>hi", "<|zh|>"),
        ("[ASR] write", "[ASR]"),
        ("<en> hello", "<en>"),
        (" <Translate>hello", "<Translate>"),
        ("[laughter] hello", ""),
        ("if a<b and b>c", ""),
        ("[enough] said", ""),
        ("see <b>this</b>", ""),
    ],
)
def test_tags_are_found(text: str, tag: str) -> None:
    assert find_tag(text) == tag


def test_a_language_is_spelt_out() -> None:
    prompt = prompt_for("translation", MediaKind.audio, key="a", fields={"target_language": "de"})
    assert "German" in prompt


def test_what_is_missing_is_named() -> None:
    with pytest.raises(DataError, match=r"missing_field.*question"):
        prompt_for("qa", MediaKind.image, key="a", fields={})
    with pytest.raises(DataError, match=r"unknown_task.*known: asr"):
        prompt_for("aasr", MediaKind.audio, key="a", fields={})
