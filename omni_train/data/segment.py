"""Messages between a rank and its data workers: a few bytes on a socket, the rest in shared memory.

A value is laid out in a memory file (memfd) that has no name: tensors as they are, one behind the
other, the remainder by multiprocessing's own pickling, as in any pool of processes of one program.
What crosses the socket is a message of fixed size and the file's descriptor. There is nothing in
/dev/shm, whose size containers limit, and nothing to remove when a process is killed: the memory is
gone with its last mapping.

Done here: values to and from memory files, messages. Not done here: who sends what (prefetch.py,
worker.py). Nothing that comes from a disk or a network is ever unpickled here.
"""

from __future__ import annotations

import array
import errno
import io
import os
import socket
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

_ALIGN = 64
_MAX_PARTS = 1024  # of one writev call
_COUNTS = struct.Struct("<QQ")
_MESSAGE = struct.Struct("<iiqq")
_RIGHTS_BYTES = socket.CMSG_SPACE(4)  # one descriptor
_FULL = (errno.EAGAIN, errno.ETOOMANYREFS)
_RETRY_S = 0.01


class Kind(IntEnum):
    """What a message says; the last four come from the workers' side."""

    setup = 1
    work = 2
    ready = 3
    done = 4
    failed = 5
    died = 6


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    Args:
        kind: what it says.
        pid: of the worker, -1 where it is about none.
        number: of the work item, -1 where it is about none.
        note: sample of the item at which a worker failed or died, and for `died` its wait status
            in the upper 32 bits; for `ready` the bytes that a worker has before it begins.
        fd: memory file with the value, -1 without one; whoever received it closes it.
    """

    kind: Kind
    pid: int = -1
    number: int = -1
    note: int = 0
    fd: int = -1


class Channel:
    """One end of a socket that keeps messages apart; many processes may share an end.

    Args:
        sock: AF_UNIX, SOCK_SEQPACKET.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def send(self, message: Message, *, wait: bool = True) -> bool:
        """Send a message with its descriptor, which stays open here.

        Args:
            message: what to send.
            wait: until there is room; else return False where there is none.

        Raises:
            OSError: the other end is closed (`BrokenPipeError`).
        """
        data = _MESSAGE.pack(message.kind, message.pid, message.number, message.note)
        rights = array.array("i", [message.fd] if message.fd >= 0 else [])
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
        while True:
            try:
                flags = socket.MSG_NOSIGNAL | (0 if wait else socket.MSG_DONTWAIT)
                self.sock.sendmsg([data], ancillary, flags)
                return True
            except OSError as error:
                # Descriptors under way are limited too: they wait until the receiver takes some.
                if error.errno not in _FULL:
                    raise
                if not wait:
                    return False
                time.sleep(_RETRY_S)

    def receive(self, *, wait: bool = True) -> Message | None:
        """Return the next message; None where there is none and `wait` is off.

        Raises:
            EOFError: every process at the other end has closed it.
        """
        flags = socket.MSG_CMSG_CLOEXEC | (0 if wait else socket.MSG_DONTWAIT)
        try:
            data, ancillary, _, _ = self._take(flags)
        except BlockingIOError:
            return None
        if not data:
            raise EOFError
        kind, pid, number, note = _MESSAGE.unpack(data)
        fd = int.from_bytes(ancillary[0][2], sys.byteorder) if ancillary else -1
        return Message(Kind(kind), pid, number, note, fd)

    def _take(self, flags: int) -> Any:
        with suppress(ConnectionResetError):
            return self.sock.recvmsg(_MESSAGE.size, _RIGHTS_BYTES, flags)
        # They left without reading all; said once, before what they have sent is read.
        return self.sock.recvmsg(_MESSAGE.size, _RIGHTS_BYTES, flags)


def write_segment(value: object) -> int:
    """Return the descriptor of a new memory file that holds a value; the caller closes it."""
    parts: list[Any] = []
    stream = io.BytesIO()
    _Pickler(stream, parts).dump(value)
    buffers = [part.raw() for part in parts]
    sizes = [buffer.nbytes for buffer in buffers]
    head = _COUNTS.pack(stream.tell(), len(sizes)) + struct.pack(f"<{len(sizes)}Q", *sizes)
    pieces: list[Any] = [head, stream.getbuffer()]
    end = len(head) + stream.tell()
    for buffer in buffers:
        pieces += [bytes(-end % _ALIGN), buffer]
        end += -end % _ALIGN + buffer.nbytes
    fd = os.memfd_create("omni-train", os.MFD_CLOEXEC)
    try:
        _write_all(fd, pieces)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_segment(fd: int) -> Any:
    """Return the value of a memory file; its tensors are views of the mapped file."""
    # torch maps without holding a descriptor, so that values in waiting do not use them up.
    size = os.fstat(fd).st_size
    mapped = torch.from_file(f"/proc/self/fd/{fd}", shared=True, size=size, dtype=torch.uint8)
    view = memoryview(mapped.numpy())  # type: ignore[arg-type]
    num_bytes, num_parts = _COUNTS.unpack_from(view)
    sizes = struct.unpack_from(f"<{num_parts}Q", view, _COUNTS.size)
    start = _COUNTS.size + 8 * num_parts
    end = start + num_bytes
    buffers = []
    for part in sizes:
        end += -end % _ALIGN
        buffers.append(view[end : end + part])
        end += part
    return ForkingPickler.loads(view[start : start + num_bytes], buffers=buffers)


class _Pickler(ForkingPickler):
    """Leaves the contents of tensors out of the stream."""

    def __init__(self, stream: io.BytesIO, parts: list[Any]) -> None:
        super().__init__(stream, 5, True, parts.append)
        # torch's own way gives every tensor a file and a descriptor of its own.
        self.dispatch_table[Tensor] = _reduce


def _reduce(tensor: Tensor) -> tuple[Any, ...]:
    return torch.from_numpy, (tensor.contiguous().numpy(),)


def _write_all(fd: int, pieces: Sequence[Any]) -> None:
    left = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
    at = 0
    while at < len(left):
        done = os.writev(fd, left[at : at + _MAX_PARTS])
        while at < len(left) and done >= len(left[at]):
            done -= len(left[at])
            at += 1
        if done:
            left[at] = left[at][done:]
