"""Data workers that die, fail or are left: said at once and by name, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.stages import REPO
from omni_train.data.config import DataConfig, SourceConfig
from omni_train.data.loader import PlannedLoader
from omni_train.data.prefetch import Prefetcher
from omni_train.engine.exit_codes import ExitCode, RunError
from tests.faults.http_server import serving
from tests.faults.shards import write_set
from tests.unit.data import processes
from tests.unit.data.processes import is_alive, starters, wait_until, workers_of
from tests.unit.data.samples import CONFIG, SPEC, TOKENIZER

# Of a busy machine; what the workers do meanwhile takes minutes.
AT_ONCE_S = 5.0
BUSY_S = 60


def prefetcher(num_workers: int = 2) -> Any:
    return Prefetcher(
        processes.ends,
        num_workers=num_workers,
        max_bytes=1 << 20,
        describe=processes.describe,
    )


def results(made: Any, *work: tuple[str, int]) -> Iterator[int]:
    return made.results((item, 100) for item in work)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = processes.shared_files(os.getpid())
    yield
    wait_until(lambda: not starters(os.getpid()), AT_ONCE_S)
    assert processes.shared_files(os.getpid()) == before


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        (("signal", signal.SIGKILL), ExitCode.bug, r"signal 9 \(Killed\).* where memory runs out"),
        (("signal", signal.SIGSEGV), ExitCode.bad_data, "signal 11 .*leave that sample out"),
        (("exit", 3), ExitCode.bug, "ended with exit code 3"),
    ],
)
def test_a_worker_that_dies_is_named_at_once(
    work: tuple[str, int], code: ExitCode, said: str
) -> None:
    # The other worker is busy for long: nobody waits for it. Whether the first result arrives
    # before the news of the death is up to the two workers.
    started = time.monotonic()
    with prefetcher() as made, pytest.raises(RunError, match=said) as caught:
        list(results(made, ("ok", 1), ("sleep", BUSY_S), work))
    assert time.monotonic() - started < BUSY_S / 2
    assert caught.value.code is code
    assert f"{work!r} at 3" in str(caught.value), "the item and the sample in it"


def test_an_exception_surfaces_with_its_traceback_and_its_place() -> None:
    with prefetcher() as made, pytest.raises(RunError) as caught:
        list(results(made, ("raise", 7)))
    text = str(caught.value)
    assert "('raise', 7) at 3" in text
    assert "Traceback" in text
    assert "processes.py" in text
    assert "KeyError: 'no such 7'" in text
    assert caught.value.code is ExitCode.bug


def test_the_process_that_starts_the_workers_takes_them_along() -> None:
    with prefetcher() as made:
        ready = results(made, ("ok", 1), ("sleep", BUSY_S), ("sleep", BUSY_S))
        assert next(ready) == 1
        workers = workers_of(os.getpid(), 2)
        os.kill(made._process.pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(RunError, match="starts the data workers was killed by signal 9"):
            next(ready)
        assert time.monotonic() - started < AT_ONCE_S
        wait_until(lambda: not any(map(is_alive, workers)), AT_ONCE_S)


def test_a_worker_is_deaf_to_the_signals_that_its_rank_answers_to() -> None:
    with prefetcher(1) as made:
        ready = results(made, ("ok", 1), ("ok", 2), ("ok", 3))
        assert next(ready) == 1
        for pid in (made._process.pid, *workers_of(os.getpid(), 1)):
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
        time.sleep(0.5)
        assert list(ready) == [2, 3]


SCRIPT = """
import os, signal, sys
from omni_train.data.prefetch import Prefetcher
from omni_train.engine.exit_codes import leave
from tests.unit.data import processes

# What a background job of a shell has it ignore.
signal.signal(signal.SIGINT, signal.default_int_handler)
made = Prefetcher(processes.ends, num_workers=2, max_bytes=100, describe=processes.describe)
ready = made.results((item, 10) for item in [("ok", 1), ("sleep", 1), ("sleep", 2)])
print(next(ready), flush=True)
if sys.argv[1] == "wait":
    with made:
        next(ready)
sys.stdin.readline()
if sys.argv[1] == "leave":
    leave(5)
"""


@pytest.mark.parametrize(
    ("what", "sent", "code"),
    [
        ("exit", None, 0),
        ("leave", None, 5),
        ("wait", signal.SIGKILL, -signal.SIGKILL),
        ("wait", signal.SIGTERM, -signal.SIGTERM),
        ("wait", signal.SIGINT, None),
    ],
)
def test_workers_end_with_their_rank_however_it_ends(
    what: str, sent: signal.Signals | None, code: int | None
) -> None:
    rank = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, what],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert rank.stdout is not None
    assert rank.stdout.readline() == "1\n"
    workers = workers_of(rank.pid, 2)
    started = time.monotonic()
    if sent is not None:
        rank.send_signal(sent)
    _, error = rank.communicate("\n" if sent is None else None, timeout=10)
    assert time.monotonic() - started < AT_ONCE_S, "no hang at the end"
    assert rank.returncode == code if code is not None else "KeyboardInterrupt" in error
    wait_until(lambda: not any(map(is_alive, workers)), AT_ONCE_S)


def test_a_loader_names_what_a_killed_worker_was_reading(tmp_path: Path) -> None:
    write_set(tmp_path, num_shards=1, per_shard=6)
    with serving() as server:
        server.files = {f"/{path.name}": path.read_bytes() for path in tmp_path.iterdir()}
        loader = PlannedLoader(
            DataConfig(
                sources={"store": SourceConfig(path=server.url)},
                pack_tokens=512,
                global_batch_packs=1,
                num_workers=1,
                processing=CONFIG,
            ),
            tokenizer=TOKENIZER,
            spec=SPEC,
            rank=0,
            world_size=1,
            seed=0,
            ledger=lambda **row: None,
        )
        steps = loader.steps()
        wanted = {key for batch in next(steps).micro_batches for key in batch.keys}
        assert wanted
        server.faults, server.hang_s = ["hang!"], 3.0
        steps.close()
        assert not starters(os.getpid()), "a loader that is left takes its workers along"

        again = loader.steps()

        def kill() -> None:
            worker = workers_of(os.getpid(), 1)[0]
            asked = len(server.requests)
            wait_until(lambda: len(server.requests) > asked, 30)
            os.kill(worker, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(RunError, match=r"signal 9") as caught:
            next(again)
        killer.join()
    assert "sample k-" in str(caught.value)
    assert "of source store, shard http://127.0.0.1" in str(caught.value)
    assert "shard-000000.tar" in str(caught.value)
