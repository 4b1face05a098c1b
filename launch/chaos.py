"""Arguments of `omni-train chaos`; what it does is in chaos_run.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

KINDS = (
    "kill-rank",
    "hang-rank",
    "nan",
    "disk-full",
    "torn-checkpoint",
    "wandb-down",
    "preempt",
)


def add_chaos(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command.

    Args:
        add: (name, summary, *examples) -> parser.
    """
    chaos = add(
        "chaos",
        "Let faults happen to a copy of a run; compare what it made of them with what it should.",
        "omni-train chaos runs/audio --fault kill-rank@3 --fault nan@2",
        "omni-train chaos runs/audio --fault preempt@4 --ranks 2 --json",
        "omni-train chaos runs/audio                every fault, in step 3",
    )
    chaos.add_argument("run", type=Path, help="directory of a training run; it is only read")
    chaos.add_argument("--fault", action="append", metavar="KIND[@STEP]", default=[],
                       help=f"one of {', '.join(KINDS)}; may be given several times")  # fmt: skip
    chaos.add_argument("--ranks", type=int, help="processes; the default is as many as the run had")
    chaos.add_argument("--out", type=Path, help="where the copies go; default RUN-chaos")
    chaos.add_argument("--keep", action="store_true", help="keep the copies, not only failed ones")
    chaos.add_argument("--json", action="store_true", help="print JSON")


def run_chaos(args: argparse.Namespace) -> int:
    """Run the faults and return the exit code."""
    from launch.chaos_run import chaos

    return chaos(args)
