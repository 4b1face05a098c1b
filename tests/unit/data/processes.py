"""What the data workers of a process are, and what is left of them; work for them to do.

The functions that make results are found by the workers under this module's name.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

At = Callable[[int], None]
_SHARED_MEMORY = Path("/dev") / "shm"


def children(pid: int) -> list[int]:
    """Processes that another one started and that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            state, parent = stat.rpartition(")")[2].split()[:2]
            if int(parent) == pid and state not in "ZX":
                found.append(int(entry.name))
    return found


def starters(pid: int) -> list[int]:
    """Those of a process's children that start data workers; it may have others."""
    found = []
    for child in children(pid):
        try:
            line = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue
        if b"omni_train.data.worker" in line:
            found.append(child)
    return found


def workers_of(pid: int, number: int) -> list[int]:
    """The data workers of a process, once there are so many."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = sorted(worker for child in starters(pid) for worker in children(child))
        if len(found) == number:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{len(found)} workers, not {number}")


def wait_until(condition: Callable[[], bool], limit_s: float) -> float:
    """Return after how many seconds something holds; fail where it does not within the limit."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < limit_s, "waited too long"
        time.sleep(0.01)
    return time.monotonic() - start


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def shared_files(pid: int) -> set[str]:
    """Files in the machine's shared memory that a process has mapped; it is for others too."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.partition("/")[2] for line in lines if f"{_SHARED_MEMORY}/" in line}


def describe(work: Any, sample: int) -> str:
    return f"{work!r} at {sample}"


def tensors(work: tuple[int, float], at: At) -> dict[str, Any]:
    """Some bytes, after some seconds."""
    size, seconds = work
    time.sleep(seconds)
    return {"bytes": torch.full((size,), size % 251, dtype=torch.uint8), "pid": os.getpid()}


def mixed(work: int, at: At) -> dict[str, Any]:
    made = torch.arange(work * 6)
    return {
        "strided": made.reshape(work, 6).T,
        "empty": [torch.empty(0, 3, dtype=torch.uint8), torch.zeros(2, 0)],
        "flags": (made > 2, made.to(torch.float32)),
        "text": f"item {work}",
    }


def noted(work: tuple[str, int], at: At) -> torch.Tensor:
    """A result that leaves a file behind when it is made."""
    folder, size = work
    path = Path(folder) / f"{time.monotonic_ns()}-{os.getpid()}"
    path.touch()
    return torch.zeros(size, dtype=torch.uint8)


def ends(work: tuple[str, int], at: At) -> int:
    """End in some way at the third sample; `sleep` waits for being ended."""
    what, number = work
    at(3)
    if what == "raise":
        raise KeyError(f"no such {number}")
    if what == "exit":
        os._exit(number)
    if what == "signal":
        os.kill(os.getpid(), signal.Signals(number))
    if what == "sleep":
        time.sleep(600)
    return number
