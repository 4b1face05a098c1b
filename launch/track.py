"""`omni-train track`: write the views of runs anew, W&B's and TensorBoard's; upload W&B's.

The views come from the run directories alone, so this works on any machine that sees them, long
after the run. A run keeps its W&B id, through every preemption.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from omni_train.config.errors import ConfigError, DataError
from omni_train.engine.exit_codes import ExitCode, RunError

Add = Callable[..., argparse.ArgumentParser]


def add_track(add: Add) -> None:
    """Add the command.

    Args:
        add: (name, summary, *examples) -> parser.
    """
    track = add(
        "track",
        "Rebuild the W&B or TensorBoard view of runs from their events; upload W&B's.",
        "omni-train track sync runs/demo/text_lm",
        "omni-train track sync runs/demo/* --offline",
        "omni-train track tensorboard runs/demo/*      then: tensorboard --logdir runs/demo",
    )
    track.add_argument(
        "action", choices=["sync", "tensorboard"], help="W&B's view, uploaded; or TensorBoard's"
    )
    track.add_argument("runs", nargs="+", type=Path, help="run directories")
    track.add_argument("--offline", action="store_true", help="sync: only rebuild, upload nothing")


def run_track(args: argparse.Namespace) -> int:
    """Rebuild, upload, and return the exit code."""
    from launch.failures import describe

    code = 0
    for run_dir in args.runs:
        try:
            if not (run_dir / "events.jsonl").is_file():
                raise FileNotFoundError(f"there is no run in {run_dir}; give a run directory")
            if args.action == "tensorboard":
                _tensorboard(run_dir, offline=args.offline)
            else:
                code = _sync(run_dir, offline=args.offline) or code
        except (ConfigError, DataError, RunError, OSError) as error:
            found, text = describe(error)
            print(f"omni-train: {text}", file=sys.stderr)
            code = int(found)
    return code


def _tensorboard(run_dir: Path, *, offline: bool) -> None:
    from omni_train.tracking.tensorboard_view import write_tensorboard

    if offline:
        raise ConfigError(
            key="--offline", value=True, rule="it belongs to track sync", remedy="leave it out"
        )
    print(f"{run_dir}: {write_tensorboard(run_dir)}")


def _sync(run_dir: Path, *, offline: bool) -> int:
    import yaml

    from omni_train.tracking.wandb_view import write_wandb

    path = run_dir / "resolved.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    project = settings.get("tracking", {}).get("project", "omni-train")
    home = write_wandb(run_dir, project=project, config=settings)
    (offline_run,) = home.glob("wandb/offline-run-*")
    print(f"{run_dir}: {offline_run}")
    if offline:
        return 0
    command = [sys.executable, "-m", "wandb", "sync", "--no-mark-synced", str(offline_run)]
    done = subprocess.run(command, check=False)
    return int(ExitCode.done if done.returncode == 0 else ExitCode.usage)
