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
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from omni_train.config.errors import DataError
from omni_train.data.types import IndexRow, MediaInfo, MediaKind

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
_HASH_BLOCK = 1 << 20

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
    ],
    metadata={"omni_train.schema_version": str(SCHEMA_VERSION)},
)


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
    table = pa.Table.from_pylist([_row_to_dict(row) for row in rows], schema=_ROW)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomically(Path(path), sink.getvalue().to_pybytes())


def read_index(path: str | Path) -> list[IndexRow]:
    """Read an index.

    Raises:
        DataError: `missing_index`, `corrupt_index` (unreadable, or columns of another version).
    """
    path = Path(path)
    try:
        # The file object, not its name: pyarrow would otherwise resolve names as URIs.
        with path.open("rb") as file:
            table = pq.read_table(file)
    except FileNotFoundError as error:
        raise DataError("missing_index", f"no index at {path}") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError("corrupt_index", f"{path} is no readable Parquet file: {error}") from error
    if not table.schema.equals(_ROW):
        raise DataError("corrupt_index", f"{path} has other columns than this version writes")
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


def read_manifest(root: str | Path) -> Manifest:
    """Read the manifest of a set of shards.

    Raises:
        DataError: `missing_manifest`; `corrupt_manifest` where it is not what `write_manifest`
            writes; `schema_version` where another version wrote it.
    """
    path = Path(root) / MANIFEST_NAME
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError("missing_manifest", f"no {MANIFEST_NAME} in {root}") from error
    except ValueError as error:
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
    return record


def _row_from_dict(values: dict[str, Any]) -> IndexRow:
    media = [MediaInfo(**{**info, "kind": MediaKind[info["kind"]]}) for info in values["media"]]
    return IndexRow(**{**values, "media": media})
