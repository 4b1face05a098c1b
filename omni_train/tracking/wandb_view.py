"""W&B as a view of `events.jsonl`: an offline run, rebuilt from the file whenever asked.

Training never imports this module before it has ended, so that W&B can neither delay a step nor
lose one. Uploading is a process of its own (`omni-train track sync`), started by whoever has a
network.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import omni_train
from omni_train.engine.lock import living_owner
from omni_train.tracking.curves import last_evaluations, read_curves
from omni_train.tracking.events import read_jsonl
from omni_train.tracking.lineage import made_by, read_by
from omni_train.tracking.samples import Cell, MediaType, media_type, read_tables

_INIT_TIMEOUT_S = 30.0
# How long W&B's process may take to close the file, and what it logs when it has.
_WRITE_TIMEOUT_S = 10.0
_CLOSED = b"stream: all finished"
# Where W&B puts what belongs to artifacts, media of tables among it; else in the user's home.
_DATA_DIR = "WANDB_DATA_DIR"


def _cell(cell: Cell) -> Any:
    """Return a cell as W&B shows it."""
    import wandb

    if not isinstance(cell, Path):
        return cell
    shown = {
        MediaType.audio: wandb.Audio,
        MediaType.image: wandb.Image,
        MediaType.video: lambda path: wandb.Video(path, format=Path(path).suffix[1:].lower()),
    }
    kind = media_type(cell)
    return shown[kind](str(cell)) if kind else None


def _log_tables(run: Any, run_dir: Path, events: list[dict[str, Any]]) -> None:
    """Log the samples that the run kept: texts and numbers beside what is heard and seen."""
    import wandb

    for title, table in read_tables(run_dir, events).items():
        rows = [[_cell(cell) for cell in row] for row in table.rows]
        run.log({title: wandb.Table(columns=table.columns, data=rows)})


def _log_lineage(run: Any, run_dir: Path) -> None:
    """Log what the run read and made, by reference: W&B copies nothing."""
    import wandb

    def artifact(item: Any) -> Any:
        made = wandb.Artifact(item.name, item.kind)
        # It says of every address that it cannot check it; the hash stands in the address.
        with redirect_stderr(io.StringIO()):
            made.add_reference(item.address, name=item.name)
        return made

    for item in read_by(run_dir, Path(omni_train.__file__).parents[1]):
        # What use_artifact does with one that is not uploaded yet, but for its refusal offline.
        run._log_artifact(artifact(item), is_user_created=True, use_after_commit=True)
    for item in made_by(run_dir):
        run.log_artifact(artifact(item))


def _alert(run: Any, run_dir: Path, events: list[dict[str, Any]]) -> None:
    """Raise an alert for steps that were not finite, and for an end that was none."""
    bad = [event for event in events if event["kind"] == "non_finite"]
    if bad:
        steps = sorted({int(event["step"]) for event in bad})
        run.alert("Non-finite step", f"steps {steps}; the samples are in events.jsonl")
    told = [event for event in events if event["kind"] in ("run_start", "run_resume", "run_end")]
    if not told:
        return
    if told[-1]["kind"] != "run_end":
        # Killed, or hung until it was: who starts the ranks writes down what it saw.
        if not living_owner(run_dir / "lock"):
            run.alert("Run died", _reason(run_dir) or "it left no end; see its logs")
    elif told[-1]["status"] != "done":
        run.alert(f"Run {told[-1]['status']}", f"step {told[-1]['step']}: {told[-1]['reason']}")


def _reason(run_dir: Path) -> str:
    path = run_dir / "state.json"
    return str(json.loads(path.read_bytes()).get("reason", "")) if path.exists() else ""


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Have W&B keep all of a run below `folder`."""
    before = os.environ.pop(_DATA_DIR, None)
    os.environ[_DATA_DIR] = str(folder.absolute() / "wandb" / "data")
    try:
        yield
    finally:
        del os.environ[_DATA_DIR]
        if before is not None:
            os.environ[_DATA_DIR] = before


def _wait_written(folder: Path) -> None:
    """Wait for W&B's own process: after a second run in one process, `finish` returns before it."""
    deadline = time.monotonic() + _WRITE_TIMEOUT_S
    while time.monotonic() < deadline:
        logs = folder.glob("wandb/offline-run-*/logs/debug-internal.log")
        closed = any(_CLOSED in path.read_bytes() for path in logs)
        if closed and all(p.stat().st_size > 0 for p in folder.glob("wandb/offline-run-*/*.wandb")):
            return
        time.sleep(0.05)


def write_wandb(run_dir: Path, *, project: str, config: dict[str, Any] | None = None) -> Path:
    """Rebuild the offline W&B run of `run_dir` and return its directory.

    The run's id is derived from the run directory's own id, so a second upload continues the same
    W&B run. Group is the experiment, job type the stage, both as the `run_start` event says.

    Args:
        run_dir: run directory.
        project: W&B project.
        config: settings to show, already free of secrets.

    Raises:
        Exception: whatever W&B raises; the caller decides that it does not matter. What was there
            before is then still there.
    """
    target, before = run_dir / "wandb", run_dir / "wandb.before"
    # W&B notes where its files lie, so the view is written where it stays.
    if target.exists():
        shutil.rmtree(before, ignore_errors=True)
        target.rename(before)
    target.mkdir()
    try:
        _write(run_dir, target, project, config)
    except BaseException:
        shutil.rmtree(target)
        if before.exists():
            before.rename(target)
        raise
    shutil.rmtree(before, ignore_errors=True)
    return target


def _write(run_dir: Path, target: Path, project: str, config: dict[str, Any] | None) -> None:
    import wandb

    events = list(read_jsonl(run_dir / "events.jsonl"))
    start: dict[str, Any] = next((e for e in events if e["kind"] == "run_start"), {})
    with _inside(target):
        run = wandb.init(
            project=project,
            dir=str(target),
            id=hashlib.sha256(str(start.get("run_id", run_dir.name)).encode()).hexdigest()[:12],
            name=str(start.get("stage", run_dir.name)),
            group=str(start.get("experiment", "")) or None,
            job_type=str(start.get("stage", "")) or None,
            config=config,
            mode="offline",
            reinit="create_new",
            settings=wandb.Settings(
                # Arguments, host and code stay out of the file; a token may be among them.
                x_disable_meta=True,
                # The machine's state at each step is in the events; W&B would measure now.
                x_disable_stats=True,
                disable_git=True,
                disable_code=True,
                save_code=False,
                console="off",
                silent=True,
                init_timeout=_INIT_TIMEOUT_S,
            ),
        )
        try:
            for point in read_curves(events):
                run.log(point.figures, step=point.step)
            run.summary.update(last_evaluations(events))
            _log_tables(run, run_dir, events)
            _log_lineage(run, run_dir)
            _alert(run, run_dir, events)
        finally:
            run.finish()
        _wait_written(target)
