"""The dotted keys of a schema, and the real key that a mistyped one most likely meant.

Reads dataclasses only: no Hydra, no YAML, no values.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any, Union


def strip_optional(hint: Any) -> Any:
    """Return X for `X | None`, any other type as it is."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        inner = [arm for arm in typing.get_args(hint) if arm is not type(None)]
        if len(inner) == 1:
            return inner[0]
    return hint


def field_types(schema: type) -> dict[str, Any]:
    """Return the type of each field of a dataclass, `X | None` reduced to X."""
    hints = typing.get_type_hints(schema)
    return {f.name: strip_optional(hints[f.name]) for f in dataclasses.fields(schema)}


def dotted_keys(schema: type, prefix: str = "") -> dict[str, Any]:
    """Return every dotted key of `schema`, sections included, with its type.

    A mapping of sections gives its keys with `*` for the name: `data.sources.*.path`.
    """
    keys: dict[str, Any] = {}
    for name, hint in field_types(schema).items():
        key = f"{prefix}{name}"
        keys[key] = hint
        if dataclasses.is_dataclass(hint):
            keys.update(dotted_keys(typing.cast("type", hint), f"{key}."))
        elif typing.get_origin(hint) is dict and dataclasses.is_dataclass(typing.get_args(hint)[1]):
            keys.update(dotted_keys(typing.get_args(hint)[1], f"{key}.*."))
    return keys


def allows_key(schema: type, key: str) -> bool:
    """Say whether `key` is a field of `schema`, or lies inside one of its mappings or lists."""
    hint: Any = schema
    for part in key.split("."):
        hint = strip_optional(hint)
        if dataclasses.is_dataclass(hint):
            types_of = field_types(typing.cast("type", hint))
            if part not in types_of:
                return False
            hint = types_of[part]
        elif typing.get_origin(hint) is dict:
            hint = typing.get_args(hint)[1]
        elif typing.get_origin(hint) is list:
            hint = typing.get_args(hint)[0]
        else:
            return hint is Any
    return True


def _likeness(given: str, real: str) -> float:
    """Return how alike two dotted keys are; the last name counts as much as the whole path."""
    ratio = difflib.SequenceMatcher(None, given, real, autojunk=False).ratio()
    last_given, last_real = given.rpartition(".")[2], real.rpartition(".")[2]
    last = difflib.SequenceMatcher(None, last_given, last_real, autojunk=False).ratio()
    return 0.5 * ratio + 0.5 * last


def _with_names_of(given: str, key: str) -> str:
    names = given.split(".")
    parts = enumerate(key.split("."))
    return ".".join(names[at] if part == "*" and at < len(names) else part for at, part in parts)


def nearest_key(given: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the real key most like the mistyped `given`; None where nothing comes near.

    The last name counts as much as the whole path, so that a right name in a wrong or absent
    section is found too. In a mapping, `*` stands for the name that was given there.
    """
    folded = given.lower().replace("-", "_")
    scored = [
        (_likeness(folded, key.lower()), -len(key), key)
        for key in (_with_names_of(given, key) for key in known)
    ]
    best = max(scored, default=(0.0, 0, ""))
    return best[2] if best[0] >= cutoff else None
