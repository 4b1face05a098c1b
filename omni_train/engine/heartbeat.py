"""A sign of life in a file, for owners whose process cannot be seen from here.

The owner counts up in the file; who watches only compares what is read now with what was read
before. No clock of one machine is ever compared with another's.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path

BEAT_S = 5.0
# Several beats: network file systems show a change to others only after some seconds.
WATCH_S = 30.0


class Heartbeat:
    """Counts up in a file until it is stopped, in a thread of its own.

    Args:
        path: of the file.
        beat_s: seconds between two counts.
    """

    def __init__(self, path: Path, *, beat_s: float = BEAT_S) -> None:
        self._path, self._beat_s = path, beat_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        count = 0
        while True:
            # A full disk must not end a run here; the lock itself still names its owner.
            with suppress(OSError):
                self._path.write_text(f"{count}\n", encoding="ascii")
            count += 1
            if self._end.wait(self._beat_s):
                return

    def stop(self) -> None:
        """End the thread and remove the file."""
        self._end.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)


def beats(path: Path, *, watch_s: float = WATCH_S) -> bool:
    """Watch a file for up to `watch_s` seconds; return as soon as it has changed, or False."""
    first, end = _read(path), time.monotonic() + watch_s
    while time.monotonic() < end:
        if _read(path) != first:
            return True
        time.sleep(min(0.5, watch_s / 10))
    return False


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
