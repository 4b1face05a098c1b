"""Exclusive ownership of a run directory.

An flock that the kernel drops when the owner dies, and in the file who that owner is. The file
stays after the run; only the flock says whether somebody holds it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from omni_train.engine.exit_codes import ExitCode, RunError

# A killed owner's worker processes hold its flock until they notice.
_DYING_OWNER_WAIT_S = 10.0


class RunLock:
    """One owner at a time, across processes of a machine and, by name, across machines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def acquire(self, name: str) -> None:
        """Take the lock.

        Args:
            name: of the run, for the message that a second process gets.

        Raises:
            RunError: a living process owns it, or one of another machine does (exit code 73).
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+", encoding="utf-8")
        deadline = time.monotonic() + _DYING_OWNER_WAIT_S
        while not _try_flock(file):
            owner = _owner_in(file)
            dead = owner.get("host") == socket.gethostname() and not _alive(owner.get("pid"))
            if not dead or time.monotonic() > deadline:
                file.close()
                raise self._refusal(owner)
            time.sleep(0.1)
        owner = _owner_in(file)
        # Network file systems may not share flocks, so another host's name counts by itself.
        if owner and owner.get("host") != socket.gethostname():
            file.close()
            raise self._refusal(owner)
        record = {"host": socket.gethostname(), "pid": os.getpid(), "run": name}
        file.truncate(0)
        file.write(json.dumps({**record, "since": round(time.time(), 3)}))
        file.flush()
        os.fsync(file.fileno())
        self._file = file

    def release(self) -> None:
        """Give the lock back; harmless where it was never taken."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None

    def _refusal(self, owner: dict[str, object]) -> RunError:
        who = f"process {owner.get('pid')} on {owner.get('host')} (run {owner.get('run')!r})"
        return RunError(
            ExitCode.locked,
            f"{self.path.parent} belongs to {who}; wait for it or use another run.dir. If it is "
            f"surely gone, delete {self.path.name} there",
        )


def _try_flock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owner_in(file: IO[str]) -> dict[str, object]:
    file.seek(0)
    try:
        owner = json.loads(file.read())
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _alive(pid: object) -> bool:
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def living_owner(path: Path) -> dict[str, object]:
    """Return who holds the lock `path` now: host, pid, run, since; empty where nobody does.

    An owner on another machine is believed, as its process cannot be seen from here.
    """
    try:
        with path.open("r", encoding="utf-8") as file:
            owner = _owner_in(file)
            if owner.get("host") not in (None, socket.gethostname()):
                return owner
            if not _try_flock(file):
                return owner
            fcntl.flock(file.fileno(), fcntl.LOCK_UN)
    except OSError:
        return {}
    return {}
