"""Exclusive ownership of a run directory.

An flock that the kernel drops when the owner dies, and in the file who that owner is. The file
stays after the run; only the flock says whether somebody holds it. An owner on another machine may
hold an flock that is not seen here: its name counts, and beside the file its heartbeat, which only
somebody who asks to take over may overrule, once it stands still.
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
from omni_train.engine.heartbeat import BEAT_S, WATCH_S, Heartbeat, beats

# A killed owner's worker processes hold its flock until they notice.
_DYING_OWNER_WAIT_S = 10.0


class RunLock:
    """One owner at a time, across processes of a machine and, by name, across machines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None
        self._heart: Heartbeat | None = None

    @property
    def _beat_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.beat")

    def acquire(
        self,
        name: str,
        *,
        take_over: bool | None = None,
        beat_s: float = BEAT_S,
        watch_s: float = WATCH_S,
    ) -> None:
        """Take the lock, and give a sign of life until it is released.

        Args:
            name: of the run, for the message that a second process gets.
            take_over: replace an owner on another machine whose heartbeat stands still; None where
                that is not on offer, and no heartbeat is given either.
            beat_s: seconds between two signs of life.
            watch_s: how long another owner's are waited for.

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
                raise self._refusal(owner, take_over)
            time.sleep(0.1)
        owner = _owner_in(file)
        # Network file systems may not share flocks, so another host's name counts by itself; but
        # a job that its scheduler started again, on other machines, has no earlier self alive.
        again = launch_id() is not None and owner.get("launch") == launch_id()
        foreign = bool(owner) and owner.get("host") != socket.gethostname() and not again
        if foreign and (not take_over or beats(self._beat_path, watch_s=watch_s)):
            file.close()
            raise self._refusal(owner, take_over)
        record = {"host": socket.gethostname(), "pid": os.getpid(), "run": name}
        record |= {"launch": launch_id()} if launch_id() else {}
        file.truncate(0)
        file.write(json.dumps({**record, "since": round(time.time(), 3)}))
        file.flush()
        os.fsync(file.fileno())
        self._file = file
        if take_over is not None:
            self._heart = Heartbeat(self._beat_path, beat_s=beat_s)

    def release(self) -> None:
        """Give the lock back; harmless where it was never taken."""
        if self._heart is not None:
            self._heart.stop()
            self._heart = None
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None

    def _refusal(self, owner: dict[str, object], take_over: bool | None) -> RunError:
        who = f"process {owner.get('pid')} on {owner.get('host')} (run {owner.get('run')!r})"
        remedy = "wait for it or use another run.dir"
        if take_over:
            who += ", which gives signs of life"
        elif owner.get("host") != socket.gethostname():
            how = f"delete {self.path.name} there" if take_over is None else "run.take_over=true"
            remedy += f". If it is surely gone: {how}"
        return RunError(ExitCode.locked, f"{self.path.parent} belongs to {who}; {remedy}")


def launch_id() -> str | None:
    """Return the scheduler's name for this job, which stays when it is queued again."""
    given = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if given == "none" else given


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
