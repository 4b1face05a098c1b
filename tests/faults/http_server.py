"""An HTTP server in this process that serves bytes by range and misbehaves as it is told."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FaultServer(ThreadingHTTPServer):
    """Serves `files` by path; `faults` are used up one a request, then all goes well.

    Faults: `503`, `slow` (bytes in pieces), `hang` (no answer), `stall` (half an answer, then
    nothing), `short` (a shorter answer than declared by its range), `reset` (half, then RST),
    `close` (no answer), `wrong` (one bit), `wrong_range`, `403`, `whole` (the range is ignored),
    `redirect`. A fault that ends in `!` is never used up.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self.connections: set[int] = set()
        self.hang_s = 30.0
        self.stopped = threading.Event()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Readers that give up are expected here."""

    def next_fault(self) -> str:
        with self._lock:
            if not self.faults:
                return ""
            if self.faults[0].endswith("!"):
                return self.faults[0][:-1]
            return self.faults.pop(0)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultServer

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        server = self.server
        wanted = self.headers.get("Range", "")
        server.requests.append((self.path, wanted))
        server.connections.add(self.client_address[1])
        data = server.files.get(self.path)
        fault = server.next_fault() if data is not None else ""
        if data is None:
            return self._answer(404, b"")
        if fault in ("503", "403"):
            return self._answer(int(fault), b"later")
        if fault == "hang":
            server.stopped.wait(server.hang_s)
        if fault in ("hang", "close"):
            self.close_connection = True
            return None
        if fault == "redirect":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
        if match is None or fault == "whole":
            return self._send(200, data, "", fault)
        start, stop = int(match[1]), min(int(match[2] or len(data)) + 1, len(data))
        if start >= len(data):
            return self._answer(416, b"")
        shift = 7 if fault == "wrong_range" else 0
        return self._send(
            206, data[start:stop], f"bytes {start + shift}-{stop - 1}/{len(data)}", fault
        )

    def _send(self, status: int, body: bytes, content_range: str, fault: str) -> None:
        if fault == "wrong":
            body = bytes([body[0] ^ 4]) + body[1:]
        half = len(body) // 2
        self.send_response(status)
        self.send_header("Content-Length", str(half if fault == "short" else len(body)))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if fault in ("short", "reset", "stall"):
            self.wfile.write(body[:half])
            self.wfile.flush()
        elif fault == "slow":
            for at in range(0, len(body), max(1, half // 2)):
                self.wfile.write(body[at : at + max(1, half // 2)])
                self.wfile.flush()
                time.sleep(0.02)
        else:
            self.wfile.write(body)
        if fault == "stall":
            self.server.stopped.wait(self.server.hang_s)
        if fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.shutdown(socket.SHUT_RD)
        if fault in ("reset", "stall"):
            self.close_connection = True

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving() -> Iterator[FaultServer]:
    """A running server, stopped at the end."""
    server = FaultServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        thread.join()
        server.server_close()
