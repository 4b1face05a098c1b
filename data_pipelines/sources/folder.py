"""A folder of media, each with a text beside it: `a.wav` with `a.txt`, `a.json`, or both.

The `.txt` is the target text. The `.json` holds fields: `text`, `task`, `language`, `speaker`,
`segments` and any other; one that Whisper wrote will do. Subtitles, `a.srt` or `a.vtt`, are the
segments, and the text too where nothing else is. Every other file is rejected by name, hidden ones
aside. Files come in the order of their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipelines.sources.base import (
    Draft,
    Row,
    Source,
    SourceOptions,
    make_pair,
    parse_object,
)
from data_pipelines.sources.segments import SUBTITLES, read_subtitles
from omni_train.config.errors import DataError
from omni_train.data.media import KIND_OF_SUFFIX

_SIDECARS = (".txt", ".json", *SUBTITLES)


class FolderSource(Source):
    """One sample per media file, in subfolders too.

    Args:
        options: where it lies and how it is read.
    """

    def __init__(self, options: SourceOptions) -> None:
        super().__init__(options)
        self._root = Path(options.path)
        if not self._root.is_dir():
            raise FileNotFoundError(f"no directory {self._root}")
        paths = [path.relative_to(self._root) for path in self._root.rglob("*") if path.is_file()]
        shown = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
        self._files = {path.as_posix() for path in shown}
        media = {str(PurePosixPath(name).with_suffix("")) for name in self._files if _kind(name)}
        self._names = sorted(name for name in self._files if not _beside(name, media))

    @property
    def num_rows(self) -> int:
        """Media files, and files that belong to none."""
        return len(self._names)

    def rows(self, chunk: int) -> Iterator[Row]:
        """Yield the rows of one chunk."""
        size = self.options.rows_per_chunk
        for number, name in enumerate(self._names[chunk * size : (chunk + 1) * size], chunk * size):
            yield Row(name, number + 1, name)

    def draft(self, row: Row) -> Draft:
        """Return the sample of a media file."""
        name = PurePosixPath(row.data)
        kind = _kind(row.data)
        if name.suffix.lower() in _SIDECARS:
            raise DataError("missing_media", f"{name} has no media file beside it")
        if kind is None:
            raise DataError("unknown_media", f"{name} is none of {', '.join(KIND_OF_SUFFIX)}")
        values: dict[str, Any] = {}
        if (json_name := str(name.with_suffix(".json"))) in self._files:
            values = parse_object((self._root / json_name).read_bytes())
        if "messages" in values:
            raise DataError("bad_messages", "a sidecar has no dialogue; use the jsonl format")
        if (text_name := str(name.with_suffix(".txt"))) in self._files:
            text = _read_text(self._root / text_name)
            column = self.options.column("text")
            if values.setdefault(column, text) != text:
                raise DataError("two_texts", f"{text_name} and {json_name} have different texts")
        self._add_segments(name, values)
        return make_pair(self, row, {**values, self.options.column(kind): row.data}, self._root)

    def _add_segments(self, media: PurePosixPath, values: dict[str, Any]) -> None:
        """Add the subtitles beside a media file, of which it has one kind at most."""
        column, text = self.options.column("segments"), self.options.column("text")
        names = [str(media.with_suffix(suffix)) for suffix in SUBTITLES]
        found = [name for name in names if name in self._files]
        if len(found) + (values.get(column) is not None) > 1:
            raise DataError("two_segments", f"{media} has segments in more than one file")
        if found:
            values[column] = read_subtitles(self._root / found[0])
        # Whisper begins its texts with a space.
        if values.get(column) is not None and isinstance(values.get(text), str):
            values[text] = values[text].strip()


def _kind(name: str) -> str | None:
    kind = KIND_OF_SUFFIX.get(PurePosixPath(name).suffix.lower())
    return kind.name if kind else None


def _beside(name: str, media: set[str]) -> bool:
    path = PurePosixPath(name)
    return path.suffix in _SIDECARS and str(path.with_suffix("")) in media


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError("bad_text", f"{path.name} is not UTF-8: {error}") from error
