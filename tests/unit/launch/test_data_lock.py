"""Two processes, one part: the second is told who has it; a dead owner's lock is taken over."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.cli import main
from launch.local import child_environment
from launch.stages import REPO
from tests.unit.data_pipelines.sourcing import set_bytes, talks, tokenizer


def arguments(place: Path, *more: str) -> list[str]:
    return [
        *("data", "prepare", str(place / "talks.jsonl"), str(place / "out"), "--format", "jsonl"),
        *("--tokenizer", str(place / "tok"), "--name", "set", "--samples-per-shard", "1"),
        *("--workers", "0", *more),
    ]


@contextmanager
def started(place: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A real prepare that has made its first shard."""
    made = place / "out" / "prepare" / "000000.json"
    command = [sys.executable, "-m", "launch", *arguments(place, *more)]
    process = subprocess.Popen(command, cwd=REPO, env=child_environment(), stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not made.is_file() and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def stopped_in_the_middle(place: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """One that holds its lock and does not go on."""
    with started(place, *more) as process:
        process.send_signal(signal.SIGSTOP)
        assert process.poll() is None
        yield process


@pytest.fixture
def place(tmp_path: Path) -> Path:
    talks(tmp_path, 40)
    tokenizer(tmp_path / "tok")
    return tmp_path


def test_the_second_is_told_who_has_it_and_a_dead_one_is_taken_over(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with stopped_in_the_middle(place) as first:
        assert main(arguments(place)) == 73
        said = capsys.readouterr().err
        today = time.strftime("%Y-%m-%d ")
        for word in (
            f"process {first.pid} ",
            socket.gethostname(),
            f"since {today}",
            "wait for it",
        ):
            assert word in said
        assert len(said.splitlines()) == 1
        # Another part of the same count is free; another count would make the same shards.
        assert main(arguments(place, "--part", "1/2")) == 73
        capsys.readouterr()
    assert first.returncode == -signal.SIGKILL
    lock = place / "out" / "prepare" / "part-0-of-1.lock"
    assert json.loads(lock.read_text())["pid"] == first.pid
    assert main(arguments(place)) == 0
    said = capsys.readouterr().err
    assert f"was left by process {first.pid} " in said
    # Given back: nothing to take over, and nothing is made again.
    assert lock.read_text() == ""
    assert main(arguments(place)) == 0
    assert "was left by" not in capsys.readouterr().err
    whole = set_bytes(place / "out")
    (place / "out").rename(place / "first")
    assert main(arguments(place)) == 0
    assert set_bytes(place / "out") == whole


def test_one_that_is_told_to_end_gives_its_lock_back(place: Path) -> None:
    """As SLURM does before it starts the job again, perhaps on another machine."""
    with started(place) as process:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 75
    assert b"the same command goes on" in said
    assert (place / "out" / "prepare" / "part-0-of-1.lock").read_text() == ""
    assert main(arguments(place)) == 0


def test_parts_of_one_count_work_side_by_side(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with stopped_in_the_middle(place, "--part", "0/2"):
        assert main(arguments(place, "--part", "1/2")) == 0
        assert main(arguments(place, "--part", "0/2")) == 73
        assert "part-0-of-2" in capsys.readouterr().err


def test_another_machine_counts_by_its_name(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its process cannot be looked up from here."""
    lock = place / "out" / "prepare" / "part-0-of-1.lock"
    lock.parent.mkdir(parents=True)
    owner = {"host": "elsewhere", "pid": os.getpid(), "run": "x", "since": time.time()}
    lock.write_text(json.dumps(owner))
    assert main(arguments(place)) == 73
    said = capsys.readouterr().err
    assert "on elsewhere" in said
    assert f"remove {lock}" in said
    lock.unlink()
    assert main(arguments(place)) == 0
