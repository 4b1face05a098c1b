"""Notices what hostile input makes this process do: programs, modules, connections, files.

The interpreter reports all of these to an audit hook, also where C code does them; what FFmpeg
opens on its own is seen by inotify. Nothing is replaced, so all behaves as in a real run.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What no input may ever cause; `pickle.find_class` is a pickle that looks a function up.
_STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen")
_FORBIDDEN = (*_STARTS, "socket.connect", "socket.getaddrinfo", "pickle.find_class")
_IN_OPEN_OR_CHANGED = 0x20 | 0x2 | 0x100 | 0x200 | 0x40
_IN_NONBLOCK = 0x800

_seen: list[str] | None = None


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _seen is not None and event in _FORBIDDEN:
        _seen.append(f"{event} {arguments!r:.200}")


sys.addaudithook(_hook)


@contextmanager
def tripwire(secrets: Path) -> Iterator[list[str]]:
    """Yield the list of what should not have happened; `secrets` must not be touched in any way."""
    global _seen
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(_IN_NONBLOCK)
    assert watch >= 0
    assert libc.inotify_add_watch(watch, os.fsencode(secrets), _IN_OPEN_OR_CHANGED) >= 0
    found: list[str] = []
    _seen = found
    try:
        yield found
    finally:
        _seen = None
        try:
            names = os.read(watch, 1 << 16)
            found.append(f"a file of {secrets.name} was touched: {names!r}")
        except BlockingIOError:
            pass
        os.close(watch)
