"""Samples to a webdataset tar and back; indexes and sets of shards are data_pipelines/shards.py's.

The same samples give the same bytes: nothing of the clock, the user or the machine is written. A
tar appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from webdataset.writer import TarWriter

from omni_train.config.errors import DataError
from omni_train.data.index import publish

_OWNER = "omni-train"


@dataclass(slots=True)
class Sample:
    """What one sample of a shard is made from.

    Args:
        key: letters, digits, `_` and `-`; unique in the set.
        record: the JSON member: `messages` and the descriptive fields.
        media: bytes by member name, such as `0.wav`.
    """

    key: str
    record: dict[str, Any]
    media: dict[str, bytes] = field(default_factory=dict)


def write_tar(path: Path, samples: Iterable[Sample]) -> None:
    """Write one tar under a temporary name, flush it to disk, rename it.

    Args:
        path: of the tar.
        samples: read once, one in memory at a time.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            # encoder=False: bytes go in as they are. mtime=0 and fixed names: the same samples,
            # the same bytes.
            with TarWriter(file, user=_OWNER, group=_OWNER, encoder=False, mtime=0) as writer:
                for sample in samples:
                    writer.write(_members(sample))
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _members(sample: Sample) -> dict[str, Any]:
    for member in sample.media:
        # The writer drops members that start with `_` without a word.
        if member.startswith("_") or member == "json" or "/" in member:
            raise DataError("unsafe_name", f"{member!r} cannot name a medium", key=sample.key)
    record = json.dumps(sample.record, ensure_ascii=False, allow_nan=False)
    return {"__key__": sample.key, "json": record.encode(), **sample.media}


def read_tar(tar: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield key and members of each sample of a tar whose members lie side by side.

    Args:
        tar: as `write_tar` makes it, or any that an index has been made of.
    """
    key, members = "", dict[str, bytes]()
    with tarfile.open(tar, mode="r:") as file:
        for info in file:
            if not info.isreg():
                continue
            here, _, member = PurePosixPath(info.name).name.partition(".")
            if here != key and members:
                yield key, members
                members = {}
            handle = file.extractfile(info)
            assert handle is not None, info.name
            key, members[member] = here, handle.read()
    if members:
        yield key, members
