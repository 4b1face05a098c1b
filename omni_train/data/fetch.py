"""Bytes of planned samples, read by offset and checked against the index.

Local files only; a file is opened once per process and read with `pread`, so that no other part of
a shard is touched. Nothing is decoded here.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path

import xxhash

from omni_train.config.errors import DataError
from omni_train.data.types import IndexRow, RawSample

_MAX_OPEN_SHARDS = 64


class _OpenShard:
    """A file descriptor that closes itself when it falls out of the cache."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.fd)


@lru_cache(maxsize=_MAX_OPEN_SHARDS)
def _open_shard(path: str) -> _OpenShard:
    return _OpenShard(path)


def read_member(shard: Path, offset: int, size: int, xxh3: str) -> bytes:
    """Read one member and verify it.

    Args:
        shard: path of the tar file.
        offset, size: place of the member's bytes.
        xxh3: xxh3-64 the index holds, 16 hex digits.

    Raises:
        DataError: `missing_shard`, `truncated` or `hash_mismatch`.
    """
    try:
        data = os.pread(_open_shard(str(shard)).fd, size, offset)
    except FileNotFoundError as error:
        raise DataError("missing_shard", str(error)) from error
    if len(data) != size:
        raise DataError("truncated", f"{len(data)} of {size} bytes at offset {offset}")
    if xxhash.xxh3_64_hexdigest(data) != xxh3:
        raise DataError("hash_mismatch", f"bytes at offset {offset} are not those of the index")
    return data


def fetch(shard: Path, row: IndexRow) -> RawSample:
    """Read the JSON member and all media of one sample.

    Raises:
        DataError: with shard and key, where anything is missing or changed.
    """
    try:
        record = json.loads(read_member(shard, row.json_offset, row.json_size, row.json_xxh3))
        media = {m.member: read_member(shard, m.offset, m.size, m.xxh3) for m in row.media}
    except DataError as error:
        raise error.at(shard=shard.name, key=row.key) from error
    except ValueError as error:
        raise DataError("bad_json", str(error), shard=shard.name, key=row.key) from error
    return RawSample(row=row, record=record, media=media)
