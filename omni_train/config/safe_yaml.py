"""Refuses YAML that could do more than state values.

No aliases (a few lines of them expand to gigabytes), no tags, no key that Hydra would execute.
Reads text only; composing is load.py's.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from omni_train.config.errors import ConfigError, UnsafeError

# Keys by which Hydra's instantiate, or the standard library's logging setup, would call code.
TARGET_KEY = "_{}_".format("target")
EXECUTABLE_KEYS = frozenset({TARGET_KEY, "_args_", "_partial_", "_recursive_", "_convert_", "()"})
_MAX_BYTES = 1_000_000
_MAX_DEPTH = 50


def _refuse(where: str, value: object, rule: str, remedy: str) -> UnsafeError:
    return UnsafeError(key=where, value=value, rule=rule, remedy=remedy)


def check_yaml(text: str, where: str) -> None:
    """Return if `text` is plain YAML: scalars, lists and mappings.

    Args:
        text: of one file.
        where: its name, for the message.

    Raises:
        UnsafeError: it has an alias, a tag, a key that names code, or is too large.
        ConfigError: it is no YAML.
    """
    if len(text) > _MAX_BYTES:
        raise _refuse(where, len(text), f"more than {_MAX_BYTES} characters", "make it smaller")
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise _refuse(where, f"*{event.anchor}", "YAML aliases are refused", "write it out")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > _MAX_DEPTH:
                    raise _refuse(where, depth, f"nested deeper than {_MAX_DEPTH}", "flatten it")
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            tag = getattr(event, "tag", None)
            if tag is not None:
                raise _refuse(where, tag, "YAML tags are refused", "write the plain value")
            if isinstance(event, yaml.ScalarEvent) and event.value in EXECUTABLE_KEYS:
                raise _refuse(
                    where,
                    event.value,
                    "code is never chosen by a configuration",
                    "choose a member of an enum field instead",
                )
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            key=where, value="(text)", rule=f"no valid YAML: {reason}", remedy="mend the file"
        ) from None


def check_yaml_files(folders: Iterable[Path]) -> None:
    """Check every YAML file below the folders."""
    for folder in folders:
        for path in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
            check_yaml(path.read_text(encoding="utf-8"), str(path))


def load_yaml(path: Path) -> Any:
    """Return the plain values of one checked YAML file."""
    text = path.read_text(encoding="utf-8")
    check_yaml(text, str(path))
    return yaml.safe_load(text)
