"""Does every sample of a set give what the index promises? Decodes all of it and counts problems.

    manifest -> hash of each tar and index -> every sample through fetch and encode -> lint.json

A problem has a reason code: the one that training would write into its ledger, or one of the
set's own: `shard_hash_mismatch`, `index_hash_mismatch`, `missing_shard`, `wrong_count` (rows
against the manifest), `wrong_tokens` (encode against measure), `duplicate_key`, `worker_died`.
Nothing is changed but `lint.json`; fix.py makes a skip list of it. A set in an object store is read
through `Store`; its report goes to a local file, if to any.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import xxhash
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from data_pipelines.lint_pool import check_all
from data_pipelines.merge import REJECTED
from data_pipelines.prepare import FOLDER
from omni_train.config.errors import ConfigError, DataError
from omni_train.data.encode import encode
from omni_train.data.fetch import fetch
from omni_train.data.index import (
    MANIFEST_NAME,
    Manifest,
    ShardInfo,
    hash_file,
    index_path,
    read_index,
    read_manifest,
    write_atomically,
)
from omni_train.data.measure import measure
from omni_train.data.skiplist import SKIP_NAME, read_skip_list
from omni_train.data.stores import Root, open_root
from omni_train.data.tokenizer import tokenizer_hash
from omni_train.data.types import IndexRow, ModelSpec, ProcessingConfig

LINT_NAME = "lint.json"
SCHEMA_VERSION = 1
_ROWS_PER_TASK = 32
_HASH_BLOCK = 1 << 23
# What `data prepare` leaves beside the shards, on a cluster too; `data codes`; `talker pairs`.
_OWN = ("part-*-of-*.json", "prepare.sbatch", "slurm-*.log", "codes.json")
_OWN += ("pairs.json", "pairs.jsonl", "listen.html", "dataset")


@dataclass(frozen=True, slots=True)
class Encoding:
    """How samples become tokens: what lint, info and show need beside the set itself."""

    tokenizer: PreTrainedTokenizerFast
    config: ProcessingConfig
    spec: ModelSpec


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding.

    Args:
        shard: name of the tar.
        key: of the sample; empty where the whole shard is meant.
        reason: code to count by.
        detail: one sentence.
        skipped: the skip list leaves it out of training already.
    """

    shard: str
    key: str
    reason: str
    detail: str
    skipped: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """Some rows of one shard; the first task of a shard carries `info` and checks the hashes.

    Args:
        root: of the set.
        shard: name of the tar.
        rows: to check.
        info: the shard's entry in the manifest.
    """

    root: Root
    shard: str
    rows: tuple[IndexRow, ...]
    info: ShardInfo | None = None

    def split(self) -> list[Task]:
        """One task per sample, to find the one that ends its process."""
        pieces = [replace(self, rows=(row,), info=None) for row in self.rows] or [self]
        return [replace(pieces[0], info=self.info), *pieces[1:]]


@dataclass(frozen=True, kw_only=True, slots=True)
class LintReport:
    """What was found in a set.

    Args:
        manifest_xxh3: of the manifest that was checked, so that a later change is noticed.
        num_shards, num_samples: as the manifest says.
        problems: sorted by shard, key and reason.
        unknown_files: names in the set's directory that the manifest does not know; no problem.
    """

    manifest_xxh3: str
    num_shards: int
    num_samples: int
    problems: list[Problem] = field(default_factory=list)
    unknown_files: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether anything is wrong that the skip list does not leave out."""
        return not all(problem.skipped for problem in self.problems)

    def reasons(self) -> dict[str, int]:
        """Problems by reason, the most frequent first."""
        counts: dict[str, int] = {}
        for problem in self.problems:
            counts[problem.reason] = counts.get(problem.reason, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def as_dict(self) -> dict[str, Any]:
        """The content of `lint.json`."""
        bad = {(p.shard, p.key) for p in self.problems if p.key}
        return {
            "schema_version": SCHEMA_VERSION,
            "manifest_xxh3": self.manifest_xxh3,
            "num_shards": self.num_shards,
            "num_samples": self.num_samples,
            "num_bad_samples": len(bad),
            "failed": self.failed,
            "reasons": self.reasons(),
            "problems": [asdict(problem) for problem in self.problems],
            "unknown_files": self.unknown_files,
        }


def lint_set(
    path: str | Path, encoding: Encoding, *, num_workers: int, report_path: Path | None = None
) -> LintReport:
    """Check a whole set, show progress on stderr, write the report.

    Args:
        path: directory or URL with a manifest.
        encoding: must have the tokenizer that the index counts with.
        num_workers: processes; 0 checks in this one.
        report_path: of the report; None means `lint.json` in the set's directory, and for a set in
            a store that nothing is written.

    Raises:
        FileNotFoundError: there is no such directory.
        DataError: the manifest or the skip list cannot be read.
        ConfigError: another tokenizer, or a negative number of processes.
        RunError: a URL of a scheme that is not read.
    """
    root, manifest = open_set(path, encoding.tokenizer)
    if num_workers < 0:
        raise ConfigError(
            key="--workers", value=num_workers, rule="a number of processes", remedy="use 0 or more"
        )
    skip = read_skip_list(root)
    problems: list[Problem] = []
    tasks = _tasks(root, manifest, problems)
    console = Console(stderr=True)
    with _progress(console) as progress:
        bar = progress.add_task("lint", total=manifest.num_samples)
        for task, found in check_all(tasks, check_task, _died, encoding, num_workers=num_workers):
            problems += found
            progress.advance(bar, len(task.rows))
    report = LintReport(
        manifest_xxh3=xxhash.xxh3_64_hexdigest(root.read_all(MANIFEST_NAME)),
        num_shards=len(manifest.shards),
        num_samples=manifest.num_samples,
        problems=_mark_skipped(problems, skip),
        unknown_files=_unknown_files(root.folder, manifest) if root.folder else [],
    )
    if report_path is None and root.folder:
        report_path = root.folder / LINT_NAME
    if report_path:
        write_atomically(report_path, (json.dumps(report.as_dict(), indent=1) + "\n").encode())
    return report


def open_set(path: str | Path, tokenizer: PreTrainedTokenizerFast) -> tuple[Root, Manifest]:
    """Return a set and its manifest; refuse one whose text was counted with another tokenizer."""
    root = open_root(path)
    if root.folder and not root.folder.is_dir():
        raise FileNotFoundError(f"there is no directory {root.folder}")
    manifest = read_manifest(root)
    found = tokenizer_hash(tokenizer)
    if manifest.tokenizer_hash != found:
        raise ConfigError(
            key="--tokenizer",
            value=tokenizer.name_or_path,
            rule=f"{path} counts tokens with tokenizer {manifest.tokenizer_hash}, this is {found}",
            remedy="give that tokenizer, or index the shards again: omni-train data index",
        )
    return root, manifest


def check_task(task: Task, encoding: Encoding) -> list[Problem]:
    """Verify one task's hashes and encode its samples."""
    url = task.root.url_of(task.shard)
    problems = [] if task.info is None else _check_files(task.root, task.info)
    promised = measure(task.rows, encoding.config, encoding.spec).num_tokens.tolist()
    for row, num_tokens in zip(task.rows, promised, strict=True):
        try:
            raw = fetch(url, row, task.root.store)
            sample = encode(raw, encoding.tokenizer, encoding.config, encoding.spec)
        except DataError as error:
            problems.append(Problem(task.shard, row.key, error.reason, error.detail))
            continue
        except Exception as error:
            error.add_note(f"while checking {task.shard}:{row.key}")
            raise
        if sample.num_tokens != num_tokens:
            detail = f"encoding gives {sample.num_tokens} tokens, the index promises {num_tokens}"
            problems.append(Problem(task.shard, row.key, "wrong_tokens", detail))
    return problems


def _died(task: Task) -> list[Problem]:
    """What is said of a sample that ended its process."""
    key = task.rows[0].key if task.rows else ""
    detail = "the process that read it ended at once: a decoder crashed or memory ran out"
    return [Problem(task.shard, key, "worker_died", detail)]


def _tasks(root: Root, manifest: Manifest, problems: list[Problem]) -> Iterator[Task]:
    """Work for all shards, one index in memory at a time; adds what indexes show to `problems`."""
    seen: dict[str, str] = {}
    for info in manifest.shards:
        rows: list[IndexRow] = []
        try:
            rows = read_index(root.url_of(index_path(info.name).name), store=root.store)
        except DataError as error:
            problems.append(Problem(info.name, "", error.reason, error.detail))
        else:
            if len(rows) != info.num_samples:
                detail = f"{len(rows)} rows in the index, {info.num_samples} in the manifest"
                problems.append(Problem(info.name, "", "wrong_count", detail))
        for row in rows:
            first = seen.setdefault(row.key, info.name)
            if first != info.name:
                detail = f"{first} has a sample of this key too"
                problems.append(Problem(info.name, row.key, "duplicate_key", detail))
        yield Task(root, info.name, tuple(rows[:_ROWS_PER_TASK]), info)
        for start in range(_ROWS_PER_TASK, len(rows), _ROWS_PER_TASK):
            yield Task(root, info.name, tuple(rows[start : start + _ROWS_PER_TASK]))


def _check_files(root: Root, info: ShardInfo) -> list[Problem]:
    """Compare a tar and its index with the manifest's hashes."""
    problems: list[Problem] = []
    try:
        found, size = _hash_of(root, info)
    except DataError as error:
        return [Problem(info.name, "", error.reason, error.detail)]
    if (found, size) != (info.xxh3, info.bytes):
        detail = f"{size} bytes with hash {found}, the manifest has {info.bytes} with {info.xxh3}"
        problems.append(Problem(info.name, "", "shard_hash_mismatch", detail))
    try:
        index = root.read_all(index_path(info.name).name)
    except DataError:
        return problems  # reading its rows has said so
    if (found := xxhash.xxh3_64_hexdigest(index)) != info.index_xxh3:
        detail = f"the index has hash {found}, the manifest {info.index_xxh3}"
        problems.append(Problem(info.name, "", "index_hash_mismatch", detail))
    return problems


def _hash_of(root: Root, info: ShardInfo) -> tuple[str, int]:
    """Return hash and size of a tar, read block by block; of one in a store, no more than that.

    A tar in a store that is longer than the manifest says counts as one byte longer.
    """
    if root.folder:
        path = root.folder / info.name
        if not path.is_file():
            raise DataError("missing_shard", f"no tar at {path}")
        return hash_file(path), path.stat().st_size
    digest, size = xxhash.xxh3_64(), 0
    url = root.url_of(info.name)
    try:
        for size in range(0, info.bytes, _HASH_BLOCK):
            block = min(_HASH_BLOCK, info.bytes - size)
            digest.update(root.store.read_range(url, size, block))
        size = info.bytes
        root.store.read_range(url, size, 1)
        size += 1
    except DataError as error:
        if error.reason != "truncated":
            raise
    return str(digest.hexdigest()), size


def _mark_skipped(problems: list[Problem], skip: dict[str, dict[str, str]]) -> list[Problem]:
    """Mark what the skip list leaves out, and sort.

    A tar whose hash is wrong is covered where every damaged sample of it is left out: all other
    samples were just verified one by one. With no damaged sample it stays a problem, since another
    reader may still trip over it.
    """
    marked = [replace(p, skipped=p.key in skip.get(p.shard, {})) for p in problems]
    damaged: dict[str, bool] = {}
    for problem in marked:
        if problem.key:
            damaged[problem.shard] = damaged.get(problem.shard, True) and problem.skipped
    covered = {shard for shard, all_skipped in damaged.items() if all_skipped}
    excused = ("shard_hash_mismatch", "missing_shard")
    return sorted(
        (
            replace(p, skipped=True) if p.reason in excused and p.shard in covered else p
            for p in marked
        ),
        key=lambda p: (p.shard, p.key, p.reason),
    )


def _unknown_files(root: Path, manifest: Manifest) -> list[str]:
    known = {MANIFEST_NAME, LINT_NAME, SKIP_NAME, FOLDER, REJECTED}
    for info in manifest.shards:
        known |= {info.name, index_path(info.name).name}
    names = {path.name for path in root.iterdir()} - known
    return sorted(name for name in names if not any(fnmatch(name, own) for own in _OWN))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def print_report(
    root: str | Path, report: LintReport, console: Console, *, written: Path | None
) -> None:
    """Print the counts by reason and what to do next; `written` is where the report lies."""
    checked = f"{report.num_samples:,} samples in {report.num_shards:,} shards of {root}"
    if not report.problems:
        console.print(f"{checked}: clean", markup=False, highlight=False)
    else:
        state = "problems" if report.failed else "clean but for what skip.json leaves out"
        console.print(f"{checked}: {state}", markup=False, highlight=False)
        table = Table(show_edge=False, pad_edge=False)
        table.add_column("reason")
        table.add_column("samples", justify="right")
        table.add_column("shards", justify="right")
        table.add_column("skipped", justify="right")
        table.add_column("for example", overflow="fold")
        for reason in report.reasons():
            same = [p for p in report.problems if p.reason == reason]
            place = f"{same[0].shard}:{same[0].key}" if same[0].key else same[0].shard
            table.add_row(
                reason,
                str(sum(bool(p.key) for p in same)),
                str(len({p.shard for p in same})),
                str(sum(p.skipped for p in same)),
                Text(place),
            )
        console.print(table)
        all_of_them = written or "nowhere; use --report FILE or --json"
        console.print(f"every one of them: {all_of_them}", markup=False, highlight=False)
    if report.failed and written:
        console.print(f"to leave them out: omni-train data fix {root}", markup=False)
    for name in report.unknown_files:
        console.print(f"not in the manifest: {name}", markup=False, highlight=False)
