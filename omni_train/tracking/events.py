"""Append-only JSONL files: `events.jsonl`, the truth of a run, and `ledger.jsonl`.

One JSON object a line, flushed at once. A process that is killed can leave one torn last line; the
reader passes over it and the next writer starts a fresh line. Nothing here interprets events.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def jsonable(value: Any) -> Any:
    """Return `value` with non-finite floats as the strings `nan`, `inf`, `-inf`.

    JSON has no such numbers, and a reader's `float()` takes the strings back.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return value


class JsonlWriter:
    """Appends JSON objects to a file, one a line; a line is on its way to the disk on return.

    Threads may share it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and not _ends_with_newline(path)
        self._lock = threading.Lock()
        self._file = path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")
            self._file.flush()

    def write(self, record: dict[str, Any]) -> None:
        """Append one object."""
        text = json.dumps(jsonable(record), ensure_ascii=False, allow_nan=False)
        with self._lock:
            self._file.write(text + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file, without torn lines; nothing where there is no file.

    A line can be torn in the middle of the file too, where a killed run was resumed.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        yield from _objects(file)


def read_new(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Return the objects of the whole lines after `offset` bytes, and the offset to go on from."""
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        lines = file.read().rpartition(b"\n")[0]
    if not lines:
        return [], offset
    return list(_objects(lines.split(b"\n"))), offset + len(lines) + 1


def _objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Return the `step` events in step order, the last one of each step.

    A resumed run repeats the steps after its checkpoint; what counts is what came last.
    """
    steps = {int(e["step"]): e for e in read_jsonl(path) if e.get("kind") == "step"}
    return [steps[number] for number in sorted(steps)]
