"""Fetched bytes on a local disk, never more than so many, the least recently used given up first.

    DIR/<hash of the name>    one file for each range of bytes
    DIR/index.sqlite          name, size and turn of use of each file; no clock is looked at

Many processes may share a directory. A file appears whole or not at all; whoever is killed leaves
at most an unlisted file, which the next one to open the directory removes. Nothing here is trusted:
readers check what they get against the index of their shards, and a directory that cannot be used
is a cache that never has anything.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import xxhash

_INDEX = "index.sqlite"
_WAIT_S = 10.0
_TABLE = "CREATE TABLE IF NOT EXISTS file (name TEXT PRIMARY KEY, bytes INTEGER, used INTEGER)"


class RangeCache:
    """A bounded cache in a directory; one object per process.

    Args:
        folder: made if it is not there.
        max_bytes: of all cached files; the index beside them takes some hundred bytes for each.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._db = self._open()
        except sqlite3.DatabaseError:  # not an index any more: begin again
            (self.folder / _INDEX).unlink(missing_ok=True)
            self._db = self._open()

    def get(self, name: str) -> bytes | None:
        """Return the bytes put under a name, or None."""
        path = self.folder / _file_name(name)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        with suppress(sqlite3.Error):  # only the order of giving up would suffer
            self._db.execute(
                "UPDATE file SET used = (SELECT max(used) + 1 FROM file) WHERE name = ?",
                (path.name,),
            )
        return data

    def put(self, name: str, data: bytes) -> None:
        """Keep bytes under a name, after giving up older ones; too large or a failure: nothing."""
        if len(data) > self.max_bytes:
            return
        try:
            self._put(_file_name(name), data)
        except (sqlite3.Error, OSError):
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def num_bytes(self) -> int:
        """Return the size of all cached files."""
        with closing(self._db.execute("SELECT coalesce(sum(bytes), 0) FROM file")) as rows:
            return int(rows.fetchone()[0])

    def _put(self, file_name: str, data: bytes) -> None:
        path = self.folder / file_name
        # Held until the file is in place, so that the sum is right at every moment.
        self._db.execute("BEGIN IMMEDIATE")
        self._db.execute("DELETE FROM file WHERE name = ?", (file_name,))
        path.unlink(missing_ok=True)
        excess = self.num_bytes() + len(data) - self.max_bytes
        oldest = self._db.execute("SELECT name, bytes FROM file ORDER BY used").fetchall()
        for old_name, old_bytes in oldest if excess > 0 else []:
            (self.folder / old_name).unlink(missing_ok=True)
            self._db.execute("DELETE FROM file WHERE name = ?", (old_name,))
            excess -= old_bytes
            if excess <= 0:
                break
        temporary = path.with_suffix(f".tmp-{os.getpid()}")
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        self._db.execute(
            "INSERT INTO file SELECT ?, ?, coalesce(max(used), 0) + 1 FROM file",
            (file_name, len(data)),
        )
        self._db.execute("COMMIT")

    def _open(self) -> sqlite3.Connection:
        """Open the index and remove files that it does not list, or lists too many of."""
        db = sqlite3.connect(
            self.folder / _INDEX, timeout=_WAIT_S, isolation_level=None, check_same_thread=False
        )
        db.execute("PRAGMA synchronous = OFF")  # after a crash of the machine it is made anew
        db.execute("BEGIN IMMEDIATE")
        db.execute(_TABLE)
        listed = {name for (name,) in db.execute("SELECT name FROM file")}
        for path in self.folder.iterdir():
            if not path.name.startswith(_INDEX) and path.name not in listed:
                path.unlink(missing_ok=True)
        rows = db.execute("SELECT name, bytes FROM file ORDER BY used DESC").fetchall()
        total = 0
        for name, size in rows:
            total += size
            if total > self.max_bytes or not (self.folder / name).is_file():
                (self.folder / name).unlink(missing_ok=True)
                db.execute("DELETE FROM file WHERE name = ?", (name,))
        db.execute("COMMIT")
        return db


def _file_name(name: str) -> str:
    return str(xxhash.xxh3_128_hexdigest(name.encode()))
