"""Samples to webdataset shards, their indexes and the manifest.

The same samples give the same bytes: nothing of the clock, the user or the machine is written.
Each file appears whole or not at all, the manifest last; a set without one is unfinished.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from transformers import PreTrainedTokenizerFast

from data_pipelines.filters import content_hash, measure_quality, sound_member
from omni_train.config.errors import ConfigError, DataError
from omni_train.data.chatml import count_text_tokens
from omni_train.data.index import (
    Manifest,
    ShardInfo,
    describe_shard,
    index_path,
    write_index,
    write_manifest,
)
from omni_train.data.scan import index_shard
from omni_train.data.split import can_split, check_times, read_segments
from omni_train.data.tars import Sample, write_tar
from omni_train.data.tokenizer import tokenizer_hash
from omni_train.data.types import IndexRow

# What others know from here.
__all__ = ["Sample", "index_tar", "measured_rows", "write_shards", "write_tar"]


def write_shards(
    samples: Iterable[Sample],
    out_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerFast,
    samples_per_shard: int,
) -> Manifest:
    """Write `shard-000000.tar` and so on, their indexes and `manifest.json`.

    Args:
        samples: read once; one shard's worth is in memory at a time.
        out_dir: made if it is not there; must not hold a set already.
        tokenizer: counts the text tokens.
        samples_per_shard: the last shard may hold fewer.

    Raises:
        ConfigError: `out_dir` holds shards already, or `samples_per_shard` is not positive.
        DataError: a sample that could not be read back, see `index_shard`; or `duplicate_key`.
    """
    if samples_per_shard < 1:
        raise ConfigError(
            key="samples_per_shard",
            value=samples_per_shard,
            rule="a shard holds at least one sample",
            remedy="use 1 or more",
        )
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    if any(out_dir.glob("shard-*.tar")):
        raise ConfigError(
            key="out_dir",
            value=str(out_dir),
            rule="a set of shards is written once",
            remedy="choose an empty directory, or remove the old shards",
        )
    shards: list[ShardInfo] = []
    seen: set[str] = set()
    for chunk in _chunks(samples, samples_per_shard):
        for sample in chunk:
            if sample.key in seen:
                raise DataError("duplicate_key", "two samples have one key", key=sample.key)
            seen.add(sample.key)
        path = out_dir / f"shard-{len(shards):06d}.tar"
        write_tar(path, chunk)
        shards.append(index_tar(path, tokenizer))
    manifest = Manifest(tokenizer_hash=tokenizer_hash(tokenizer), shards=tuple(shards))
    write_manifest(out_dir, manifest)
    return manifest


def index_tar(path: Path, tokenizer: PreTrainedTokenizerFast) -> ShardInfo:
    """Write the index beside a tar, ours or a foreign one, and return the manifest's entry.

    Raises:
        DataError: see `index_shard`.
    """
    rows = measured_rows(path, tokenizer)
    write_index(index_path(path), rows)
    return describe_shard(path, num_samples=len(rows))


def measured_rows(path: Path, tokenizer: PreTrainedTokenizerFast) -> list[IndexRow]:
    """Return the rows of a tar's index, with quality scores.

    Raises:
        DataError: see `index_shard`; `bad_segments` where times lie past the medium's end.
    """
    rows = index_shard(
        path, count_text_tokens=lambda record: count_text_tokens(record["messages"], tokenizer)
    )
    with path.open("rb") as file:
        for row in rows:
            try:
                _measure(file, row)
            except DataError as error:
                raise error.at(shard=str(path), key=row.key) from error
    return rows


def _measure(file: BinaryIO, row: IndexRow) -> None:
    """Fill in a row's quality scores and the hash of its content."""
    record = json.loads(_read(file, row.json_offset, row.json_size))
    if can_split(row):
        _check_segments(record, row)
    heard = {sound_member(info) for info in row.media if info.has_audio and info.use_audio}
    places = [place for info in row.media for place in info.places() if place.member in heard]
    data = {place.member: _read(file, place.offset, place.size) for place in places}
    row.quality = measure_quality(record, row.media, data)
    row.content_hash = content_hash(record, row)


def _check_segments(record: dict[str, Any], row: IndexRow) -> None:
    try:
        segments = read_segments(record.get("segments") or [])
    except DataError:
        # Of a form that a foreign tar may have for itself: what is too long is then left out.
        return
    check_times(segments, row.media[0])


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _chunks(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    source = iter(samples)
    while chunk := list(islice(source, size)):
        yield chunk
