"""Work items to results by worker processes, ahead of their use, in the order of the items.

    items -> [memory file: offsets] -> worker -> [memory file: tensors] -> results, mapped

Done here: how far ahead (in bytes), the order, what became of a worker. Not done here: processes
(worker.py), messages (segment.py), what an item is (loader.py). There is no thread on this side: it
hands out work when a result is asked for, as much ahead as the bound allows.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, NoReturn, Self, TypeVar, cast

from omni_train.config.errors import ConfigError
from omni_train.data.segment import Channel, Kind, Message, read_segment, write_segment
from omni_train.data.worker import Failure, Setup
from omni_train.engine.exit_codes import ExitCode, RunError

WorkT = TypeVar("WorkT")
ResultT = TypeVar("ResultT")

# The rank's own import path, whatever it was started with, and nothing of its main module.
_START = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from omni_train.data.worker import main; main(int(sys.argv[1]))"
)
# Signals by which a process ends itself: the decoder's doing, and so the sample's.
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
# Items handed out for each one delivered while the next is there already; one would keep up, more
# let the workers get ahead.
_HANDED_PER_RESULT = 2
_CLOSE_S = 2.0


@dataclass(slots=True)
class _Item(Generic[WorkT, ResultT]):
    """What was handed out and not delivered: bytes expected, or those of the result, once there."""

    work: WorkT
    num_bytes: int
    result: ResultT | None = None
    is_there: bool = False


class Prefetcher(Generic[WorkT, ResultT]):
    """Makes results of work items in worker processes; a context that ends them.

    Args:
        make: a picklable callable that the workers import; called with an item and a function to
            say at which sample of it it is.
        num_workers: processes, at least 1.
        max_bytes: of finished results and of estimates under way, all workers together; a single
            item may be larger, but is then alone.
        memory_bytes: cap of each worker's own memory; None for no cap.
        describe: names what a worker had in hands: the item, and the number of the sample in it.
    """

    def __init__(
        self,
        make: Callable[[WorkT, Callable[[int], None]], ResultT],
        *,
        num_workers: int,
        max_bytes: int,
        memory_bytes: int | None = None,
        describe: Callable[[WorkT, int], str],
    ) -> None:
        self._setup = Setup(make, num_workers, memory_bytes)
        self._max_bytes, self._describe = max_bytes, describe
        self._items: dict[int, _Item[WorkT, ResultT]] = {}
        self._num_bytes = self._handed_out = 0
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel = Channel(ours)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno()), *sys.path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # One thread each: more threads than cores slow all of them down.
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for the rank; the workers end with it
            )
        self._send(Kind.setup, self._setup)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """End the workers: closing the socket tells them, whatever they are doing."""
        self._channel.sock.close()
        self._items.clear()
        try:
            self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def results(self, work: Iterable[tuple[WorkT, int]]) -> Iterator[ResultT]:
        """Yield the result of each item, in order.

        Args:
            work: items with the bytes that each is expected to take. An exception of it is raised
                after the results of the items before.

        Raises:
            ConfigError: `data.worker_memory_bytes` is less than a worker needs to begin.
            RunError: a worker died or failed.
        """
        assert not self._items, f"{len(self._items)} results of earlier work were not taken"
        source = _Source(work)
        delivered = self._handed_out
        while True:
            handed = 0
            self._receive(wait=False)
            while handed < _HANDED_PER_RESULT or not self._is_there(delivered):
                if not self._hand_out(source):
                    break
                handed += 1
                self._receive(wait=False)
            if not self._items:
                break
            while not self._is_there(delivered):
                self._receive(wait=True)
            # No name here: the memory is gone when the caller lets go of the result.
            yield self._take(delivered)
            delivered += 1
        source.finish()

    def _is_there(self, number: int) -> bool:
        return number in self._items and self._items[number].is_there

    def _take(self, number: int) -> ResultT:
        item = self._items.pop(number)
        self._num_bytes -= item.num_bytes
        return cast("ResultT", item.result)

    def _hand_out(self, source: _Source[WorkT]) -> bool:
        """Send the next item if there is one and the bound allows it; a lone item is allowed."""
        following = source.peek()
        if following is None:
            return False
        work, num_bytes = following
        if self._items and self._num_bytes + num_bytes > self._max_bytes:
            return False
        if not self._send(Kind.work, work, number=self._handed_out, wait=False):
            return False
        self._items[self._handed_out] = _Item(work, num_bytes)
        self._num_bytes += num_bytes
        self._handed_out += 1
        source.take()
        return True

    def _send(self, kind: Kind, value: object, *, number: int = -1, wait: bool = True) -> bool:
        fd = write_segment(value)
        try:
            return self._channel.send(Message(kind, number=number, fd=fd), wait=wait)
        except (BrokenPipeError, ConnectionResetError):
            while True:  # what they sent before they died says why
                self._receive(wait=True)
        finally:
            os.close(fd)

    def _receive(self, *, wait: bool) -> None:
        """Take what the workers have sent: all of it, and where `wait` is set at least one."""
        while True:
            try:
                message = self._channel.receive(wait=wait)
            except EOFError:
                status = self._process.wait()
                what = f"the process that starts the data workers {_ended(status)}"
                raise RunError(ExitCode.bug, f"{what}, and they with it") from None
            if message is None:
                return
            self._note(message)
            wait = False

    def _note(self, message: Message) -> None:
        if message.kind is Kind.died:
            self._raise_died(message)
        if message.kind is Kind.ready:
            self._check_cap(message.note)
            return
        num_bytes = os.fstat(message.fd).st_size
        try:
            value = read_segment(message.fd)
        finally:
            os.close(message.fd)
        if message.kind is Kind.done:
            item = self._items[message.number]
            item.result, item.is_there = value, True
            self._num_bytes += num_bytes - item.num_bytes
            item.num_bytes = num_bytes
        else:
            self._raise_failed(message, value)

    def _check_cap(self, data_bytes: int) -> None:
        cap = self._setup.memory_bytes
        if cap is not None and cap <= data_bytes:
            raise ConfigError(
                key="data.worker_memory_bytes",
                value=cap,
                rule=f"a worker has {data_bytes} bytes before its first sample",
                remedy=f"give at least {2 * data_bytes}, or leave it out for no cap",
            )

    def _raise_failed(self, message: Message, failure: Failure) -> NoReturn:
        place = self._place(message.number, message.note)
        what = "starting data workers failed"
        if message.pid >= 0:
            what = f"data worker with pid {message.pid} failed{place}"
        raise RunError(ExitCode(failure.code), f"{what}: {failure.text}")

    def _raise_died(self, message: Message) -> NoReturn:
        status, sample = message.note >> 32, message.note & 0xFFFFFFFF
        code = os.waitstatus_to_exitcode(status)
        place = self._place(message.number, sample)
        text = f"data worker with pid {message.pid} {_ended(code)}{place}"
        if -code in _CRASHES:
            remedy = "if it does so again, leave that sample out of the set (skip.json)"
            raise RunError(ExitCode.bad_data, f"{text}; {remedy}")
        if -code == signal.SIGKILL:
            text += (
                "; the system does this where memory runs out: lower data.num_workers or "
                "data.prefetch_bytes, or set data.worker_memory_bytes"
            )
        raise RunError(ExitCode.bug, text)

    def _place(self, number: int, sample: int) -> str:
        item = self._items.get(number)
        return " between two packs" if item is None else f" on {self._describe(item.work, sample)}"


class _Source(Generic[WorkT]):
    """An iterator that can be looked into by one item, and whose exception waits for its turn."""

    def __init__(self, work: Iterable[tuple[WorkT, int]]) -> None:
        self._work = iter(work)
        self._item: tuple[WorkT, int] | None = None
        self._error: Exception | None = None
        self._ended = False

    def peek(self) -> tuple[WorkT, int] | None:
        if self._item is None and not self._ended:
            try:
                self._item = next(self._work, None)
            except Exception as error:  # noqa: BLE001  raised by `finish`
                self._error = error
            self._ended = self._item is None
        return self._item

    def take(self) -> None:
        self._item = None

    def finish(self) -> None:
        if self._error is not None:
            raise self._error


def _ended(code: int) -> str:
    """Say how a process ended, from its exit code or the negative number of a signal."""
    if code < 0:
        return f"was killed by signal {-code} ({signal.strsignal(-code)})"
    return f"ended with exit code {code}"
