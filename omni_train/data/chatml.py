"""The chat format of Qwen2.5-Omni: the only place that knows how a dialogue becomes ids.

Each turn is `<|im_start|>{role}\\n{content}<|im_end|>\\n` (RECIPE.md section 8). Media are left as
pieces that `encode.py` fills with their span; nothing here touches media bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from transformers import PreTrainedTokenizerFast

from omni_train.config.errors import DataError
from omni_train.data.tokenizer import CHAT_TOKENS, encode_text
from omni_train.data.types import MediaKind
from omni_train.speech.codec import CODES_SUFFIX

DEFAULT_SYSTEM = "You are a helpful assistant."
# The same format for transformers' `apply_chat_template`, as an exported tokenizer carries it. A
# medium is one placeholder between its marks, which transformers' processor then repeats; the marks
# of a clip's sound are the processor's too.
CHAT_TEMPLATE = (
    "{%- for turn in messages %}"
    "{%- if loop.first and turn['role'] != 'system' %}"
    f"{{{{- '<|im_start|>system\\n{DEFAULT_SYSTEM}<|im_end|>\\n' }}}}"
    "{%- endif %}"
    "{{- '<|im_start|>' + turn['role'] + '\\n' }}"
    "{%- if turn['content'] is string %}{{- turn['content'] }}"
    "{%- else %}{%- for item in turn['content'] %}"
    "{%- if item['type'] == 'text' %}{{- item['text'] }}"
    "{%- elif item['type'] == 'image' %}{{- '<|vision_bos|><|IMAGE|><|vision_eos|>' }}"
    "{%- elif item['type'] == 'audio' %}{{- '<|audio_bos|><|AUDIO|><|audio_eos|>' }}"
    "{%- elif item['type'] == 'video' %}{{- '<|vision_bos|><|VIDEO|><|vision_eos|>' }}"
    "{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
ROLES = ("system", "user", "assistant")
# Type of the item that says how a turn is spoken; it has no place among the ids.
SPEECH = "speech"


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Ids of text and chat tokens; `supervised` where the loss reads them, times `weight`."""

    ids: list[int]
    supervised: bool
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class MediaPiece:
    """A medium at its place in the dialogue.

    Args:
        kind: image, audio or video.
        member: name inside the sample, such as `0.wav`; the first picture of a clip that is given
            as pictures.
        audio_in_video: for a clip, whether its sound is read along; None means where it has any.
        pictures: members of a clip given as pictures, one for each frame; else empty.
        fps: their rate, where no times are given.
        times_s: time of each picture in seconds, where the rate is not steady.
        sound: member that holds the sound of a clip given as pictures; empty for a silent one.
    """

    kind: MediaKind
    member: str
    audio_in_video: bool | None = None
    pictures: tuple[str, ...] = ()
    fps: float = 0.0
    times_s: tuple[float, ...] = ()
    sound: str = ""

    @property
    def members(self) -> tuple[str, ...]:
        """Every member that the medium is read from, in the order in which the index holds them."""
        names = self.pictures or (self.member,)
        return (*names, self.sound) if self.sound else names


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    *,
    add_generation_prompt: bool = False,
) -> list[TextPiece | MediaPiece]:
    """Turn a dialogue into text pieces and media pieces, in order.

    Supervised are the content of every assistant turn and its `<|im_end|>`. What is supervised is
    tokenised apart from its prompt, as it is when the model generates it. An assistant turn may
    have a `weight`, by which the loss of its tokens is multiplied; with 0 it is context alone.

    Args:
        messages: turns with `role` and `content`, a string or a list of items
            `{"type": "text"|"image"|"audio"|"video", <type>: value}`. A video may be a list of
            pictures, with `fps` or `times_s` and, if it has sound, `audio`. A spoken turn has an
            item `{"type": "speech", "speech": member}` behind its text, which gives no id here.
        add_generation_prompt: end in `<|im_start|>assistant\\n`.

    Raises:
        DataError: `bad_messages` where a turn does not have this form.
    """
    if not messages or not all(isinstance(turn, Mapping) for turn in messages):
        raise DataError("bad_messages", "a dialogue is a non-empty list of turns")
    start = tokenizer.convert_tokens_to_ids(CHAT_TOKENS["im_start"])
    end = tokenizer.convert_tokens_to_ids(CHAT_TOKENS["im_end"])
    pieces: list[TextPiece | MediaPiece] = []
    turns = list(messages)
    if turns[0].get("role") != "system":
        turns.insert(0, {"role": "system", "content": DEFAULT_SYSTEM})
    newline = encode_text(tokenizer, "\n")
    for number, turn in enumerate(turns):
        role = turn.get("role")
        if role not in ROLES or (role == "system" and number > 0):
            raise DataError("bad_messages", f"turn {number} has role {role!r}")
        weight = _weight_of(turn, number)
        supervised = weight > 0
        header = f"{role}\n"
        pieces.append(TextPiece([start], supervised=False))
        if role == "assistant":
            pieces.append(TextPiece(encode_text(tokenizer, header), supervised=False))
            header = ""
        for item in _items(turn.get("content"), number):
            if isinstance(item, str):
                pieces.append(TextPiece(encode_text(tokenizer, header + item), supervised, weight))
                header = ""
                continue
            if header:
                pieces.append(TextPiece(encode_text(tokenizer, header), supervised=False))
                header = ""
            pieces.append(item)
        if header:
            pieces.append(TextPiece(encode_text(tokenizer, header), supervised=False))
        pieces.append(TextPiece([end], supervised, weight))
        pieces.append(TextPiece(newline, supervised=False))
    if add_generation_prompt:
        pieces.append(TextPiece([start, *encode_text(tokenizer, "assistant\n")], supervised=False))
    return pieces


def _weight_of(turn: Mapping[str, Any], number: int) -> float:
    """Factor of the loss of a turn; 0 for turns that are not the assistant's."""
    weight = turn.get("weight", 1.0)
    if "weight" in turn and turn.get("role") != "assistant":
        raise DataError("bad_messages", f"turn {number} has a weight and is not the assistant's")
    if not _is_finite(weight) or weight < 0:
        raise DataError("bad_messages", f"turn {number} has weight {weight!r}, not a number >= 0")
    return float(weight) if turn.get("role") == "assistant" else 0.0


def _items(content: Any, number: int) -> list[str | MediaPiece]:
    """Content as strings and media pieces; neighbouring texts are joined, so tokenised as one.

    Speech stands between what is spoken and what comes next, so it ends a text.
    """
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise DataError("bad_messages", f"content of turn {number} is neither text nor a list")
    items: list[str | MediaPiece] = []
    spoken = False
    for entry in content:
        kind = entry.get("type") if isinstance(entry, Mapping) else None
        value = entry.get(kind) if isinstance(kind, str) else None
        if kind == "video" and isinstance(value, list):
            items.append(_clip_of_pictures(entry, number))
            continue
        if not isinstance(value, str):
            raise DataError("bad_messages", f"turn {number} has an item without a value: {entry!r}")
        if kind == "text":
            if items and isinstance(items[-1], str) and not spoken:
                items[-1] += value
            else:
                items.append(value)
            spoken = False
        elif kind == SPEECH:
            spoken = True
        elif isinstance(kind, str) and kind in MediaKind.__members__:
            items.append(MediaPiece(MediaKind[kind], value, entry.get("audio_in_video")))
        else:
            raise DataError("bad_messages", f"turn {number} has an item of type {kind!r}")
    return items


def _clip_of_pictures(entry: Mapping[str, Any], number: int) -> MediaPiece:
    """Return the piece of a clip whose frames are members of their own."""
    names: Any = entry["video"]
    fps: Any = entry.get("fps")
    times_s: Any = entry.get("times_s")
    sound = entry.get("audio", "")
    place = f"turn {number} has a clip of pictures"
    if not names or not all(isinstance(name, str) for name in names):
        raise DataError("bad_messages", f"{place} that is no list of members: {names!r}")
    if not isinstance(sound, str):
        raise DataError("bad_messages", f"{place} whose sound is {sound!r}, not a member")
    if (fps is None) == (times_s is None):
        raise DataError("bad_messages", f"{place} that needs one of fps and times_s")
    numbers = [fps] if times_s is None else times_s
    if not isinstance(numbers, list) or not all(_is_finite(value) for value in numbers):
        raise DataError("bad_messages", f"{place} with fps={fps!r}, times_s={times_s!r}")
    if times_s is None:
        if fps <= 0:
            raise DataError("bad_messages", f"{place} at {fps} frames per second")
        times_s = []
    elif len(times_s) != len(names) or times_s[0] < 0 or times_s != sorted(times_s):
        raise DataError("bad_messages", f"{place}: times_s must rise, one for each picture")
    return MediaPiece(
        MediaKind.video,
        names[0],
        entry.get("audio_in_video"),
        pictures=tuple(names),
        fps=float(fps or 0.0),
        times_s=tuple(float(time) for time in times_s),
        sound=sound,
    )


def _is_finite(value: object) -> bool:
    # bool is an int in Python; true frames per second are a mistake.
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def count_text_tokens(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast
) -> tuple[int, int]:
    """Ids outside media spans, and how many of them are supervised."""
    texts = [piece for piece in render(messages, tokenizer) if isinstance(piece, TextPiece)]
    return sum(len(p.ids) for p in texts), sum(len(p.ids) for p in texts if p.supervised)


def media_pieces(messages: Sequence[Mapping[str, Any]]) -> list[MediaPiece]:
    """Every medium of a dialogue, in the order in which the dialogue names them."""
    pieces: list[MediaPiece] = []
    for number, turn in enumerate(messages):
        items = _items(turn.get("content"), number)
        pieces += [item for item in items if isinstance(item, MediaPiece)]
    return pieces


def spoken_member(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the member that a dialogue names as the speech of its last turn: a sound, or codes.

    Raises:
        DataError: `bad_messages` where speech stands anywhere but behind the text of a last turn
            of the assistant, or names no member.
    """
    places = [
        (number, at, entry.get(SPEECH))
        for number, turn in enumerate(messages)
        if isinstance(turn, Mapping) and isinstance(turn.get("content"), list)
        for at, entry in enumerate(turn["content"])
        if isinstance(entry, Mapping) and entry.get("type") == SPEECH
    ]
    if not places:
        return None
    number, at, member = places[0]
    last = len(messages) - 1
    content: Any = messages[last].get("content")
    if (
        len(places) > 1
        or number != last
        or messages[last].get("role") != "assistant"
        or len(content) != 2
        or at != 1
        or not isinstance(content[0], Mapping)
        or content[0].get("type") != "text"
    ):
        raise DataError(
            "bad_messages", "speech belongs behind the one text of a last turn of the assistant"
        )
    if not isinstance(member, str) or not member:
        raise DataError("bad_messages", f"the speech of turn {number} names no member: {member!r}")
    return member


def codes_member(member: str) -> str:
    """Return the member with the codes of a sound: `0.codes.npy` for `0.wav`, or for itself."""
    if member.endswith(CODES_SUFFIX):
        return member
    return PurePosixPath(member).stem + CODES_SUFFIX


def split_reply(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    """Split a dialogue into its prompt and the text of the last assistant turn.

    Raises:
        DataError: `no_reply` where the last turn is not a text of the assistant.
    """
    if not messages or messages[-1].get("role") != "assistant":
        raise DataError("no_reply", "the dialogue does not end in an assistant turn")
    items = _items(messages[-1].get("content"), len(messages) - 1)
    if len(items) != 1 or not isinstance(items[0], str):
        raise DataError("no_reply", "the last assistant turn is not plain text")
    return list(messages[:-1]), items[0]
