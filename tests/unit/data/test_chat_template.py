"""The chat format as text: golden dialogues of many shapes, and the template that is exported."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_train.data.chatml import CHAT_TEMPLATE, MediaPiece, TextPiece, render
from tests.unit.data.test_chatml import MEDIA, TOKENIZER

SPEECH_SYSTEM = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving"
    " auditory and visual inputs, as well as generating text and speech."
)
DEFAULT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
IMAGE = "<|vision_bos|><|IMAGE|><|vision_eos|>"
AUDIO = "<|audio_bos|><|AUDIO|><|audio_eos|>"
VIDEO = "<|vision_bos|><|VIDEO|><|vision_eos|>"


def user(*items: Any) -> dict[str, Any]:
    named = [{"type": "text", "text": item} if isinstance(item, str) else item for item in items]
    return {"role": "user", "content": named}


def medium(kind: str, member: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, kind: member, **more}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


# (dialogue, whether a reply is to follow, text)
GOLDEN: dict[str, tuple[list[dict[str, Any]], bool, str]] = {
    "one turn": (
        [user("apple?"), said("banana")],
        False,
        DEFAULT + "<|im_start|>user\napple?<|im_end|>\n<|im_start|>assistant\nbanana<|im_end|>\n",
    ),
    "strings": (
        [{"role": "user", "content": "apple?"}],
        True,
        DEFAULT + "<|im_start|>user\napple?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "own system": (
        [{"role": "system", "content": SPEECH_SYSTEM}, user("apple?")],
        True,
        (
            f"<|im_start|>system\n{SPEECH_SYSTEM}<|im_end|>\n"
            "<|im_start|>user\napple?<|im_end|>\n<|im_start|>assistant\n"
        ),
    ),
    "system in items": (
        [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, user("apple?")],
        False,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\napple?<|im_end|>\n",
    ),
    "empty system": (
        [{"role": "system", "content": ""}, user("apple?")],
        False,
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\napple?<|im_end|>\n",
    ),
    "many turns": (
        [user("apple?"), said("banana"), user("garden?"), said("yellow"), user("x")],
        True,
        DEFAULT + "<|im_start|>user\napple?<|im_end|>\n<|im_start|>assistant\nbanana<|im_end|>\n"
        "<|im_start|>user\ngarden?<|im_end|>\n<|im_start|>assistant\nyellow<|im_end|>\n"
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n",
    ),
    "two replies in a row": (
        [user("apple?"), said("banana"), said("garden")],
        False,
        DEFAULT + "<|im_start|>user\napple?<|im_end|>\n<|im_start|>assistant\nbanana<|im_end|>\n"
        "<|im_start|>assistant\ngarden<|im_end|>\n",
    ),
    "picture before text": (
        [user(medium("image", "0.png"), "What is it?"), said("apple")],
        False,
        DEFAULT + f"<|im_start|>user\n{IMAGE}What is it?<|im_end|>\n"
        "<|im_start|>assistant\napple<|im_end|>\n",
    ),
    "sound alone": (
        [user(medium("audio", "0.wav"))],
        True,
        DEFAULT + f"<|im_start|>user\n{AUDIO}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "clip, with or without its sound": (
        [user(medium("video", "0.mp4"), medium("video", "1.mp4", audio_in_video=False), "x")],
        True,
        DEFAULT + f"<|im_start|>user\n{VIDEO}{VIDEO}x<|im_end|>\n<|im_start|>assistant\n",
    ),
    "all media, text between": (
        [
            user("a ", medium("image", "0.png"), " b ", medium("audio", "1.wav"), "c\n"),
            said("x"),
            user(medium("video", "2.mp4")),
        ],
        True,
        DEFAULT + f"<|im_start|>user\na {IMAGE} b {AUDIO}c\n<|im_end|>\n"
        f"<|im_start|>assistant\nx<|im_end|>\n<|im_start|>user\n{VIDEO}<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "neighbouring texts are one": (
        [user("apple ", "banana")],
        False,
        DEFAULT + "<|im_start|>user\napple banana<|im_end|>\n",
    ),
    "nothing said": (
        [user(), said("")],
        False,
        DEFAULT + "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n",
    ),
    "spoken reply": (
        [
            user("apple?"),
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "banana"},
                    {"type": "speech", "speech": "0.wav"},
                ],
            },
        ],
        False,
        DEFAULT + "<|im_start|>user\napple?<|im_end|>\n<|im_start|>assistant\nbanana<|im_end|>\n",
    ),
    "weighted reply": (
        [user("apple?"), {"role": "assistant", "content": "banana", "weight": 0.5}],
        False,
        DEFAULT + "<|im_start|>user\napple?<|im_end|>\n<|im_start|>assistant\nbanana<|im_end|>\n",
    ),
}


def spelled(messages: list[dict[str, Any]], *, prompt: bool) -> str:
    """What training reads, with one placeholder for each medium."""
    marks = {"image": IMAGE, "audio": AUDIO, "video": VIDEO}
    return "".join(
        TOKENIZER.decode(p.ids) if isinstance(p, TextPiece) else marks[p.kind.name]
        for p in render(messages, TOKENIZER, add_generation_prompt=prompt)
    )


def templated(messages: list[dict[str, Any]], *, prompt: bool) -> str:
    text = TOKENIZER.apply_chat_template(
        messages, chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=prompt
    )
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    messages, prompt, text = GOLDEN[name]
    assert spelled(messages, prompt=prompt) == text
    assert templated(messages, prompt=prompt) == text


PLAIN = st.text(alphabet="ab {}%'\"\\<|>\n.", max_size=8)
ITEMS = st.lists(st.one_of(PLAIN.map(lambda t: {"type": "text", "text": t}), MEDIA), max_size=4)
TURNS = st.lists(
    st.tuples(st.sampled_from(["user", "assistant"]), st.one_of(PLAIN, ITEMS)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.none(), PLAIN), TURNS, st.booleans())
def test_the_template_renders_what_training_reads(
    system: str | None, turns: list[tuple[str, Any]], prompt: bool
) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    assert templated(messages, prompt=prompt) == spelled(messages, prompt=prompt)


def test_a_clip_keeps_its_own_choice_of_sound() -> None:
    messages = GOLDEN["clip, with or without its sound"][0]
    found = [p for p in render(messages, TOKENIZER) if isinstance(p, MediaPiece)]
    assert [p.audio_in_video for p in found] == [None, False]
