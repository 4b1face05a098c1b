"""What every source gives: numbered rows that become drafts of samples, or a reason why not.

    rows    source -> Row      numbered from 1, cheap to start anywhere
    draft   Row -> Draft       the record, and where its media lie; no media byte is read

A row that cannot be used is a `Rejected` with file, row and reason, never an exception, and never
a shorter sample. A field that has no meaning here stays in the record, under `extra`.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from data_pipelines.prompts import prompt_for
from data_pipelines.sources.segments import as_segments
from omni_train.config.errors import DataError
from omni_train.data.chatml import split_reply
from omni_train.data.media import KIND_OF_SUFFIX
from omni_train.data.split import SPLIT_TASK, check_reply, joint_of, read_segments
from omni_train.data.types import MediaKind

# Descriptive fields of a record that the index has columns for.
FACTS = ("task", "language", "speaker", "source")
# What the wording of a prompt may name.
PROMPT_FIELDS = ("question", "phrase", "target_language")
KINDS = tuple(MediaKind)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# First bytes -> suffix, for media that come without a name.
_MAGICS = (
    *((b"RIFF", ".wav"), (b"fLaC", ".flac"), (b"ID3", ".mp3"), (b"\xff\xfb", ".mp3")),
    *((b"\x89PNG", ".png"), (b"\xff\xd8\xff", ".jpg"), (b"\x1a\x45\xdf\xa3", ".mkv")),
)


class SourceFormat(Enum):
    """Formats that `prepare` reads."""

    jsonl = "jsonl"
    llamafactory = "llamafactory"
    ms_swift = "ms_swift"
    hf_datasets = "hf_datasets"
    folder = "folder"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOptions:
    """Where a source lies and how it is read.

    Args:
        path: file or directory.
        format: how it is laid out.
        name: of the set; first part of every key, and the record's `source` where it has none.
        rows_per_chunk: rows that are read together.
        task, language: of every sample that does not say its own.
        columns: (what it means, the source's own name), for names other than the usual ones.
        split: of a dataset that has several.
        media_root: directory that relative paths start from; empty means that of the source.
    """

    path: str
    format: SourceFormat
    name: str
    rows_per_chunk: int
    task: str = ""
    language: str = ""
    columns: tuple[tuple[str, str], ...] = ()
    split: str = ""
    media_root: str = ""

    def column(self, role: str, default: str | None = None) -> str:
        """Return the source's own name of a column or tag."""
        return dict(self.columns).get(role, role if default is None else default)


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a source as it was read.

    Args:
        file: name of the file inside the source, for messages and for the record's origin.
        number: of the row in that file, from 1.
        data: bytes of a line, or parsed values.
    """

    file: str
    number: int
    data: Any


@dataclass(slots=True)
class Draft:
    """A sample whose media are still to be read, by member name: a path, or the bytes."""

    file: str
    row: int
    key: str
    record: dict[str, Any]
    media: dict[str, Path | bytes]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that gives no sample. `reason` is a short code, `detail` says what was found."""

    file: str
    row: int
    reason: str
    detail: str


class Source(ABC):
    """A source that is read chunk by chunk, in any order and by several processes.

    Args:
        options: where it lies and how it is read.
    """

    def __init__(self, options: SourceOptions) -> None:
        self.options = options

    @property
    def num_chunks(self) -> int:
        """Chunks of `rows_per_chunk` rows; the last may be shorter."""
        return -(-self.num_rows // self.options.rows_per_chunk)

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Rows of the whole source."""

    @abstractmethod
    def rows(self, chunk: int) -> Iterator[Row]:
        """Yield the rows of one chunk."""

    @abstractmethod
    def draft(self, row: Row) -> Draft:
        """Return the sample of a row.

        Raises:
            DataError: with the reason why there is none.
        """

    def read(self, chunk: int) -> Iterator[Draft | Rejected]:
        """Yield a draft or a rejection for every row of a chunk, in order."""
        for row in self.rows(chunk):
            try:
                yield self.draft(row)
            except DataError as error:
                yield Rejected(row.file, row.number, error.reason, error.detail)

    def digest(self, chunk: int) -> str:
        """Hash of all that the chunk is made from: its rows, and its media's sizes and times."""
        digest = xxhash.xxh3_128()
        for found in self.read(chunk):
            if isinstance(found, Rejected):
                digest.update(f"{found.file}:{found.row}:{found.reason}:{found.detail}\n".encode())
                continue
            record = json.dumps([found.key, found.record], ensure_ascii=False, default=str)
            digest.update(record.encode("utf-8", "surrogatepass"))
            for member, medium in found.media.items():
                digest.update(f"\n{member}:".encode())
                if isinstance(medium, bytes):
                    digest.update(medium)
                else:
                    facts = medium.stat()
                    digest.update(f"{medium}:{facts.st_size}:{facts.st_mtime_ns}".encode())
        return str(digest.hexdigest())

    def key(self, row: int) -> str:
        """Return a key that is unique in the set and the same on every run."""
        return f"{self.options.name}-{row:09d}"


@dataclass(slots=True)
class Gathered:
    """Collects the media of one row under member names: `0.wav`, `1.png` and so on.

    Args:
        root: directory that relative paths start from.
    """

    root: Path
    media: dict[str, Path | bytes] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)

    def add(self, kind: MediaKind, value: Any) -> str:
        """Take a path, or a mapping with `bytes` and `path`; return the member's name.

        Raises:
            DataError: `bad_media`, `remote_media`, `missing_media`, `unknown_media` or
                `kind_mismatch`.
        """
        data = value.get("bytes") if isinstance(value, Mapping) else None
        name = value.get("path") if isinstance(value, Mapping) else value
        if data is not None and not isinstance(data, bytes):
            raise DataError("bad_media", f"{kind.name} has {_short(data)} as its bytes")
        if (name is not None and not isinstance(name, str)) or not (data or name):
            raise DataError("bad_media", f"{kind.name} is {_short(value)}, not a path")
        name = name or ""
        if data is None and _URL.match(name):
            raise DataError("remote_media", f"{name} must be fetched first")
        suffix = PurePosixPath(name).suffix.lower()
        if data is not None and suffix not in KIND_OF_SUFFIX:
            suffix = _sniffed(data)
        if suffix not in KIND_OF_SUFFIX:
            raise DataError("unknown_media", f"{name!r} is none of {', '.join(KIND_OF_SUFFIX)}")
        if KIND_OF_SUFFIX[suffix] is not kind:
            found = KIND_OF_SUFFIX[suffix].name
            raise DataError("kind_mismatch", f"{name!r} is {found}, the row says {kind.name}")
        path = self.root / name
        if data is None and not path.is_file():
            raise DataError("missing_media", f"there is no file {name}")
        member = f"{len(self.media)}{suffix}"
        self.media[member] = path if data is None else data
        self.origin[member] = name
        return member


def make_draft(
    source: Source,
    row: Row,
    *,
    messages: list[dict[str, Any]],
    gathered: Gathered,
    fields: Mapping[str, Any],
    asked: Mapping[str, str] | None = None,
) -> Draft:
    """Put a record together: the dialogue, the facts, where it comes from, and all the rest.

    Args:
        source: gives key and defaults.
        row: where it comes from.
        messages: the dialogue, with member names.
        gathered: its media.
        fields: all other fields of the row.
        asked: what the prompt asks for, where its wording was chosen here.

    Raises:
        DataError: `bad_field`, `bad_segments`, `segments_mismatch`.
    """
    rest = dict(fields)
    segments = rest.pop(source.options.column("segments"), None)
    record: dict[str, Any] = {"messages": messages}
    for fact in FACTS:
        value = rest.pop(source.options.column(fact), None)
        default = {"source": source.options.name}.get(fact) or getattr(source.options, fact, "")
        if value is None or value == "":
            value = default
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise DataError("bad_field", f"{fact} is {_short(value)}, not a text")
        record[fact] = str(value)
    if segments is not None:
        record["segments"] = as_segments(segments)
        if record["task"] == SPLIT_TASK:
            # Found here, not when a recording turns out too long to train on whole.
            check_reply(read_segments(record["segments"]), split_reply(messages)[1])
    record["origin"] = {"file": row.file, "row": row.number, "media": gathered.origin}
    if asked:
        record["asked"] = dict(asked)
    if rest:
        record["extra"] = rest
    return Draft(row.file, row.number, source.key(row.number), record, gathered.media)


def make_pair(source: Source, row: Row, values: Mapping[str, Any], root: Path) -> Draft:
    """Make a one-turn dialogue of media and a target text, with a prompt in words.

    Segments without a text beside them are the text.

    Raises:
        DataError: `no_media`, `missing_text`, and those of `Gathered.add` and `prompt_for`.
    """
    rest, gathered, options = dict(values), Gathered(root), source.options
    content: list[dict[str, Any]] = []
    for kind in KINDS:
        value = rest.pop(options.column(kind.name), None)
        if value is not None:
            content.append({"type": kind.name, kind.name: gathered.add(kind, value)})
    if not content:
        names = ", ".join(options.column(kind.name) for kind in KINDS)
        raise DataError("no_media", f"the row has none of {names}, and no messages")
    text = rest.pop(options.column("text"), None)
    if text is None and rest.get(options.column("segments")) is not None:
        language = rest.get(options.column("language")) or options.language
        said = read_segments(as_segments(rest[options.column("segments")]))
        text = joint_of(language).join(segment.text for segment in said)
    if not isinstance(text, str) or not text.strip():
        raise DataError("missing_text", f"{options.column('text')} is {_short(text)}")
    given = {name: rest.get(options.column(name)) for name in PROMPT_FIELDS}
    fields = {name: value for name, value in given.items() if isinstance(value, str)}
    task = str(rest.get(options.column("task")) or options.task)
    # The last kind names the task's wordings: a clip rather than a picture beside it.
    kind = MediaKind[content[-1]["type"]]
    prompt = prompt_for(task, kind, key=source.key(row.number), fields=fields)
    content.append({"type": "text", "text": prompt})
    reply: dict[str, Any] = {"role": "assistant", "content": text}
    messages = [{"role": "user", "content": content}, reply]
    asked = {"task": task, **fields}
    return make_draft(source, row, messages=messages, gathered=gathered, fields=rest, asked=asked)


def parse_object(data: bytes) -> dict[str, Any]:
    """Return the object of one line of JSON.

    Raises:
        DataError: `corrupt_json`.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError("corrupt_json", f"no JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError("corrupt_json", f"{_short(values)} is not an object")
    return values


def _sniffed(data: bytes) -> str:
    if data[8:12] == b"WEBP":
        return ".webp"
    if data[4:8] == b"ftyp":
        return ".mp4"
    return next((suffix for magic, suffix in _MAGICS if data.startswith(magic)), "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
