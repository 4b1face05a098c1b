"""`omni-train runs`: which runs there are, how one went, how two differ, what may be deleted.

A run is a directory with `events.jsonl`, or one that was sent to SLURM and has not begun. All is
read from what the run itself wrote, and from SLURM; nothing is kept beside it. Following a run is
runs_tail.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.failures import guarded
from omni_train.config.errors import ConfigError
from omni_train.engine.exit_codes import ExitCode
from omni_train.engine.lock import living_owner
from omni_train.tracking.events import read_jsonl, read_steps

if TYPE_CHECKING:
    from launch.slurm_state import JobState

# How far below the given directory runs are looked for.
_DEPTH = 4
ACTIONS = ("list", "show", "diff", "tail", "clean")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """A run in one line.

    Args:
        path: of its directory. stage: of the recipe.
        status: running, done, failed, preempted; died where it says running and nobody owns it, or
            its job is over; sent where its job has not begun.
        step, max_steps: done, and to be done. loss, tokens_per_s: of the last step.
        ranks: processes. exit_code, reason: how it ended. changed: seconds since the last event.
        job: number, state and reason of its job; empty where it was not sent to SLURM.
    """

    path: str
    stage: str
    status: str
    step: int
    max_steps: int | None
    loss: float | None
    tokens_per_s: float | None
    ranks: int | None
    exit_code: int | None
    reason: str
    changed: float | None
    job: str


def add_runs(command: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    command.add_argument("action", nargs="?", choices=ACTIONS, default="list")
    command.add_argument("paths", nargs="*", type=Path, help="run directories; to list and clean,"
                         " where they lie (default runs)")  # fmt: skip
    command.add_argument("--once", action="store_true", help="tail: print what is there and end")
    command.add_argument("--keep", type=int, help="clean: checkpoints to keep in each run")
    command.add_argument("--yes", action="store_true", help="clean: delete, instead of only naming")
    command.add_argument("--json", action="store_true", help="print JSON")


@guarded
def run_runs(args: argparse.Namespace) -> int:
    """Run one of the actions and return its exit code."""
    _check(args)
    if args.action == "tail":
        from launch.runs_tail import tail

        return tail(args.paths[0], once=args.once, as_json=args.json)
    if args.action == "show":
        return _show(args.paths[0], as_json=args.json)
    if args.action == "diff":
        return _diff(*args.paths, as_json=args.json)
    root = args.paths[0] if args.paths else Path("runs")
    if args.action == "clean":
        return _clean(root, keep=args.keep, really=args.yes, as_json=args.json)
    return _list(root, as_json=args.json)


def _check(args: argparse.Namespace) -> None:
    wanted = {"list": (0, 1), "clean": (0, 1), "show": (1, 1), "tail": (1, 1), "diff": (2, 2)}
    low, high = wanted[args.action]
    if not low <= len(args.paths) <= high:
        raise ConfigError(
            key=f"runs {args.action}",
            value=[str(path) for path in args.paths],
            rule=f"takes {low if low == high else f'{low} or {high}'} directories",
            remedy=f"for example: omni-train runs {args.action} {' '.join(['runs/NAME'] * high)}",
        )
    for name, action in (("once", "tail"), ("keep", "clean"), ("yes", "clean")):
        if getattr(args, name) not in (None, False) and args.action != action:
            raise ConfigError(
                key=f"--{name}",
                value=getattr(args, name),
                rule=f"it belongs to runs {action}",
                remedy="leave it out",
            )
    if args.keep is not None and args.keep < 1:
        raise ConfigError(
            key="--keep", value=args.keep, rule="one checkpoint stays", remedy="give 1 or more"
        )


def find_runs(root: Path) -> list[Path]:
    """Return the run directories below `root`, or `root` itself, by name."""
    if not root.is_dir():
        raise FileNotFoundError(2, "no such directory", str(root))
    return sorted(_runs_below(root, _DEPTH))


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "events.jsonl").is_file():
        yield folder
        return
    if (folder / "job.json").is_file() and _sent(folder):
        yield folder  # the runs of an array lie below it
    if depth:
        for child in folder.iterdir():
            if child.is_dir() and not child.is_symlink():
                yield from _runs_below(child, depth - 1)


def _sent(folder: Path) -> bool:
    from launch.slurm_state import job_number  # late: help must be quick

    return bool(job_number(folder))


def existing_run(path: Path, *, begun: bool = True) -> Path:
    """Return the path of a run, or raise FileNotFoundError with what is missing.

    Args:
        path: of its directory.
        begun: whether one that was only sent to SLURM is none yet.
    """
    if not (path / "events.jsonl").is_file() and (begun or not _sent(path)):
        raise FileNotFoundError(2, "no run there (it has no events.jsonl)", str(path))
    return path


def read_state(run: Path) -> dict[str, Any]:
    """Return what `state.json` says; empty where it cannot be read."""
    try:
        state = json.loads((run / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def status_of(run: Path, state: dict[str, Any], job: JobState | None = None) -> str:
    """Return the status; a run that says it is running and that nobody owns has died."""
    status = str(state.get("status", "unknown" if job is None else "sent"))
    gone = (job is not None and job.over) or not living_owner(run / "lock")
    return "died" if status == "running" and gone else status


def describe_run(run: Path, job: JobState | None = None) -> RunRow:
    """Read a run's line.

    Args:
        run: its directory.
        job: what SLURM says of it; None where it was not sent there.
    """
    state, log = read_state(run), run / "events.jsonl"
    started: dict[str, Any] = {}
    latest = 0.0
    for event in read_jsonl(log):
        latest = float(event.get("time", latest))
        if event.get("kind") in {"run_start", "run_resume", "fit_start"}:
            started |= event
    steps = read_steps(log)
    last = steps[-1] if steps else {}
    return RunRow(
        path=str(run),
        stage=str(state.get("stage") or started.get("stage", "")),
        status=status_of(run, state, job),
        step=int(last.get("step", state.get("step", 0))),
        max_steps=started.get("max_steps"),
        loss=None if "loss" not in last else float(last["loss"]),
        tokens_per_s=last.get("tokens_per_s"),
        ranks=started.get("ranks"),
        exit_code=state.get("exit_code"),
        reason=str(state.get("reason", "")),
        changed=round(time.time() - latest, 1) if latest else None,
        job="" if job is None else str(job),
    )


def _described(runs: list[Path]) -> list[RunRow]:
    from launch.slurm_state import job_states

    jobs = job_states(runs)
    return [describe_run(run, jobs.get(run)) for run in runs]


def _list(root: Path, *, as_json: bool) -> int:
    rows = _described(find_runs(root))
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return int(ExitCode.done)
    from launch.runs_text import print_list

    print_list(rows, root)
    return int(ExitCode.done)


def _show(run: Path, *, as_json: bool) -> int:
    (row,) = _described([existing_run(run, begun=False)])
    events = list(read_jsonl(run / "events.jsonl"))
    counts: dict[str, int] = {}
    for event in events:
        counts[str(event.get("kind"))] = counts.get(str(event.get("kind")), 0) + 1
    start = next((event for event in events if event.get("kind") == "run_start"), {})
    reasons: dict[str, int] = {}
    for entry in read_jsonl(run / "ledger.jsonl"):
        reason = str(entry.get("reason", "")).partition(":")[0]
        reasons[reason] = reasons.get(reason, 0) + 1
    folders = sorted((run / "checkpoints").glob("step-*"), key=lambda path: path.name)
    values = {
        **asdict(row),
        "versions": start.get("versions", {}),
        "events": counts,
        "ledger": reasons,
        "checkpoints": [path.name for path in folders if (path / "manifest.json").is_file()],
        "incomplete": [path.name for path in folders if not (path / "manifest.json").is_file()],
        "seconds": round(sum(_spans(events)), 1),
    }
    if as_json:
        print(json.dumps(values, indent=1))
    else:
        from launch.runs_text import print_run

        print_run(values)
    return int(ExitCode.done)


def _spans(events: list[dict[str, Any]]) -> Iterator[float]:
    """Seconds of each start of a run; the clock of the next one begins anew."""
    before = 0.0
    for event in events:
        now = float(event.get("elapsed_s", before))
        if now < before:
            yield before
        before = now
    yield before


def differences(first: Path, second: Path) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Return what differs in settings, data and code: key -> (first, second); None where absent."""
    found: dict[str, dict[str, tuple[Any, Any]]] = {}
    sides = [_identity(existing_run(run)) for run in (first, second)]
    for part in ("settings", "data", "code", "versions"):
        one, two = (side[part] for side in sides)
        keys = sorted(one.keys() | two.keys())
        found[part] = {
            key: (one.get(key), two.get(key)) for key in keys if one.get(key) != two.get(key)
        }
    return found


def _identity(run: Path) -> dict[str, dict[str, Any]]:
    import yaml  # late: help must be quick

    from omni_train.engine.fingerprint import flatten

    recorded = json.loads((run / "fingerprint.json").read_text(encoding="utf-8"))
    settings = yaml.safe_load((run / "resolved.yaml").read_text(encoding="utf-8"))
    return {
        "settings": flatten(settings),
        "data": recorded.get("data", {}),
        "code": {**recorded.get("code", {}), "git": recorded.get("git", "")},
        "versions": recorded.get("versions", {}),
    }


def _diff(first: Path, second: Path, *, as_json: bool) -> int:
    found = differences(first, second)
    if as_json:
        print(json.dumps(found, indent=1))
        return int(ExitCode.done)
    from launch.runs_text import print_differences

    print_differences(found, (str(first), str(second)))
    return int(ExitCode.done)


def removable(run: Path, *, keep: int | None) -> list[Path]:
    """Return what a run does not need: leftovers, quarantine, and old checkpoints if asked.

    Args:
        run: its directory; one that somebody owns is left alone.
        keep: complete checkpoints that stay; None leaves all of them.
    """
    if living_owner(run / "lock"):
        return []
    found = list((run / "checkpoints").glob("*.tmp-*"))
    if (run / "quarantine").is_dir():
        found.append(run / "quarantine")
    if keep is not None:
        from omni_train.engine.checkpoint_files import step_folders

        folders = step_folders(run / "checkpoints")
        whole = [path for path in folders if (path / "manifest.json").is_file()]
        found += whole[keep:]
    return sorted(found)


def _clean(root: Path, *, keep: int | None, really: bool, as_json: bool) -> int:
    rows: list[tuple[Path, int]] = []
    for run in find_runs(root):
        for path in removable(run, keep=keep):
            files = [file for file in path.rglob("*") if file.is_file()]
            rows.append((path, sum(file.stat().st_size for file in files)))
            if really:
                shutil.rmtree(path)
    if as_json:
        found = [{"path": str(path), "bytes": size} for path, size in rows]
        print(json.dumps({"deleted": really, "found": found}, indent=1))
        return int(ExitCode.done)
    for path, size in rows:
        print(f"{size / 1e6:12,.1f} MB  {path}")
    total = sum(size for _, size in rows) / 1e6
    what = "deleted" if really else "would be deleted; add --yes"
    if not rows:
        more = "" if keep is not None else "; --keep N takes older checkpoints too"
        print(f"nothing to delete: no leftovers of killed saves, no quarantine{more}")
    else:
        print(f"{len(rows)} directories, {total:,.1f} MB {what}")
    return int(ExitCode.done)
