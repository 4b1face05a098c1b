"""W&B as a view of `events.jsonl`: an offline run, rebuilt from the file whenever asked.

Training never imports this module before it has ended, so that W&B can neither delay a step nor
lose one. Uploading is a process of its own (`omni-train track sync`), started by whoever has a
network.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import time
import uuid
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import omni_train
from omni_train.tracking.events import read_jsonl, read_steps
from omni_train.tracking.lineage import made_by, read_by

_INIT_TIMEOUT_S = 30.0
# How long W&B's process may take to close the file, and what it logs when it has.
_WRITE_TIMEOUT_S = 10.0
_CLOSED = b"stream: all finished"
# Numbers of a step event that are of no use as a curve.
_NOT_CURVES = {"kind", "time", "step", "keys", "applied"}


def flatten(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the finite numbers of a nested record under `a/b` names."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat.update(flatten(value, f"{name}/"))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[name] = float(value)
    return flat


def _evaluations(events: list[dict[str, Any]]) -> dict[str, float]:
    """Figures of the last `evaluation` event of each task, under its name."""
    found: dict[str, float] = {}
    for event in events:
        if event["kind"] == "evaluation":
            figures = {k: v for k, v in event.items() if k not in ("time", "elapsed_s")}
            found |= flatten(figures, f"{event['task']}/" if "task" in event else "")
    return found


def _audio(run_dir: Path, events: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The waves of `audio` events by task, each with its text, what was heard, and its WER.

    As a list, not a table: W&B keeps a table's media in the user's home, outside the run.
    """
    import wandb

    # A run that was started again has its events twice.
    kept = {(e["task"], e["wave"]): e for e in events if e["kind"] == "audio"}
    found: dict[str, list[Any]] = {}
    for (task, wave), event in kept.items():
        if (run_dir / wave).is_file():
            caption = "{text} | heard: {heard} | WER {wer:.2f} | {speaker} {key}".format(**event)
            found.setdefault(task, []).append(wandb.Audio(str(run_dir / wave), caption=caption))
    return found


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


def _alert(run: Any, events: list[dict[str, Any]]) -> None:
    """Raise an alert for steps that were not finite, and for an end that was none."""
    bad = [event for event in events if event["kind"] == "non_finite"]
    if bad:
        steps = sorted({int(event["step"]) for event in bad})
        run.alert("Non-finite step", f"steps {steps}; the samples are in events.jsonl")
    ends = [event for event in events if event["kind"] == "run_end"]
    if ends and ends[-1]["status"] != "done":
        run.alert(f"Run {ends[-1]['status']}", f"step {ends[-1]['step']}: {ends[-1]['reason']}")


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
        Exception: whatever W&B raises; the caller decides that it does not matter.
    """
    import wandb

    events = list(read_jsonl(run_dir / "events.jsonl"))
    start: dict[str, Any] = next((e for e in events if e["kind"] == "run_start"), {})
    target = run_dir / "wandb"
    staging = run_dir / f"wandb.tmp-{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    run = wandb.init(
        project=project,
        dir=str(staging),
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
        for event in read_steps(run_dir / "events.jsonl"):
            curves = {key: value for key, value in event.items() if key not in _NOT_CURVES}
            run.log(flatten(curves), step=int(event["step"]))
        run.summary.update(_evaluations(events))
        for task, waves in _audio(run_dir, events).items():
            run.log({f"audio/{task}": waves})
        _log_lineage(run, run_dir)
        _alert(run, events)
    finally:
        run.finish()
    _wait_written(staging)
    if target.exists():
        shutil.rmtree(target)
    staging.replace(target)
    return target
