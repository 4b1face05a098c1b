"""What lint found becomes a skip list; the data themselves are never edited.

    lint.json -> skip.json, which the loader honours

Entries that are there already stay, whoever wrote them: this adds and never removes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from data_pipelines.lint import LINT_NAME, SCHEMA_VERSION, Problem
from omni_train.config.errors import DataError
from omni_train.data.index import MANIFEST_NAME, hash_file
from omni_train.data.skiplist import SKIP_NAME, read_skip_list, write_skip_list


@dataclass(frozen=True, slots=True)
class FixReport:
    """What a skip list holds now.

    Args:
        num_added: samples that were not in it before.
        num_skipped: samples in it now.
        left: problems of whole shards, which leaving samples out does not mend.
    """

    num_added: int
    num_skipped: int
    left: list[Problem]

    def as_dict(self) -> dict[str, Any]:
        """The same, for JSON."""
        return asdict(self)


def fix_set(root: str | Path) -> FixReport:
    """Write `skip.json` from `lint.json`.

    Raises:
        FileNotFoundError: the set was never checked.
        DataError: `stale_lint` where the set has changed since, `corrupt_lint`, and what
            `read_skip_list` raises.
    """
    root = Path(root)
    problems = _read_problems(root)
    skip = read_skip_list(root)
    before = sum(map(len, skip.values()))
    for problem in problems:
        if problem.key:
            skip.setdefault(problem.shard, {}).setdefault(problem.key, problem.reason)
    after = sum(map(len, skip.values()))
    if after:
        write_skip_list(root, skip)
    damaged = {problem.shard for problem in problems if problem.key}
    mended = ("shard_hash_mismatch", "missing_shard")
    left = [p for p in problems if not p.key and not (p.reason in mended and p.shard in damaged)]
    return FixReport(num_added=after - before, num_skipped=after, left=left)


def _read_problems(root: Path) -> list[Problem]:
    path = root / LINT_NAME
    try:
        record = json.loads(path.read_bytes())
        if record["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {record['schema_version']!r}")
        checked = str(record["manifest_xxh3"])
        problems = [Problem(**entry) for entry in record["problems"]]
    except FileNotFoundError as error:
        remedy = f"check the set first: omni-train data lint {root}"
        raise FileNotFoundError(f"no {LINT_NAME} in {root}; {remedy}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError("corrupt_lint", f"{path} is not what lint writes: {error}") from error
    if hash_file(root / MANIFEST_NAME) != checked:
        raise DataError("stale_lint", f"{root} has changed since {LINT_NAME}; run lint again")
    return problems


def print_report(root: str | Path, report: FixReport, console: Console) -> None:
    """Say what was written and what is left."""
    written = f"{report.num_skipped:,} samples, {report.num_added:,} of them new"
    lines = [f"{Path(root) / SKIP_NAME}: {written}"]
    if not report.num_skipped:
        lines = ["no sample to leave out"]
    lines += [f"not mended by leaving samples out: {p.shard}: {p.reason}" for p in report.left]
    if report.left:
        lines.append("make these shards anew, or index them again: omni-train data index")
    for line in lines:
        console.print(line, markup=False, highlight=False)
