"""Sources to shards, in parallel, restartable, and in parts on several machines.

    OUT/shard-000007.tar, .parquet      one chunk of the source: a fixed range of its rows
    OUT/prepare/settings.json           what all runs into this directory must agree on
    OUT/prepare/000007.json             a chunk that is done: hash of its inputs, shard, rejections
    OUT/part-1-of-4.json                the chunks of one part are done
    OUT/rejected.jsonl, manifest.json   the whole set (merge.py)

A chunk's record is written last, after tar and index; a chunk without one is made again, so a run
that was killed anywhere goes on where it stopped and ends in the same bytes. A row that cannot be
used leaves its shard shorter and changes no other. Not done here: what a row means (sources).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from data_pipelines.prompts import find_tag
from data_pipelines.shards import Sample, index_tar, measured_rows, write_tar
from data_pipelines.sources.base import Draft, Rejected, SourceOptions
from data_pipelines.sources.open import open_source
from omni_train.config.errors import ConfigError, DataError
from omni_train.data.chatml import count_text_tokens
from omni_train.data.index import hash_file, index_path, write_atomically
from omni_train.data.tokenizer import load_tokenizer, tokenizer_hash

PREPARE_VERSION = 1
FOLDER = "prepare"
SETTINGS = "settings.json"
CHUNK_FIELDS = ("inputs", "shard", "rejected")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a worker must know.

    Args:
        source: where the rows come from.
        out_dir: where the shards go.
        tokenizer_dir: counts the text tokens.
    """

    source: SourceOptions
    out_dir: str
    tokenizer_dir: str


@dataclass(frozen=True, slots=True)
class Part:
    """Chunks `number`, `number + of`, ...: one of several runs that share the work."""

    number: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise ConfigError(
                key="--part",
                value=f"{self.number}/{self.of}",
                rule="parts are numbered from 0 to one less than their count",
                remedy=f"use 0/{self.of} to {self.of - 1}/{self.of}" if self.of > 0 else "use 0/1",
            )

    @property
    def file_name(self) -> str:
        """Of the record that says that this part is done."""
        return f"part-{self.number}-of-{self.of}.json"


@dataclass(frozen=True, slots=True)
class ChunkDone:
    """One finished chunk; `reused` where an earlier run had made it."""

    number: int
    num_samples: int
    num_rejected: int
    reused: bool


def prepare(
    job: Job, *, part: Part, num_workers: int, report: Callable[[ChunkDone, int], None]
) -> list[ChunkDone]:
    """Make the shards of one part; return its chunks in order.

    Args:
        job: source and target.
        part: which chunks.
        num_workers: processes; 0 works in this one.
        report: called with each chunk and the number of chunks of this part.

    Raises:
        ConfigError: the directory holds something else, or an option that cannot be used.
        DataError: the source cannot be read at all.
        FileNotFoundError: there is no such source.
    """
    if num_workers < 0:
        raise ConfigError(
            key="--workers", value=num_workers, rule="a number of processes", remedy="use 0 or more"
        )
    source = open_source(job.source)
    _claim(job, num_rows=source.num_rows)
    numbers = list(range(part.number, source.num_chunks, part.of))
    _sweep(Path(job.out_dir), numbers)
    done: list[ChunkDone] = []
    for chunk in _run(job, numbers, num_workers):
        done.append(chunk)
        report(chunk, len(numbers))
    done.sort(key=lambda chunk: chunk.number)
    record = {"part": part.number, "of": part.of, "num_chunks": source.num_chunks}
    _write_json(Path(job.out_dir) / part.file_name, {**record, "chunks": numbers})
    return done


def chunk_record(out_dir: Path, number: int) -> Path:
    """Return the path of the record of a finished chunk."""
    return out_dir / FOLDER / f"{number:06d}.json"


def read_record(path: Path, *needed: str) -> dict[str, Any]:
    """Return one of the records that `prepare` keeps in its directory, with the needed fields.

    Raises:
        DataError: `corrupt_record`.
    """
    try:
        record = json.loads(path.read_bytes())
    except ValueError:
        record = None
    if not isinstance(record, dict) or not record.keys() >= set(needed):
        remedy = "remove it and run data prepare again"
        raise DataError("corrupt_record", f"{path} is not what data prepare writes; {remedy}")
    return record


def settings_of(job: Job) -> dict[str, Any]:
    """Return what decides the shards, besides the source's content."""
    options = asdict(job.source)
    del options["path"], options["media_root"]
    options["format"] = job.source.format.name
    options["columns"] = dict(sorted(job.source.columns))
    tokenizer = tokenizer_hash(_tokenizer(job.tokenizer_dir))
    return {"version": PREPARE_VERSION, **options, "tokenizer_hash": tokenizer}


def _claim(job: Job, *, num_rows: int) -> None:
    """Make the directory, or see that it belongs to the same settings."""
    if num_rows == 0:
        raise DataError("empty_source", f"{job.source.path} has no rows")
    out_dir, settings = Path(job.out_dir), settings_of(job)
    path = out_dir / FOLDER / SETTINGS
    if path.is_file():
        before = read_record(path)
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            name = changed[0]
            raise ConfigError(
                key=name,
                value=settings[name],
                rule=f"{out_dir} was begun with {before.get(name)!r}",
                remedy="use the same settings, or another directory",
            )
        return
    if out_dir.is_dir() and any(out_dir.glob("*.tar")):
        raise ConfigError(
            key="OUT",
            value=str(out_dir),
            rule="the directory holds shards that were not made by prepare",
            remedy="choose another directory",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_json(path, settings)


def _sweep(out_dir: Path, numbers: list[int]) -> None:
    """Remove what a killed run of the same part left half written."""
    own = {f"{number:06d}" for number in numbers}
    for folder in (out_dir, out_dir / FOLDER):
        for path in folder.glob(".*.tmp-*"):
            # What was being written under a temporary name has two dots.
            if path.name.lstrip(".").removeprefix("shard-")[:6] in own:
                path.unlink(missing_ok=True)


def _run(job: Job, numbers: list[int], num_workers: int) -> Iterator[ChunkDone]:
    if num_workers == 0:
        for number in numbers:
            yield make_chunk(job, number)
        return
    # Started afresh: a fork would copy whatever threads this process has.
    with ProcessPoolExecutor(
        min(num_workers, max(len(numbers), 1)),
        mp_context=get_context("spawn"),
        initializer=_start_worker,
    ) as pool:
        waiting = [pool.submit(make_chunk, job, number) for number in numbers]
        try:
            for finished in as_completed(waiting):
                yield finished.result()
        except BrokenProcessPool as error:
            raise ConfigError(
                key="--workers",
                value=num_workers,
                rule="a worker process died, most likely for want of memory",
                remedy="run the same command with fewer workers; finished shards are kept",
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """One thread per worker, and no worker outlives the process that started it."""
    import torch

    torch.set_num_threads(1)
    parent = parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def make_chunk(job: Job, number: int) -> ChunkDone:
    """Make one shard with its index and record, unless they are there already."""
    out_dir = Path(job.out_dir)
    source = open_source(job.source)
    inputs = source.digest(number)
    record = _finished(out_dir, number, inputs)
    if record is not None:
        return _chunk_done(number, record, reused=True)
    tar = out_dir / f"shard-{number:06d}.tar"
    tokenizer = _tokenizer(job.tokenizer_dir)
    rejected: list[Rejected] = []
    shard = None
    # Samples are checked one by one only where the whole shard does not pass at once.
    for one_by_one in (False, True):
        rejected.clear()
        write_tar(tar, _samples(job, number, rejected, one_by_one=one_by_one))
        try:
            shard = index_tar(tar, tokenizer)
            break
        except DataError:
            if one_by_one:
                raise
    assert shard is not None, number
    if shard.num_samples == 0:
        # A shard without samples would be a file that nothing reads.
        tar.unlink()
        index_path(tar).unlink()
    rejections = [asdict(row) for row in rejected]
    entry = asdict(shard) if shard.num_samples else None
    record = {"inputs": inputs, "shard": entry, "rejected": rejections}
    _write_json(chunk_record(out_dir, number), record)
    return _chunk_done(number, record, reused=False)


def _chunk_done(number: int, record: dict[str, Any], *, reused: bool) -> ChunkDone:
    num_samples = record["shard"]["num_samples"] if record["shard"] else 0
    return ChunkDone(number, num_samples, len(record["rejected"]), reused)


def _finished(out_dir: Path, number: int, inputs: str) -> dict[str, Any] | None:
    """Return the record of a chunk that was made from the same inputs and is still whole."""
    path = chunk_record(out_dir, number)
    if not path.is_file():
        return None
    try:
        record = read_record(path, *CHUNK_FIELDS)
    except DataError:
        return None
    shard = record["shard"]
    if record["inputs"] != inputs:
        return None
    if shard is None:
        return record
    tar = out_dir / shard["name"]
    if not tar.is_file() or tar.stat().st_size != shard["bytes"]:
        return None
    index = index_path(tar)
    return record if index.is_file() and hash_file(index) == shard["index_xxh3"] else None


def _samples(
    job: Job, number: int, rejected: list[Rejected], *, one_by_one: bool
) -> Iterator[Sample]:
    """Yield the samples of a chunk; note in `rejected` why the others are left out."""
    tokenizer = _tokenizer(job.tokenizer_dir)
    for found in open_source(job.source).read(number):
        if isinstance(found, Rejected):
            rejected.append(found)
            continue
        try:
            sample = _read_sample(found)
            _check_texts(sample, tokenizer)
            if one_by_one:
                _check_alone(sample, tokenizer, Path(job.out_dir) / FOLDER / f"{number:06d}.check")
        except DataError as error:
            rejected.append(Rejected(found.file, found.row, error.reason, error.detail))
        else:
            yield sample


def _read_sample(draft: Draft) -> Sample:
    media = {}
    for member, medium in draft.media.items():
        if isinstance(medium, Path):
            try:
                medium = medium.read_bytes()
            except OSError as error:
                raise DataError("unreadable_media", f"{member}: {error.strerror}") from error
        media[member] = medium
    try:
        json.dumps(draft.record, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise DataError("not_json", f"the record holds what JSON cannot: {error}") from error
    return Sample(draft.key, draft.record, media)


def _check_texts(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a dialogue that cannot be rendered, teaches nothing, or holds task tags."""
    messages = sample.record["messages"]
    _, num_targets = count_text_tokens(messages, tokenizer)
    if num_targets == 0:
        raise DataError("no_target", "the dialogue has no assistant turn")
    for turn in messages:
        content = turn["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for text in (part["text"] for part in parts if part["type"] == "text"):
            if tag := find_tag(text):
                raise DataError("task_tag", f"the text holds {tag!r}; tasks are asked for in words")


def _check_alone(sample: Sample, tokenizer: PreTrainedTokenizerFast, stem: Path) -> None:
    """Index a shard of this sample alone, so that what is wrong with it is its own reason."""
    tar = stem.with_name(f".{stem.name}.tmp-{os.getpid()}")
    try:
        write_tar(tar, [sample])
        measured_rows(tar, tokenizer)
    finally:
        tar.unlink(missing_ok=True)


@lru_cache(maxsize=1)
def _tokenizer(folder: str) -> PreTrainedTokenizerFast:
    return load_tokenizer(folder)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(values, ensure_ascii=True, indent=1) + "\n").encode())
