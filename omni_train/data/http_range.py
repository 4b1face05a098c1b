"""One range request over HTTP: bytes appended as they come, failures told apart.

The standard library's client: a few range requests need no more, and no redirect can lead to a
third scheme. Connections stay open, one for each host and thread. Retrying is done in stores.py.
"""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import threading
import time
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from omni_train.config.errors import DataError

HTTP_SCHEMES = ("http", "https")
_MAX_REDIRECTS = 5
_BLOCK = 1 << 18
_TRANSIENT_STATUS = (408, 425, 429)
_Key = tuple[int, str, str]


class TransientError(Exception):
    """A failure that another attempt may not have."""


class _Connections(threading.local):
    """Open connections of this thread."""

    def __init__(self) -> None:
        self.pool: dict[_Key, http.client.HTTPConnection] = {}


_connections = _Connections()


def attempt_http(
    url: str, offset: int, size: int | None, found: bytearray, *, deadline: float, stall_s: float
) -> None:
    """Append to `found` what one request gives; return when all is there."""
    if size is not None and len(found) >= size:
        return
    start = offset + len(found)
    headers = {"Accept-Encoding": "identity", "User-Agent": "omni-train"}
    if size is not None:
        headers["Range"] = f"bytes={start}-{offset + size - 1}"
    elif start:
        headers["Range"] = f"bytes={start}-"
    key: _Key | None = None
    try:
        response, key, sock = _request(url, headers, stall_s)
        _check_status(response, url, start, ranged="Range" in headers)
        whole = _receive(response, sock, size, found, deadline=deadline, stall_s=stall_s)
        # A connection is kept only when its answer was read to the end.
        if whole and not response.will_close:
            response.close()
            key = None
    except (http.client.HTTPException, OSError) as error:
        raise TransientError(f"{type(error).__name__}: {error}") from error
    finally:
        if key is not None:
            _forget(key)
    _check_complete(response, offset, size, len(found))


def _request(
    url: str, headers: dict[str, str], stall_s: float
) -> tuple[http.client.HTTPResponse, _Key, socket.socket]:
    """Send a request, along redirects; a kept connection that the server closed is made anew."""
    for _ in range(_MAX_REDIRECTS + 1):
        parts = urlsplit(url)
        path = urlunsplit(
            ("", "", quote(parts.path or "/", safe="/%:@!$&'()*+,;=~"), parts.query, "")
        )
        connection, key, kept = _connection(parts.scheme, parts.netloc, stall_s)
        try:
            try:
                connection.request("GET", path, headers=headers)
                sock = connection.sock
                response = connection.getresponse()
            except (http.client.RemoteDisconnected, ConnectionError, BrokenPipeError):
                if not kept:
                    raise
                connection.close()
                connection.request("GET", path, headers=headers)
                sock = connection.sock
                response = connection.getresponse()
        except BaseException:
            _forget(key)
            raise
        location = response.getheader("Location")
        if response.status not in (301, 302, 303, 307, 308) or not location:
            return response, key, sock
        _forget(key)
        target = urljoin(url, location)
        if urlsplit(target).scheme not in (("https",) if parts.scheme == "https" else HTTP_SCHEMES):
            raise DataError("unreachable", f"{shown(url)} redirects to {shown(target)}")
        url = target
    raise DataError("unreachable", f"{shown(url)} redirects more than {_MAX_REDIRECTS} times")


def _connection(
    scheme: str, netloc: str, stall_s: float
) -> tuple[http.client.HTTPConnection, _Key, bool]:
    """Return this thread's connection to a host, its key, and whether it was kept from before."""
    pool = _connections.pool
    # By process too: a connection that a fork copied must not be used by both sides.
    key = (os.getpid(), scheme, netloc)
    connection = pool.get(key)
    if connection is not None and connection.sock is not None:
        connection.sock.settimeout(stall_s)
        connection.timeout = stall_s
        return connection, key, True
    if scheme == "https":
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(netloc, timeout=stall_s, context=context)
    else:
        connection = http.client.HTTPConnection(netloc, timeout=stall_s)
    pool[key] = connection
    return connection, key, False


def _forget(key: _Key) -> None:
    connection = _connections.pool.pop(key, None)
    if connection is not None:
        connection.close()


def _check_status(
    response: http.client.HTTPResponse, url: str, start: int, *, ranged: bool
) -> None:
    status = response.status
    if status >= 500 or status in _TRANSIENT_STATUS:
        raise TransientError(f"the server answers {status} {response.reason}")
    if status in (404, 410):
        raise DataError("missing_shard", f"the server answers {status} for {shown(url)}")
    if status == 416:
        raise DataError("truncated", f"{shown(url)} ends before byte {start}")
    if status == 200 and ranged:
        raise DataError("no_ranges", f"the server of {shown(url)} ignores range requests")
    if status not in (200, 206):
        raise DataError("unreachable", f"the server answers {status} {response.reason}")
    if status == 206:
        said = response.getheader("Content-Range", "")
        if not said.startswith(f"bytes {start}-"):
            raise TransientError(f"bytes from {start} on were asked for, {said!r} came")


def _receive(
    response: http.client.HTTPResponse,
    sock: socket.socket,
    size: int | None,
    found: bytearray,
    *,
    deadline: float,
    stall_s: float,
) -> bool:
    """Append what comes to `found`; return whether the answer was read to its end."""
    while size is None or len(found) < size:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TransientError("the time limit passed while bytes were coming")
        sock.settimeout(min(left_s, stall_s))
        block = response.read1(_BLOCK if size is None else min(_BLOCK, size - len(found)))
        if not block:
            break
        found += block
    return response.length == 0 or response.isclosed()


def _check_complete(
    response: http.client.HTTPResponse, offset: int, size: int | None, num_found: int
) -> None:
    if size is None:
        if response.length:
            raise TransientError(f"the answer ended {response.length} bytes early")
        return
    if num_found < size:
        total = response.getheader("Content-Range", "").rpartition("/")[2]
        if total.isdecimal() and int(total) < offset + size:
            raise DataError("truncated", f"the file has {total} bytes of {offset + size}")
        raise TransientError(f"short read: {num_found} of {size} bytes")


def shown(url: str) -> str:
    """Return a URL for messages: without user, password and query, which may hold secrets."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
