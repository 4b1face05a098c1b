"""Samples that the plan leaves out by name: `skip.json` in a set's directory.

    {"schema_version": 1, "skip": {"shard-000000.tar": {"<key>": "<reason>"}}}

Done here: reading and writing the list. Not done here: filling it (data_pipelines/fix.py) and
leaving the samples out (the loader, before planning). The shards themselves are never edited.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omni_train.config.errors import DataError
from omni_train.data.index import write_atomically
from omni_train.data.stores import Root, open_root

SKIP_NAME = "skip.json"
SCHEMA_VERSION = 1


def read_skip_list(root: str | Path | Root) -> dict[str, dict[str, str]]:
    """Return shard name -> sample key -> reason; empty where the set, local or remote, has no list.

    Raises:
        DataError: `corrupt_skip_list` where the file is not what `write_skip_list` writes, and what
            `Store.read_all` finds but a missing file. It is never taken for an empty list: what a
            user left out must stay out.
    """
    opened = open_root(root)
    path = f"{SKIP_NAME} of {opened.location}"
    try:
        record = json.loads(opened.read_all(SKIP_NAME))
    except DataError as error:
        if error.reason == "missing_shard":
            return {}
        raise
    except (ValueError, RecursionError) as error:
        raise DataError("corrupt_skip_list", f"{path} is no JSON: {error}") from error
    version = record.get("schema_version") if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:
        raise DataError(
            "corrupt_skip_list", f"{path} has version {version!r}, {SCHEMA_VERSION} is read here"
        )
    skip = record.get("skip")
    if not isinstance(skip, dict) or not all(_is_reasons(keys) for keys in skip.values()):
        raise DataError("corrupt_skip_list", f"{path}: skip is no map of shards to keys to reasons")
    return skip


def write_skip_list(
    root: str | Path, skip: dict[str, dict[str, str]], *, name: str = SKIP_NAME
) -> Path:
    """Write the list into a directory, sorted, whole or not at all; return its path.

    Under another name it takes no effect until it is renamed or copied.
    """
    path = Path(root) / name
    ordered = {shard: dict(sorted(skip[shard].items())) for shard in sorted(skip) if skip[shard]}
    record = {"schema_version": SCHEMA_VERSION, "skip": ordered}
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
    return path


def _is_reasons(keys: Any) -> bool:
    return isinstance(keys, dict) and all(isinstance(reason, str) for reason in keys.values())
