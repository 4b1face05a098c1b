"""What lint found becomes a skip list; the data themselves are never edited.

    lint.json -> skip.json, which the loader honours

Entries that are there already stay, whoever wrote them: this adds and never removes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash
from rich.console import Console

from data_pipelines.lint import LINT_NAME, SCHEMA_VERSION, Problem
from omni_train.config.errors import ConfigError, DataError
from omni_train.data.index import MANIFEST_NAME
from omni_train.data.skiplist import SKIP_NAME, read_skip_list, write_skip_list
from omni_train.data.stores import Root, open_root


@dataclass(frozen=True, slots=True)
class FixReport:
    """What a skip list holds now.

    Args:
        written: path of the skip list; empty where there is nothing to leave out.
        num_added: samples that were not in it before.
        num_skipped: samples in it now.
        left: problems of whole shards, which leaving samples out does not mend.
    """

    written: str
    num_added: int
    num_skipped: int
    left: list[Problem]

    def as_dict(self) -> dict[str, Any]:
        """The same, for JSON."""
        return asdict(self)


def fix_set(
    path: str | Path, *, report_path: Path | None = None, out: Path | None = None
) -> FixReport:
    """Write a skip list from lint's report.

    Args:
        path: directory or URL of the set.
        report_path: what lint wrote; None means `lint.json` in the set's directory.
        out: the skip list; None means `skip.json` in the set's directory. One that is written
            elsewhere takes effect when it lies there.

    Raises:
        ConfigError: a set in a store without the two.
        FileNotFoundError: the set was never checked.
        DataError: `stale_lint` where the set has changed since, `corrupt_lint`, and what
            `read_skip_list` raises.
        RunError: a URL of a scheme that is not read.
    """
    root = open_root(path)
    if root.folder is None and not (report_path and out):
        raise ConfigError(
            key="--report and --out",
            value=str(path),
            rule="nothing is written into an object store",
            remedy=f"give lint's report and a local {SKIP_NAME}; then copy that beside the shards",
        )
    problems = _read_problems(root, report_path)
    skip = read_skip_list(root)
    before = sum(map(len, skip.values()))
    for problem in problems:
        if problem.key:
            skip.setdefault(problem.shard, {}).setdefault(problem.key, problem.reason)
    after = sum(map(len, skip.values()))
    target = out or (root.folder / SKIP_NAME if root.folder else None)
    assert target is not None, path
    if after:
        write_skip_list(target.parent, skip, name=target.name)
    damaged = {problem.shard for problem in problems if problem.key}
    mended = ("shard_hash_mismatch", "missing_shard")
    left = [p for p in problems if not p.key and not (p.reason in mended and p.shard in damaged)]
    written = str(target) if after else ""
    return FixReport(written=written, num_added=after - before, num_skipped=after, left=left)


def _read_problems(root: Root, report_path: Path | None) -> list[Problem]:
    path = report_path or Path(root.url_of(LINT_NAME))
    try:
        record = json.loads(path.read_bytes())
        if record["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {record['schema_version']!r}")
        checked = str(record["manifest_xxh3"])
        problems = [Problem(**entry) for entry in record["problems"]]
    except (FileNotFoundError, NotADirectoryError) as error:
        remedy = f"check the set first: omni-train data lint {root.location}"
        raise FileNotFoundError(f"there is no {path}; {remedy}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError("corrupt_lint", f"{path} is not what lint writes: {error}") from error
    if xxhash.xxh3_64_hexdigest(root.read_all(MANIFEST_NAME)) != checked:
        remedy = f"run lint again: omni-train data lint {root.location}"
        raise DataError("stale_lint", f"{root.location} has changed since {path}; {remedy}")
    return problems


def print_report(report: FixReport, console: Console) -> None:
    """Say what was written and what is left."""
    written = f"{report.num_skipped:,} samples, {report.num_added:,} of them new"
    lines = [f"{report.written}: {written}" if report.written else "no sample to leave out"]
    lines += [f"not mended by leaving samples out: {p.shard}: {p.reason}" for p in report.left]
    if report.left:
        lines.append("make these shards anew, or index them again: omni-train data index")
    for line in lines:
        console.print(line, markup=False, highlight=False)
