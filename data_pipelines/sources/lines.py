"""Rows of a file: JSON Lines, read chunk by chunk, or one JSON list, held in memory.

A row's number is that of its line, or its place in the list, from 1. Empty lines are no rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from data_pipelines.sources.base import Row, Source, SourceOptions, parse_object
from omni_train.config.errors import DataError


class LinesSource(Source):
    """A source whose rows are the objects of one `.json` or `.jsonl` file.

    Args:
        options: where it lies and how it is read.
    """

    def __init__(self, options: SourceOptions) -> None:
        super().__init__(options)
        self._path = Path(options.path)
        self.root = Path(options.media_root) if options.media_root else self._path.parent
        self._listed: list[Any] | None = None
        self._starts: list[int] = []
        if self._path.suffix == ".json":
            self._listed = _read_list(self._path)
            self._num_rows = len(self._listed)
        else:
            self._starts, self._num_rows = _scan(self._path, options.rows_per_chunk)

    @property
    def num_rows(self) -> int:
        """Lines, or items of the list."""
        return self._num_rows

    def rows(self, chunk: int) -> Iterator[Row]:
        """Yield the rows of one chunk."""
        size = self.options.rows_per_chunk
        if self._listed is not None:
            for number in range(chunk * size, min((chunk + 1) * size, self._num_rows)):
                yield Row(self._path.name, number + 1, self._listed[number])
            return
        with self._path.open("rb") as file:
            file.seek(self._starts[chunk])
            for number, line in enumerate(islice(file, size), chunk * size + 1):
                if line.strip():
                    yield Row(self._path.name, number, line)

    def values(self, row: Row) -> dict[str, Any]:
        """Return a row's fields.

        Raises:
            DataError: `corrupt_json`.
        """
        if isinstance(row.data, bytes):
            return parse_object(row.data)
        if not isinstance(row.data, dict):
            raise DataError("corrupt_json", f"item {row.number} of the list is not an object")
        return dict(row.data)


def _scan(path: Path, stride: int) -> tuple[list[int], int]:
    """Return where every chunk starts, and how many lines there are."""
    starts, position, number = [], 0, 0
    with path.open("rb") as file:
        for line in file:
            if number % stride == 0:
                starts.append(position)
            position += len(line)
            number += 1
    return starts, number


def _read_list(path: Path) -> list[Any]:
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError("corrupt_json", f"{path} is no JSON: {error}") from error
    if not isinstance(values, list):
        raise DataError("corrupt_json", f"{path} is not a list of rows; use .jsonl for lines")
    return values
