"""`omni-train test`: formatting, lint, types and tests, one after the other, each with its time."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

from launch.local import child_environment
from launch.stages import REPO

# Files are dealt to two processes; tests of one file share what is costly to make.
_WORKERS = ("-n", "2", "--dist", "loadfile")


def parts(*, full: bool, pytest_args: Sequence[str] = ()) -> list[tuple[str, list[str]]]:
    """Return what is run, by name. With arguments of its own, pytest is run alone."""
    python = [sys.executable, "-m"]
    selection = [] if full else ["-m", "not slow"]
    if pytest_args:
        return [("tests", [*python, "pytest", *selection, *pytest_args])]
    tests = ("tests", [*python, "pytest", *selection, *_WORKERS, "--durations=10"])
    return [
        ("format", [*python, "ruff", "format", "--check", "."]),
        ("lint", [*python, "ruff", "check", "."]),
        ("types", [*python, "mypy"]),
        tests,
    ]


def run_tests(*, full: bool, pytest_args: Sequence[str] = ()) -> int:
    """Run every part, also after one failed; return 0 only where all passed."""
    # One thread: the tests start ranks of their own, and two of those fill a small machine.
    environment = child_environment(ranks=2)
    results: list[tuple[str, int, float]] = []
    for name, command in parts(full=full, pytest_args=pytest_args):
        print(f"== {name}: {' '.join(command[2:])}", flush=True)
        started = time.monotonic()
        status = subprocess.run(command, cwd=REPO, env=environment, check=False).returncode
        results.append((name, status, time.monotonic() - started))
    print("== summary")
    for name, status, seconds in results:
        print(f"{name:8} {'ok' if status == 0 else f'FAILED ({status})':12} {seconds:7.1f} s")
    return int(any(status for _, status, _ in results))
