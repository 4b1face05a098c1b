"""The data workers' side: one process that imports everything once and forks into the workers.

    rank -- starts --> this module -- forks --> worker 0, worker 1, ...

Not forked from the rank itself: a copy of its threads' locks (gloo, DeepSpeed) may hang, its
sockets would stay open when it dies, and its weights would count against a worker's memory cap. Not
multiprocessing's `forkserver` or `spawn`: both import the rank's main module again, in every
worker, and with it DeepSpeed.

Workers take work from one shared socket, whoever is free first, and live exactly as long as the
rank: they ignore SIGTERM and SIGINT, which the rank answers to, and end by themselves when its end
of the socket closes, however it died. Not done here: order, bounds, errors (prefetch.py).
"""

from __future__ import annotations

import gc
import mmap
import os
import resource
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from omni_train.config.errors import ConfigError, DataError
from omni_train.data.segment import Channel, Kind, Message, read_segment, write_segment
from omni_train.engine.exit_codes import RunError, exit_code_of

# Makes one result of one work item, and says on the way at which sample of the item it is.
Make = Callable[[Any, Callable[[int], None]], Any]


@dataclass(frozen=True, slots=True)
class Setup:
    """What the workers are told first.

    Args:
        make: found again by its import path; its state travels along.
        num_workers: processes.
        memory_bytes: cap of each (RLIMIT_DATA: heap, stacks and private mappings, not what it
            delivers); None for no cap.
    """

    make: Make
    num_workers: int
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception in a worker: the exit code it stands for, and what to show of it."""

    code: int
    text: str


def main(fd: int) -> None:
    """Run the workers of the rank at the other end of a socket until it closes."""
    code = 1
    try:
        _run(fd)
        code = 0
    except BaseException:  # noqa: BLE001  ends the process
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # nothing to tear down, and the rank waits for the end


def _run(fd: int) -> None:
    # A scheduler signals every process of a job; the rank decides what becomes of its workers.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=fd))
    try:
        message = channel.receive()
        assert message is not None, "waited for a message"
        setup: Setup = read_segment(message.fd)
        os.close(message.fd)
    except EOFError:
        return
    except BaseException as error:  # noqa: BLE001  the rank raises it
        _send_value(channel, Message(Kind.failed), failure_of(error))
        return
    torch.set_num_threads(1)  # workers share the cores with the ranks
    _raise_descriptor_limit()
    places = np.frombuffer(mmap.mmap(-1, 16 * setup.num_workers), np.int64).reshape(-1, 2)
    places[:] = -1, 0
    # The workers hold one end each and never write: it closes when this process dies.
    alive, held = os.pipe()
    gc.collect()
    gc.freeze()  # the collector's marks would copy the pages that the workers share
    data_bytes = _data_bytes()
    try:
        channel.send(Message(Kind.ready, note=data_bytes))
    except BrokenPipeError:  # the rank has left meanwhile
        return
    if setup.memory_bytes is not None and setup.memory_bytes <= data_bytes:
        return  # the rank says so
    place_of: dict[int, NDArray[np.int64]] = {}
    for place in places:
        pid = os.fork()
        if pid == 0:
            os.close(held)
            _run_worker(channel, setup, place, alive)
        place_of[pid] = place
    _report_deaths(channel, place_of)


def failure_of(error: BaseException) -> Failure:
    """Return what the rank shows: the message alone where it says what to do, else all of it."""
    mendable = isinstance(error, ConfigError | DataError | RunError)
    text = str(error) if mendable else "".join(traceback.format_exception(error)).rstrip()
    return Failure(int(exit_code_of(error)), text)


def _report_deaths(channel: Channel, place_of: dict[int, NDArray[np.int64]]) -> None:
    while place_of:
        pid, status = os.wait()
        item, sample = place_of.pop(pid).tolist()
        with suppress(OSError):  # the rank has left, which is why the worker ended
            channel.send(Message(Kind.died, pid, item, status << 32 | sample))


def _run_worker(channel: Channel, setup: Setup, place: NDArray[np.int64], alive: int) -> None:
    """Work until the rank leaves; never returns."""
    code = 1
    try:
        threading.Thread(target=_leave_with_rank, args=(channel, alive), daemon=True).start()
        if setup.memory_bytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (setup.memory_bytes, setup.memory_bytes))
        while True:
            _work_once(channel, setup.make, place)
    except (EOFError, BrokenPipeError):
        code = 0
    except BaseException:  # noqa: BLE001  ends the process; the rank is told of the exit code
        traceback.print_exc()
    finally:
        os._exit(code)


def _work_once(channel: Channel, make: Make, place: NDArray[np.int64]) -> None:
    """Take one item, make its result, send it."""
    message = channel.receive()
    assert message is not None, "waited for a message"
    place[:] = message.number, 0

    def at(sample: int) -> None:
        place[1] = sample

    try:
        try:
            work = read_segment(message.fd)
        finally:
            os.close(message.fd)
        answer, value = Kind.done, make(work, at)
    except Exception as error:  # noqa: BLE001  the rank raises it
        answer, value = Kind.failed, failure_of(error)
    _send_value(channel, Message(answer, os.getpid(), message.number, int(place[1])), value)
    place[:] = -1, 0


def _send_value(channel: Channel, message: Message, value: object) -> None:
    fd = write_segment(value)
    try:
        channel.send(replace(message, fd=fd))
    finally:
        os.close(fd)


def _leave_with_rank(channel: Channel, alive: int) -> None:
    """End this process, in the middle of a sample too, when the rank or the parent is gone."""
    hang_ups = select.poll()
    for fd in (channel.sock.fileno(), alive):
        hang_ups.register(fd, 0)  # no event is asked for: only a hang-up wakes it
    hang_ups.poll()
    os._exit(0)


def _raise_descriptor_limit() -> None:
    # Each result under way counts as a descriptor of the sender.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _data_bytes() -> int:
    """Return what this process has of what RLIMIT_DATA counts."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(
        int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData:")
    )
