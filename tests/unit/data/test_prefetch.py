"""Results of workers: all of them, in order, within their bytes; and what crosses the socket."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from omni_train.config.errors import ConfigError, DataError
from omni_train.data.prefetch import Prefetcher
from omni_train.data.segment import read_segment, write_segment
from tests.unit.data import processes
from tests.unit.data.processes import describe

MIB = 1 << 20


def prefetcher(make: Any, *, num_workers: int = 2, max_bytes: int = MIB, **settings: Any) -> Any:
    return Prefetcher(
        make, num_workers=num_workers, max_bytes=max_bytes, describe=describe, **settings
    )


@pytest.mark.parametrize("num_workers", [1, 3])
def test_results_come_in_the_order_of_the_work(num_workers: int) -> None:
    # The first are the slowest: three workers finish them last.
    work = [(number, 0.02 * (6 - number % 7)) for number in range(20)]
    with prefetcher(processes.tensors, num_workers=num_workers) as made:
        found = list(made.results((item, 100) for item in work))
        assert [len(result["bytes"]) for result in found] == [number for number, _ in work]
        assert len({result["pid"] for result in found}) == num_workers
        assert os.getpid() not in {result["pid"] for result in found}
        again = list(made.results((item, 100) for item in work[:3]))
        assert [len(result["bytes"]) for result in again] == [0, 1, 2]


def test_values_arrive_as_they_are_and_are_the_readers_own() -> None:
    with prefetcher(processes.mixed) as made:
        first, second = made.results((number, 100) for number in (3, 4))
    for number, found in ((3, first), (4, second)):
        wanted = processes.mixed(number, lambda sample: None)
        assert found["text"] == wanted["text"]
        torch.testing.assert_close(found["strided"], wanted["strided"], rtol=0, atol=0)
        torch.testing.assert_close(found["flags"], wanted["flags"], rtol=0, atol=0)
        assert [part.shape for part in found["empty"]] == [(0, 3), (2, 0)]
        assert [part.dtype for part in found["empty"]] == [torch.uint8, torch.float32]
        found["strided"].zero_()  # writable, and after the workers are gone


def test_no_more_is_prepared_than_the_bytes_allow(tmp_path: Path) -> None:
    work = [((str(tmp_path), MIB), MIB) for _ in range(30)]

    def made() -> int:
        return len(list(tmp_path.iterdir()))

    with prefetcher(processes.noted, max_bytes=6 * MIB) as workers:
        results = workers.results(work)
        for taken in range(1, 21):
            next(results)
            # Those taken, and six in waiting; a header makes each a little more than a MiB.
            assert made() <= taken + 6
        processes.wait_until(lambda: made() >= 24, 10)
        time.sleep(0.3)
        assert made() <= 26, "it stops there, however long nobody asks"


def test_the_bytes_that_came_out_count_not_those_that_were_expected(tmp_path: Path) -> None:
    pulled = 0

    def work() -> Iterator[tuple[Any, int]]:
        nonlocal pulled
        for _ in range(40):
            pulled += 1
            time.sleep(0.05)  # meanwhile the one before is made
            yield (str(tmp_path), 2 * MIB), 100

    with prefetcher(processes.noted, num_workers=1, max_bytes=8 * MIB) as workers:
        list(workers.results([((str(tmp_path), 1), 1)]))  # it has started now
        results = workers.results(work())
        for taken in range(1, 31):
            next(results)
            # Four are done and waiting, one is under way, the next is known.
            assert pulled <= taken + 6


def test_an_item_over_the_bound_is_made_alone(tmp_path: Path) -> None:
    work = [((str(tmp_path), 3 * MIB), 3 * MIB) for _ in range(5)]
    with prefetcher(processes.noted, max_bytes=MIB) as workers:
        for number, result in enumerate(workers.results(work), 1):
            time.sleep(0.05)
            assert len(result) == 3 * MIB
            assert len(list(tmp_path.iterdir())) == number


class Tap:
    """A socket that notes the bytes of every message."""

    def __init__(self, sock: Any) -> None:
        self.sock, self.sent, self.received = sock, [], []  # type: ignore[var-annotated]

    def sendmsg(self, parts: list[bytes], *rest: Any) -> int:
        self.sent.append(sum(map(len, parts)))
        return self.sock.sendmsg(parts, *rest)

    def recvmsg(self, *sizes: int) -> Any:
        answer = self.sock.recvmsg(*sizes)
        self.received.append(len(answer[0]))
        return answer

    def close(self) -> None:
        self.sock.close()


def test_what_crosses_the_socket_does_not_grow_with_the_media() -> None:
    # Of other tests in this process.
    before = processes.shared_files(os.getpid())
    with prefetcher(processes.tensors, max_bytes=256 * MIB) as made:
        tap = made._channel.sock = Tap(made._channel.sock)
        sizes = [10, 64 * MIB, 1000]
        found = list(made.results(((size, 0.0), size) for size in sizes))
        assert [len(result["bytes"]) for result in found] == sizes
        for pid in (os.getpid(), *processes.workers_of(os.getpid(), 2)):
            left = processes.shared_files(pid) - before
            assert not left, "no file that a killed process would leave"
    assert len(tap.sent) == 3
    assert len(tap.received) >= 3
    assert set(tap.sent) | set(tap.received) == {24}


def num_mapped() -> int:
    """Segments that this process has mapped."""
    return Path("/proc/self/maps").read_text().count("memfd:omni-train")


def test_shared_memory_holds_no_file_and_goes_with_its_tensors() -> None:
    gc.collect()  # segments of other tests in this process
    before, mapped = len(list(Path("/proc/self/fd").iterdir())), num_mapped()
    fd = write_segment([torch.zeros(MIB, dtype=torch.uint8), "text"])
    value = read_segment(fd)
    os.close(fd)
    assert num_mapped() > mapped
    part = value[0][5:10]
    del value
    part[:] = 1
    del part
    assert num_mapped() == mapped
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_an_error_of_the_work_itself_comes_after_the_results_before_it() -> None:
    def work() -> Iterator[tuple[Any, int]]:
        yield (1, 0.3), 10
        yield (2, 0.0), 10
        raise DataError("no_samples", "nothing more")

    with prefetcher(processes.tensors) as made:
        results = made.results(work())
        assert [len(next(results)["bytes"]) for _ in range(2)] == [1, 2]
        with pytest.raises(DataError, match="nothing more"):
            next(results)


def test_a_cap_below_what_the_libraries_need_is_refused() -> None:
    with (
        prefetcher(processes.tensors, memory_bytes=64 * MIB) as made,
        pytest.raises(ConfigError, match=r"data\.worker_memory_bytes=67108864: a worker has \d+"),
    ):
        list(made.results([((1, 0.0), 1)]))
