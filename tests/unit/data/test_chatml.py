"""The chat format: golden renderings, what is supervised, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_train.config.errors import ConfigError, DataError
from omni_train.data.chatml import (
    DEFAULT_SYSTEM,
    MediaPiece,
    TextPiece,
    count_text_tokens,
    media_pieces,
    render,
    split_reply,
)
from omni_train.data.tokenizer import (
    encode_text,
    load_tokenizer,
    special_tokens,
    tokenizer_hash,
    train_tokenizer,
)

TOKENIZER = train_tokenizer(
    [DEFAULT_SYSTEM, "system user assistant", "apple banana garden", "What do you hear?"] * 4,
    vocab_size=420,
)


def spell(pieces: list[TextPiece | MediaPiece]) -> str:
    return "".join(
        TOKENIZER.decode(p.ids) if isinstance(p, TextPiece) else f"[{p.kind.name} {p.member}]"
        for p in pieces
    )


def test_golden_dialogue_with_media() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "audio", "audio": "0.wav"},
                {"type": "text", "text": "What do "},
                {"type": "text", "text": "you hear?"},
            ],
        },
        {"role": "assistant", "content": "apple banana"},
    ]
    pieces = render(messages, TOKENIZER)
    assert spell(pieces) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n[audio 0.wav]What do you hear?<|im_end|>\n"
        "<|im_start|>assistant\napple banana<|im_end|>\n"
    )
    supervised = [p for p in pieces if isinstance(p, TextPiece) and p.supervised]
    assert spell(list(supervised)) == "apple banana<|im_end|>"


def test_default_system_turn_and_generation_prompt() -> None:
    prompt, reply = split_reply(
        [{"role": "user", "content": "apple"}, {"role": "assistant", "content": "banana"}]
    )
    assert reply == "banana"
    assert spell(render(prompt, TOKENIZER, add_generation_prompt=True)) == (
        f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"
        "<|im_start|>user\napple<|im_end|>\n<|im_start|>assistant\n"
    )


def test_text_that_spells_a_special_token_stays_text() -> None:
    tokens = special_tokens(TOKENIZER)
    pieces = render([{"role": "user", "content": "say <|im_end|> or <|AUDIO|>"}], TOKENIZER)
    ids = [i for p in pieces if isinstance(p, TextPiece) for i in p.ids]
    assert ids.count(tokens.im_end) == 2  # system and user turn, not the text
    assert tokens.audio not in ids


TEXTS = st.one_of(
    st.sampled_from(["apple", "banana garden", "", " ", "x\ny", "<|im_end|>", "assistant\n"]),
    st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12),
)
MEDIA = st.sampled_from(
    [
        {"type": "image", "image": "0.png"},
        {"type": "audio", "audio": "1.wav"},
        {"type": "video", "video": "2.mp4"},
        {"type": "video", "video": "3.mp4", "audio_in_video": False},
    ]
)
ITEMS = st.lists(st.one_of(TEXTS.map(lambda t: {"type": "text", "text": t}), MEDIA), max_size=4)
CONTENT = st.one_of(TEXTS, ITEMS)
WEIGHTS = st.sampled_from([None, 0, 0.25, 1, 3.5])


@st.composite
def dialogues(draw: st.DrawFn) -> list[dict[str, object]]:
    """Turns in any order that the format has, with media anywhere, replies included."""
    messages: list[dict[str, object]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(CONTENT)})
    for role in draw(st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=6)):
        turn: dict[str, object] = {"role": role, "content": draw(CONTENT)}
        weight = draw(WEIGHTS)
        if role == "assistant" and weight is not None:
            turn["weight"] = weight
        messages.append(turn)
    return messages


def texts_of(turn: dict[str, object]) -> list[str]:
    """Texts of a turn as the loss sees them: neighbours joined, media between them."""
    content = turn["content"]
    if isinstance(content, str):
        return [content]
    texts, joined = [], None
    for item in [*content, None]:  # type: ignore[misc]
        if item is not None and item["type"] == "text":
            joined = item["text"] if joined is None else joined + item["text"]
        elif joined is not None:
            texts.append(joined)
            joined = None
    return texts


@settings(max_examples=200, deadline=None)
@given(dialogues())
def test_exactly_the_assistant_spans_are_supervised(messages: list[dict[str, object]]) -> None:
    pieces = [p for p in render(messages, TOKENIZER) if isinstance(p, TextPiece)]
    supervised = [(i, p.weight) for p in pieces if p.supervised for i in p.ids]
    end = special_tokens(TOKENIZER).im_end
    wanted = []
    for turn in messages:
        weight = turn.get("weight", 1) if turn["role"] == "assistant" else 0
        ids = [i for text in texts_of(turn) for i in encode_text(TOKENIZER, text)]
        wanted += [(i, weight) for i in [*ids, end] if weight]
    assert supervised == wanted
    total = sum(len(p.ids) for p in pieces)
    assert count_text_tokens(messages, TOKENIZER) == (total, len(wanted))
    # Every end of a turn is there, whoever supervises it, and no text can forge one.
    turns = len(messages) + (messages[0]["role"] != "system")
    assert [i for p in pieces for i in p.ids].count(end) == turns


def test_rendering_a_prompt_and_its_reply_gives_the_training_ids() -> None:
    messages = [{"role": "user", "content": "apple"}, {"role": "assistant", "content": "banana"}]
    prompt, reply = split_reply(messages)
    start = render(prompt, TOKENIZER, add_generation_prompt=True)
    ids = [i for p in start if isinstance(p, TextPiece) for i in p.ids]
    whole = [i for p in render(messages, TOKENIZER) if isinstance(p, TextPiece) for i in p.ids]
    assert whole[: len(ids)] == ids
    assert whole[len(ids) :][: len(encode_text(TOKENIZER, reply))] == encode_text(TOKENIZER, reply)


def test_media_pieces_in_order() -> None:
    messages = [
        {"role": "user", "content": [{"type": "image", "image": "0.png"}]},
        {"role": "assistant", "content": "apple"},
        {"role": "user", "content": [{"type": "video", "video": "1.mp4", "audio_in_video": False}]},
    ]
    assert [(p.kind.name, p.member) for p in media_pieces(messages)] == [
        ("image", "0.png"),
        ("video", "1.mp4"),
    ]
    pieces = [p for p in render(messages, TOKENIZER) if isinstance(p, MediaPiece)]
    assert pieces[1].audio_in_video is False


@pytest.mark.parametrize(
    "messages",
    [
        [],
        ["text"],
        [{"role": "robot", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "system", "content": "late"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": [{"type": "smell", "smell": "0.bin"}]}],
        [{"role": "user", "content": [{"type": "image"}]}],
        [{"role": "user", "content": "x", "weight": 1.0}],
        [{"role": "assistant", "content": "x", "weight": -1.0}],
        [{"role": "assistant", "content": "x", "weight": True}],
        [{"role": "assistant", "content": "x", "weight": float("nan")}],
    ],
)
def test_bad_messages_are_refused(messages: list[dict[str, object]]) -> None:
    with pytest.raises(DataError, match="bad_messages"):
        render(messages, TOKENIZER)


def test_tokenizer_round_trip(tmp_path) -> None:  # type: ignore[no-untyped-def]
    TOKENIZER.save_pretrained(tmp_path)
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(TOKENIZER)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="at least 300"):
        train_tokenizer(["a"], vocab_size=100)
