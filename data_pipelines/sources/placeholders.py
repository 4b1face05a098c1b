"""Dialogues whose texts hold `<image>`, `<video>`, `<audio>` where media of other columns go."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from data_pipelines.sources.base import KINDS, Gathered
from omni_train.config.errors import DataError
from omni_train.data.types import MediaKind

_PLACEHOLDER = re.compile("<(" + "|".join(kind.name for kind in KINDS) + ")>")


def as_list(value: Any) -> list[Any]:
    """Return a column of media as a list: absent is none, a single value is one."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def count(turns: list[dict[str, Any]]) -> dict[MediaKind, int]:
    """Return how often each placeholder comes in a dialogue."""
    names = [name for turn in turns for name in _PLACEHOLDER.findall(turn["content"])]
    return {kind: names.count(kind.name) for kind in KINDS}


def fill(
    turns: list[dict[str, Any]], media: Mapping[MediaKind, list[Any]], gathered: Gathered
) -> list[dict[str, Any]]:
    """Return the dialogue with each placeholder replaced by the next medium of its list.

    Args:
        turns: `role`, `content` as text, and whatever else.
        media: paths or bytes by kind.
        gathered: takes the media in the order of the text.

    Raises:
        DataError: `placeholder_mismatch` where text and lists do not agree, and those of
            `Gathered.add`.
    """
    for kind, found in count(turns).items():
        given = len(media.get(kind, []))
        if found != given:
            raise DataError(
                "placeholder_mismatch", f"{found} <{kind.name}> in the text, {given} in the list"
            )
    waiting = {kind: iter(media.get(kind, [])) for kind in KINDS}
    filled = []
    for turn in turns:
        parts = _PLACEHOLDER.split(turn["content"])
        if len(parts) == 1:
            filled.append(turn)
            continue
        content: list[dict[str, Any]] = []
        # A split by one group alternates: text, name, text, ..., text.
        for place, part in enumerate(parts):
            if place % 2:
                kind = MediaKind[part]
                member = gathered.add(kind, next(waiting[kind]))
                content.append({"type": part, part: member})
            elif part:
                content.append({"type": "text", "text": part})
        filled.append({**turn, "content": content})
    return filled
