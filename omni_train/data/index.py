"""What lies where in a set of shards: the Parquet index of each shard, and the set's manifest.

    shard-000000.tar        a plain webdataset tar
    shard-000000.parquet    one row per sample of it (`IndexRow`), media as a list of structs
    manifest.json           schema version, tokenizer hash, shards with sizes and hashes, totals

Done here: reading and writing both, atomically. Not done here: making rows from a tar (scan.py),
reading samples (fetch.py), choosing them (plan.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from omni_train.config.errors import DataError
from omni_train.data.filters import QUALITY
from omni_train.data.stores import Root, Store, open_root
from omni_train.data.types import IndexRow, MediaInfo, MediaKind, MemberPlace, SpeechInfo

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
KEY_PATTERN = r"[A-Za-z0-9_-]+"
_HASH_BLOCK = 1 << 20

_PLACE = pa.struct(
    [
        ("member", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("xxh3", pa.string()),
    ]
)
_MEDIA = pa.struct(
    [
        ("kind", pa.string()),
        ("member", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("xxh3", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("num_frames", pa.int64()),
        ("frame_times_us", pa.list_(pa.int64())),
        ("first_frame_us", pa.int64()),
        ("fps", pa.float64()),
        ("keyframe_interval", pa.int32()),
        ("has_audio", pa.bool_()),
        ("use_audio", pa.bool_()),
        ("audio_start_us", pa.int64()),
        ("num_audio_samples", pa.int64()),
        ("sample_rate_hz", pa.int32()),
        ("num_channels", pa.int32()),
        ("duration_us", pa.int64()),
        ("parts", pa.list_(_PLACE)),
    ]
)
_SPEECH = pa.struct(
    [
        ("member", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("xxh3", pa.string()),
        ("num_codes", pa.int64()),
        ("num_reply_tokens", pa.int64()),
        ("text", pa.string()),
    ]
)
_ROW = pa.schema(
    [
        ("key", pa.string()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        ("json_xxh3", pa.string()),
        ("media", pa.list_(_MEDIA)),
        ("num_text_tokens", pa.int64()),
        ("num_target_tokens", pa.int64()),
        ("task", pa.string()),
        ("language", pa.string()),
        ("speaker", pa.string()),
        ("source", pa.string()),
        ("content_hash", pa.string()),
        ("quality", pa.struct([(name, pa.float64()) for name in QUALITY])),
        ("speech", _SPEECH),
    ],
    metadata={"omni_train.schema_version": str(SCHEMA_VERSION)},
)
_SPEECH_COLUMN = _ROW.get_field_index("speech")
# Indexes from before there were spoken replies.
_ROW_WITHOUT_SPEECH = _ROW.remove(_SPEECH_COLUMN)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """One shard of a set.

    Args:
        name: file name of the tar, without a directory.
        num_samples: samples in it.
        bytes: size of the tar.
        xxh3: xxh3-64 of the tar, 16 hex digits.
        index_xxh3: xxh3-64 of its Parquet index.
    """

    name: str
    num_samples: int
    bytes: int
    xxh3: str
    index_xxh3: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A set of shards.

    Args:
        tokenizer_hash: of the tokenizer that counted the text tokens (`tokenizer_hash`).
        shards: in the order that the plan numbers them.
        schema_version: of the index and this file.
    """

    tokenizer_hash: str
    shards: tuple[ShardInfo, ...]
    schema_version: int = SCHEMA_VERSION

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tars."""
        return sum(shard.bytes for shard in self.shards)


def index_path(shard: str | Path) -> Path:
    """Path of the index beside a shard."""
    return Path(shard).with_suffix(".parquet")


def write_index(path: str | Path, rows: list[IndexRow]) -> None:
    """Write an index; it appears whole or not at all. The same rows give the same bytes."""
    table = table_of(rows)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomically(Path(path), sink.getvalue().to_pybytes())


def read_index(path: str | Path, *, xxh3: str = "", store: Store | None = None) -> list[IndexRow]:
    """Read an index, local or remote; arguments and errors are those of `read_table`."""
    return rows_of(read_table(path, xxh3=xxh3, store=store))


def read_table(
    path: str | Path,
    *,
    xxh3: str = "",
    store: Store | None = None,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """Read an index as columns, without an object per row.

    Args:
        path: of the Parquet file, or its URL.
        xxh3: hash that the manifest holds of it; empty where there is none to hold it to.
        store: reads it; by default one without a cache.
        columns: names of those that are wanted, fields of media as `media.list.element.kind`.

    Raises:
        DataError: `missing_index`, `corrupt_index` (unreadable, another hash, or columns of another
            version), and what `Store.read_all` finds.
    """
    store = store or Store()
    data = _read_file(store, path, missing="missing_index")
    if xxh3 and xxhash.xxh3_64_hexdigest(data) != xxh3:
        data = _read_file(store, path, missing="missing_index")
        if xxhash.xxh3_64_hexdigest(data) != xxh3:
            raise DataError("corrupt_index", f"{path} is not the file that the manifest describes")
    try:
        # The bytes, not the name: pyarrow would otherwise resolve names as URIs.
        file = pq.ParquetFile(pa.BufferReader(data))
        table = _read_columns(file, columns)
    except (pa.ArrowException, OSError) as error:
        raise DataError("corrupt_index", f"{path} is no readable Parquet file: {error}") from error
    if table is None:
        raise DataError("corrupt_index", f"{path} has other columns than this version writes")
    if "key" in table.column_names:
        _check_keys(table.column("key"), path)
    return table


def _check_keys(keys: pa.ChunkedArray, path: str | Path) -> None:
    """Refuse keys that no indexer writes: waves, pages and pictures are named after them."""
    good = pc.match_substring_regex(keys, rf"\A{KEY_PATTERN}\z")
    if not pc.all(good, min_count=0).as_py():
        bad = keys.filter(pc.invert(good))[0].as_py()
        raise DataError("corrupt_index", f"{path} has the key {bad!r}: letters, digits, _ and -")


def _read_columns(file: pq.ParquetFile, columns: Sequence[str] | None) -> pa.Table | None:
    """Return columns of an index; None where it has others than this version knows."""
    if file.schema_arrow.equals(_ROW):
        return file.read(columns=columns, use_threads=False)
    if not file.schema_arrow.equals(_ROW_WITHOUT_SPEECH):
        return None
    older = columns and [name for name in columns if name.partition(".")[0] != "speech"]
    table = file.read(columns=older, use_threads=False)
    if columns is not None and len(older or ()) == len(columns):
        return table
    return table.append_column(_ROW.field(_SPEECH_COLUMN), pa.nulls(table.num_rows, _SPEECH))


def table_of(rows: list[IndexRow]) -> pa.Table:
    """Rows as the columns that an index has."""
    return pa.Table.from_pylist([_row_to_dict(row) for row in rows], schema=_ROW)


def rows_of(table: pa.Table) -> list[IndexRow]:
    """Rows of a table that `read_table` returned with all its columns."""
    return [_row_from_dict(values) for values in table.to_pylist()]


def describe_shard(shard: str | Path, *, num_samples: int) -> ShardInfo:
    """Entry of the manifest for a shard whose index is already written."""
    shard = Path(shard)
    return ShardInfo(
        name=shard.name,
        num_samples=num_samples,
        bytes=shard.stat().st_size,
        xxh3=hash_file(shard),
        index_xxh3=hash_file(index_path(shard)),
    )


def write_manifest(root: str | Path, manifest: Manifest) -> None:
    """Write `manifest.json` into a set's directory; it appears whole or not at all."""
    record = {
        "schema_version": manifest.schema_version,
        "tokenizer_hash": manifest.tokenizer_hash,
        "num_samples": manifest.num_samples,
        "bytes": manifest.num_bytes,
        "shards": [asdict(shard) for shard in manifest.shards],
    }
    text = json.dumps(record, indent=2) + "\n"
    write_atomically(Path(root) / MANIFEST_NAME, text.encode())


def read_manifest(root: str | Path | Root) -> Manifest:
    """Read the manifest of a set of shards, local or remote.

    Raises:
        DataError: `missing_manifest`; `corrupt_manifest` where it is not what `write_manifest`
            writes; `schema_version` where another version wrote it.
    """
    opened = open_root(root)
    path = opened.url_of(MANIFEST_NAME)
    data = _read_file(opened.store, path, missing="missing_manifest")
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError("corrupt_manifest", f"{path} is no JSON: {error}") from error
    version = record.get("schema_version") if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:
        raise DataError("schema_version", f"{path} has {version!r}, {SCHEMA_VERSION} is read here")
    try:
        manifest = Manifest(
            tokenizer_hash=str(record["tokenizer_hash"]),
            shards=tuple(_shard_info(entry) for entry in record["shards"]),
        )
        totals = (record["num_samples"], record["bytes"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError("corrupt_manifest", f"{path} lacks or garbles a field: {error}") from error
    if totals != (manifest.num_samples, manifest.num_bytes):
        raise DataError("corrupt_manifest", f"{path}: totals {totals} are not those of its shards")
    return manifest


def hash_file(path: str | Path) -> str:
    """xxh3-64 of a file, 16 hex digits, read block by block."""
    digest = xxhash.xxh3_64()
    with Path(path).open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return str(digest.hexdigest())


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` under a temporary name, flush it to disk, then rename it to `path`."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished, flushed file to its place and make the rename durable."""
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _read_file(store: Store, path: str | Path, *, missing: str) -> bytes:
    """Read a whole file; its absence has the reason `missing`."""
    try:
        return store.read_all(path)
    except DataError as error:
        reason = missing if error.reason == "missing_shard" else error.reason
        raise DataError(reason, error.detail) from error


def _shard_info(entry: dict[str, Any]) -> ShardInfo:
    info = ShardInfo(**entry)
    # The name becomes a path: it must stay inside the set's directory.
    if Path(info.name).name != info.name or not info.name.endswith(".tar"):
        raise ValueError(f"{info.name!r} is no plain tar name")
    for spec in fields(info):
        wanted = int if spec.name in ("num_samples", "bytes") else str
        if type(getattr(info, spec.name)) is not wanted:
            raise ValueError(f"{spec.name} of {info.name} is no {wanted.__name__}")
    return info


def _row_to_dict(row: IndexRow) -> dict[str, Any]:
    record = {spec.name: getattr(row, spec.name) for spec in fields(row)}
    record["media"] = [{**asdict(info), "kind": info.kind.name} for info in row.media]
    record["speech"] = asdict(row.speech) if row.speech is not None else None
    return record


def _medium_from_dict(info: dict[str, Any]) -> MediaInfo:
    parts = [MemberPlace(**place) for place in info["parts"]]
    return MediaInfo(**{**info, "kind": MediaKind[info["kind"]], "parts": parts})


def _row_from_dict(values: dict[str, Any]) -> IndexRow:
    media = [_medium_from_dict(info) for info in values["media"]]
    quality = {name: score for name, score in values["quality"].items() if score is not None}
    speech = None if (found := values["speech"]) is None else SpeechInfo(**found)
    return IndexRow(**{**values, "media": media, "quality": quality, "speech": speech})
