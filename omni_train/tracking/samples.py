"""Samples that a run kept beside its events, as tables for its views.

    `sample` events (replies of the Thinker) and `audio` events (speech of the Talker), files
        -> read_tables -> {title: SampleTable}; a cell is a text, a number, a file, or nothing

A file counts only if it lies in the run directory and is small enough to be shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 4_000_000

Cell = str | float | Path | None


class MediaType(Enum):
    """What a file is shown as."""

    audio = (".wav", ".flac", ".mp3")
    image = (".png", ".jpg", ".jpeg", ".webp")
    video = (".mp4", ".webm")


@dataclass(frozen=True, slots=True)
class SampleTable:
    """Samples of one task.

    Args:
        columns: names.
        rows: cells, one for each column.
    """

    columns: list[str]
    rows: list[list[Cell]]


def media_type(path: Path) -> MediaType | None:
    """Return what a file is shown as; None where no view shows such files."""
    return next((kind for kind in MediaType if path.suffix.lower() in kind.value), None)


def read_tables(run_dir: Path, events: Sequence[dict[str, Any]]) -> dict[str, SampleTable]:
    """Return the tables by title: `samples/TASK`, `speech/TASK`.

    Args:
        run_dir: of the run.
        events: of the run; of a sample that was scored again the last one counts.
    """
    found: dict[str, dict[str, dict[str, Cell]]] = {}
    for event in events:
        if event["kind"] == "sample":
            row: dict[str, Cell] = {"key": str(event["key"]), "prompt": str(event["prompt"])}
            row |= _media(run_dir, event["media"])
            row |= {name: str(event[name]) for name in ("reference", "prediction")}
            row["score"] = _number(event["score"])
            found.setdefault(f"samples/{event['task']}", {})[str(event["key"])] = row
        elif event["kind"] == "audio":
            row = {name: str(event[name]) for name in ("key", "speaker", "text", "heard")}
            row |= {"wer": _number(event["wer"]), **_media(run_dir, [event["wave"]])}
            found.setdefault(f"speech/{event['task']}", {})[str(event["wave"])] = row
    return {title: _table(list(rows.values())) for title, rows in found.items()}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _media(run_dir: Path, names: Sequence[str]) -> dict[str, Cell]:
    """Files by the name of their column: image, audio, image 2."""
    found: dict[str, Cell] = {}
    root = run_dir.resolve()
    for name in names:
        path = (root / name).resolve()
        kind = media_type(path)
        if kind is None or not path.is_relative_to(root) or not path.is_file():
            continue
        if path.stat().st_size <= MAX_FILE_BYTES:
            number = 1 + sum(column.partition(" ")[0] == kind.name for column in found)
            found[kind.name if number == 1 else f"{kind.name} {number}"] = path
    return found


def _table(rows: list[dict[str, Cell]]) -> SampleTable:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return SampleTable(columns, [[row.get(name) for name in columns] for row in rows])
