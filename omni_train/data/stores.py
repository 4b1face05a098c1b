"""Bytes of files by range, from a disk or an object store, whatever happens on the way.

    a path, file://      pread on a descriptor that stays open
    http://, https://    range requests over connections that stay open
    s3://, gs://         fsspec, with that store's package (s3fs, gcsfs)

Any other scheme is refused before anything is opened: some readers run a shell for `pipe:`, and
fsspec knows dozens of schemes, chained ones among them.

Done here: the list of schemes, retries, resuming, the time limit, the cache. Not done here: one
HTTP request (http_range.py), and what the bytes must be (fetch.py checks that by the index).
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from omni_train.config.errors import ConfigError, DataError, check_fields
from omni_train.data.cache import RangeCache
from omni_train.data.http_range import HTTP_SCHEMES, TransientError, attempt_http, shown
from omni_train.engine.exit_codes import ExitCode, RunError

FSSPEC_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
SCHEMES = ("file", *HTTP_SCHEMES, *FSSPEC_PACKAGES)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_MAX_OPEN_FILES = 64
# A damaged index may ask for any size; from here on it is compared with the file before allocating.
_CHECK_SIZE_FROM = 1 << 20


@dataclass(kw_only=True, slots=True)
class FetchConfig:
    """How bytes are fetched from object stores; local files need none of it.

    Args:
        attempts: failures in a row, without one byte of progress, that give a read up.
        base_delay_s: wait after the first failure; doubled for each further one, with jitter.
        time_limit_s: of one read with all its attempts; a read that gives nothing for a share
            1 / attempts of it is begun again.
        cache_dir: directory for fetched bytes, shared by processes of one machine; empty for none.
        cache_bytes: most that the cache holds.
    """

    attempts: int = 6
    base_delay_s: float = 0.25
    time_limit_s: float = 120.0
    cache_dir: str = ""
    cache_bytes: int = 0

    def __post_init__(self) -> None:
        small = "too small to fetch anything"
        check_fields(
            self,
            "data.fetch",
            ("attempts", self.attempts >= 1, small),
            ("base_delay_s", self.base_delay_s >= 0, small),
            ("time_limit_s", self.time_limit_s > 0, small),
            ("cache_bytes", self.cache_bytes >= 0, small),
            remedy="raise it, or leave it out for the default",
        )
        if bool(self.cache_dir) != bool(self.cache_bytes):
            raise ConfigError(
                key="data.fetch.cache_dir",
                value=self.cache_dir,
                rule=f"a cache needs a directory and a size, data.fetch.cache_bytes is "
                f"{self.cache_bytes}",
                remedy="set both, or neither",
            )


class Store:
    """Reads bytes by range or whole, by the same rules from every kind of place.

    Args:
        config: retries and cache.
    """

    def __init__(self, config: FetchConfig | None = None) -> None:
        self.config = config or FetchConfig()

    def read_range(self, url: str | Path, offset: int, size: int, *, fresh: bool = False) -> bytes:
        """Return exactly `size` bytes from `offset` on.

        Args:
            url: a local path or a URL of one of `SCHEMES`.
            offset, size: in bytes.
            fresh: do not take them from the cache, and replace what it has.

        Raises:
            DataError: `missing_shard`, `truncated` (the file ends before), `unreachable`,
                `no_ranges` (a server that only gives whole files).
            RunError: a scheme that is not on the list (exit code 77).
        """
        if offset < 0 or size < 0:
            raise DataError("truncated", f"{size} bytes at offset {offset} cannot lie in a file")
        scheme, place = split_scheme(url)
        if scheme == "file":
            return _read_local(place, offset, size)
        if not self.config.cache_dir:
            return self._read_remote(scheme, place, offset, size)
        cache = _range_cache(self.config.cache_dir, self.config.cache_bytes, os.getpid())
        name = f"{place}:{offset}:{size}"
        data = None if fresh else cache.get(name)
        if data is None or len(data) != size:
            data = self._read_remote(scheme, place, offset, size)
            cache.put(name, data)
        return data

    def read_all(self, url: str | Path) -> bytes:
        """Return a whole file, never from the cache; raises as `read_range` does."""
        scheme, place = split_scheme(url)
        if scheme != "file":
            return self._read_remote(scheme, place, 0, None)
        try:
            return Path(place).read_bytes()
        except OSError as error:
            raise _local_error(error) from error

    def _read_remote(self, scheme: str, url: str, offset: int, size: int | None) -> bytes:
        """Attempts until all bytes are there; each continues where the last one ended."""
        config = self.config
        deadline = time.monotonic() + config.time_limit_s
        attempt = attempt_http if scheme in HTTP_SCHEMES else _attempt_fsspec
        found = bytearray()
        failures = 0
        while True:
            before, left_s = len(found), deadline - time.monotonic()
            try:
                limit_s = min(left_s, config.time_limit_s / config.attempts)
                attempt(url, offset, size, found, deadline=deadline, stall_s=max(limit_s, 0.001))
                return bytes(found)
            except TransientError as error:
                failures = 1 if len(found) > before else failures + 1
                left_s = deadline - time.monotonic()
                if failures >= config.attempts or left_s <= 0:
                    raise DataError(
                        "unreachable",
                        f"gave up on {shown(url)} with {len(found)} of {size or 'all'} bytes "
                        f"after {failures} failures in a row, {config.time_limit_s - left_s:.1f} s "
                        f"of data.fetch.time_limit_s={config.time_limit_s:g}: {error}",
                    ) from error
            delay_s = config.base_delay_s * 2 ** (failures - 1) * random.uniform(0.5, 1.5)
            time.sleep(min(delay_s, left_s))


@dataclass(frozen=True, slots=True)
class Root:
    """The directory of a set of shards, on a disk or in a store."""

    location: str
    store: Store

    @property
    def folder(self) -> Path | None:
        """The directory on a disk; None in a store."""
        scheme, place = split_scheme(self.location)
        return Path(place) if scheme == "file" else None

    def url_of(self, name: str) -> str:
        """Return where a file of the directory lies."""
        scheme, place = split_scheme(self.location)
        if scheme == "file":
            return str(Path(place) / name)
        parts = urlsplit(place)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))

    def read_all(self, name: str) -> bytes:
        """Return a whole file of the directory."""
        return self.store.read_all(self.url_of(name))


def open_root(path: str | Path | Root, config: FetchConfig | None = None) -> Root:
    """Return a set's directory, local or remote, after checking its scheme.

    Raises:
        RunError: a scheme that is not on the list (exit code 77).
    """
    if isinstance(path, Root):
        return path
    split_scheme(path)
    return Root(str(path), Store(config))


@lru_cache(maxsize=4096)
def split_scheme(url: str | Path) -> tuple[str, str]:
    """Return (one of `SCHEMES`, a local path or the URL).

    Raises:
        RunError: any other scheme (exit code 77). A local path with a colon in its first part is
            written with `./` before it.
    """
    text = str(url)
    match = None if isinstance(url, Path) else _SCHEME.match(text)
    scheme = match[1].lower() if match else "file"
    listed = scheme in SCHEMES and (match is None or text.startswith("://", match.end(1)))
    if not listed or "\0" in text:
        raise RunError(
            ExitCode.refused,
            f"{text[:80]!r} is not read: data come from a local path or from "
            f"{', '.join(f'{name}://' for name in SCHEMES)}; copy them there first",
        )
    if match is None or scheme != "file":
        return scheme, text
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise RunError(
            ExitCode.refused,
            f"{text[:80]!r} is not read: file:// names a file of this machine, with three slashes",
        )
    return scheme, unquote(parts.path)


class _OpenFile:
    """A file descriptor that closes itself when it falls out of the cache."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


@lru_cache(maxsize=_MAX_OPEN_FILES)
def _open_file(path: str) -> _OpenFile:
    return _OpenFile(path)


@lru_cache(maxsize=4)
def _range_cache(folder: str, max_bytes: int, _pid: int) -> RangeCache:
    return RangeCache(folder, max_bytes=max_bytes)


def _read_local(path: str, offset: int, size: int) -> bytes:
    # pread, not a memory map: half a microsecond slower, but a file that is cut while it is mapped,
    # or a network disk that fails, ends the process with SIGBUS instead of an error for one sample.
    try:
        file = _open_file(path)
        there = size if size < _CHECK_SIZE_FROM else os.fstat(file.fd).st_size - offset
        data = os.pread(file.fd, size, offset) if size <= there else b""
        while 0 < len(data) < size and (
            more := os.pread(file.fd, size - len(data), offset + len(data))
        ):
            data += more
    except (OSError, OverflowError) as error:
        raise _local_error(error) from error
    if len(data) != size:
        raise DataError(
            "truncated", f"{max(len(data), min(there, size))} of {size} bytes at {offset}"
        )
    return data


def _local_error(error: Exception) -> DataError:
    missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    text = str(error)
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    return DataError("missing_shard" if missing else "unreachable", text)


def _attempt_fsspec(
    url: str, offset: int, size: int | None, found: bytearray, *, deadline: float, stall_s: float
) -> None:
    """Append to `found` what one call of the store's package gives; return when all is there."""
    import fsspec

    scheme = urlsplit(url).scheme.lower()
    try:
        files = fsspec.filesystem(scheme)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            key="data.sources.*.path",
            value=url,
            rule=f"{scheme}:// needs the package {FSSPEC_PACKAGES[scheme]}",
            remedy=f"pip install {FSSPEC_PACKAGES[scheme]}, or copy the data to a disk",
        ) from error
    if size is not None and len(found) >= size:
        return
    path = url.partition("://")[2]
    start = offset + len(found)
    stop = None if size is None else offset + size

    def limit_s() -> float:
        return min(deadline - time.monotonic(), stall_s)

    try:
        found += _within(limit_s(), lambda: files.cat_file(path, start=start, end=stop))
        problem = TransientError(f"short read: {len(found)} of {size} bytes")
    except TransientError as error:
        if error.__cause__ is None:  # silence; asking for more would only wait again
            raise
        # A range that begins behind the end is an error, in each package one of its own.
        problem = error
    else:
        if size is None or len(found) >= size:
            return
    total = _within(limit_s(), lambda: files.info(path)["size"])
    if size is not None and total is not None and total < offset + size:
        raise DataError("truncated", f"the object has {total} bytes of {offset + size}")
    raise problem


def _within(limit_s: float, call: Callable[[], Any]) -> Any:
    """Return what a store's package returns; its failures, and its silence, in our terms."""
    results: list[Any] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:  # noqa: BLE001 - each package has errors of its own
            failures.append(error)

    # In a thread that may be left behind: these packages have no time limit for a whole call.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(limit_s, 0.001))
    if results:
        return results[0]
    if not failures:
        raise TransientError(f"no answer within {limit_s:.1f} s")
    error = failures[0]
    if isinstance(error, FileNotFoundError):
        raise DataError("missing_shard", str(error)) from error
    if isinstance(error, PermissionError):
        raise DataError("unreachable", str(error)) from error
    raise TransientError(f"{type(error).__name__}: {error}") from error
