"""How the tests of this folder start, watch and kill a recipe."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launch.local import child_environment
from launch.stages import REPO

RUN_LIMIT_S = 240.0


def start(recipe: str, overrides: list[str], *, ranks: int) -> subprocess.Popen[bytes]:
    """Start a recipe under torchrun, in a process group of its own."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes=1", f"--nproc-per-node={ranks}", "--max-restarts=0"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
            *("-m", f"recipes.{recipe}", *overrides),
        ],
        cwd=REPO,
        env=child_environment(ranks=ranks),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Wait for a recipe; return its status and what it printed."""
    output, _ = process.communicate(timeout=RUN_LIMIT_S)
    return process.returncode, output.decode(errors="replace")


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait until `condition` holds while the process lives."""
    limit = time.monotonic() + RUN_LIMIT_S
    while not condition():
        assert process.poll() is None, finish(process)[1]
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    """Process ids of the direct children, in the order they were started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry.name))
    return sorted(found)


def kill(pid: int) -> None:
    """Kill without a chance to clean up."""
    os.kill(pid, 9)
