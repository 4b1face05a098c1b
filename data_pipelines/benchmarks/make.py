"""A benchmark to shards: every row becomes a sample, or the first that cannot stops the work.

A score over part of a benchmark is another score, so nothing is left out silently.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from data_pipelines.benchmarks.base import record_of
from data_pipelines.benchmarks.rows import read_rows
from data_pipelines.benchmarks.table import BENCHMARKS
from data_pipelines.shards import Sample, write_shards
from omni_train.config.errors import ConfigError, DataError
from omni_train.data.index import Manifest

_SAMPLES_PER_SHARD = 512


def make_benchmark(
    name: str,
    source: Path,
    out: Path,
    *,
    tokenizer: PreTrainedTokenizerFast,
    root: Path | None = None,
    split: str = "",
) -> Manifest:
    """Write a benchmark's shards; they appear when all rows are in them.

    Args:
        name: in `BENCHMARKS`.
        source: the owner's file or directory.
        out: directory of the shards.
        tokenizer: the model's.
        root: directory of the media; that of the file where left out.
        split: of a saved `DatasetDict`.

    Raises:
        ConfigError: there is no converter of this name, or something at `out`.
        DataError: a row cannot be used; says file, row and field. `no_samples` for an empty file.
    """
    if name not in BENCHMARKS:
        raise ConfigError(
            key="data benchmark NAME",
            value=name,
            rule=f"there are converters for {', '.join(BENCHMARKS)}",
            remedy="name one of them, or use `data prepare`",
        )
    if out.exists():
        raise ConfigError(
            key="data benchmark OUT",
            value=str(out),
            rule="there is something at this place",
            remedy="choose a new directory; nothing is overwritten",
        )
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    samples = _samples(name, source, root, split)
    first = next(samples, None)
    if first is None:
        raise DataError("no_samples", f"{source} has no row")
    manifest = write_shards(
        _chain(first, samples),
        partial,
        tokenizer=tokenizer,
        samples_per_shard=_SAMPLES_PER_SHARD,
    )
    partial.replace(out)
    return manifest


def _chain(first: Sample, rest: Iterator[Sample]) -> Iterator[Sample]:
    yield first
    yield from rest


def _samples(name: str, source: Path, root: Path | None, split: str) -> Iterator[Sample]:
    benchmark = BENCHMARKS[name]
    rows = read_rows(source, root=root, split=split, quoted=benchmark.quoted)
    for count, row in enumerate(rows):
        record, gathered = record_of(row, benchmark.convert(row), benchmark.task)
        record |= {"source": name}
        media = {
            member: value if isinstance(value, bytes) else value.read_bytes()
            for member, value in gathered.media.items()
        }
        yield Sample(f"{name}-{count:07d}", record, media)
