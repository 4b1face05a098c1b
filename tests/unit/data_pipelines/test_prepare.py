"""Preparing: parts, restarts after SIGKILL at random points, and rows that cannot be used."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipelines.merge import merge
from data_pipelines.prepare import FOLDER, ChunkDone, Part, _sweep, prepare
from launch.cli import main
from launch.local import child_environment
from launch.stages import REPO
from omni_train.config.errors import ConfigError
from omni_train.data.index import index_path, read_index, read_manifest
from tests.unit.data_pipelines.sourcing import job, set_bytes, talks, tokenizer, wav

COUNT = 30


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, a tokenizer, and the set that one undisturbed run makes of them."""
    folder = tmp_path_factory.mktemp("prepare")
    talks(folder, COUNT)
    tokenizer(folder / "tok")
    run(folder, folder / "whole")
    merge(folder / "whole")
    return folder


def run(place: Path, out: Path, part: Part | None = None, workers: int = 0) -> list[ChunkDone]:
    made = job(place / "talks.jsonl", out, place / "tok", "jsonl")
    return prepare(made, part=part or Part(), num_workers=workers, report=lambda *_: None)


def command(place: Path, out: Path, *options: str) -> list[str]:
    return [
        *("data", "prepare", str(place / "talks.jsonl"), str(out), "--format", "jsonl"),
        *("--name", "set", "--samples-per-shard", "4", "--tokenizer", str(place / "tok")),
        *options,
    ]


def test_every_row_is_a_sample_or_has_a_reason(place: Path) -> None:
    whole = place / "whole"
    rows = [json.loads(line) for line in (whole / "rejected.jsonl").read_text().splitlines()]
    found = [(row["file"], row["row"], row["reason"]) for row in rows]
    assert found == [
        ("talks.jsonl", 7, "corrupt_json"),
        ("talks.jsonl", 14, "missing_media"),
        ("talks.jsonl", 21, "truncated"),
        ("talks.jsonl", 28, "corrupt_json"),
    ]
    manifest = read_manifest(whole)
    keys = [row.key for s in manifest.shards for row in read_index(index_path(whole / s.name))]
    rejected = {row for _, row, _ in found}
    wanted = [n for n in range(1, COUNT + 1) if n not in rejected]
    assert keys == [f"set-{n:09d}" for n in wanted]


def test_index_has_scores_and_hashes(place: Path) -> None:
    whole = place / "whole"
    rows = [
        row for s in read_manifest(whole).shards for row in read_index(index_path(whole / s.name))
    ]
    assert len({row.content_hash for row in rows}) == len(rows)
    assert all(row.quality["words_per_second"] > 0 for row in rows)
    assert all(row.quality["clipping_share"] == 0.0 for row in rows)


def test_parts_and_merge_equal_one_run(place: Path, tmp_path: Path) -> None:
    for number in (2, 0):
        run(place, tmp_path, Part(number, 3))
    with pytest.raises(FileNotFoundError, match=r"part-1-of-3\.json"):
        merge(tmp_path)
    run(place, tmp_path, Part(1, 3))
    merge(tmp_path)
    assert set_bytes(tmp_path) == set_bytes(place / "whole")


def test_workers_make_the_same_bytes(place: Path, tmp_path: Path) -> None:
    run(place, tmp_path, workers=2)
    merge(tmp_path)
    assert set_bytes(tmp_path) == set_bytes(place / "whole")


def test_a_finished_shard_is_kept_and_a_changed_input_is_not(place: Path, tmp_path: Path) -> None:
    talks(tmp_path, 12)
    tokenizer(tmp_path / "tok")
    assert not any(chunk.reused for chunk in run(tmp_path, tmp_path / "o"))
    assert all(chunk.reused for chunk in run(tmp_path, tmp_path / "o"))
    (tmp_path / "media" / "9.wav").write_bytes(wav(99))
    (tmp_path / "o" / "shard-000000.parquet").write_bytes(b"torn")
    assert [chunk.reused for chunk in run(tmp_path, tmp_path / "o")] == [False, True, False]


# Forks before anything has run, so that no thread is lost. Each child is killed at a random moment
# after it has finished one more chunk, so somewhere in the making of the next.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from tests.unit.data_pipelines.test_prepare import run
place, out, rng = Path(sys.argv[1]), Path(sys.argv[2]), random.Random(0)
count = lambda: len(list((out / "prepare").glob("0*.json")))
while (before := count()) < 7:
    child = os.fork()
    if child == 0:
        run(place, out)
        os._exit(0)
    while count() == before:
        time.sleep(0.002)
    time.sleep(rng.uniform(0.0, 0.03))
    os.kill(child, signal.SIGKILL)
    killed = os.waitpid(child, 0)[1] == signal.SIGKILL
    print(int(killed), count(), flush=True)
"""


def test_killed_at_random_points_it_ends_in_the_same_bytes(place: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(place), str(tmp_path)],
        cwd=REPO,
        env=child_environment(ranks=2),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    outcomes = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    killed_at = {chunks for killed, chunks in outcomes if killed}
    # Killed in the middle of the work, not only before or after it.
    assert killed_at - {0, 8}, outcomes
    run(place, tmp_path)
    merge(tmp_path)
    assert set_bytes(tmp_path) == set_bytes(place / "whole")
    assert list(tmp_path.rglob("*.tmp-*")) == []


def test_workers_end_with_the_process_that_started_them(place: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", *command(place, tmp_path, "--workers", "2")],
        cwd=REPO,
        env=child_environment(ranks=2),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not list((tmp_path / "prepare").glob("0*.json")) and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 20
    # The group is empty when its last process has gone.
    while time.monotonic() < until:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("workers outlived the process that started them")
    run(place, tmp_path)
    merge(tmp_path)
    assert set_bytes(tmp_path) == set_bytes(place / "whole")


def test_the_command_and_its_exit_codes(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(place, tmp_path / "a", "--workers", "0")) == 0
    assert "26 samples in 8 shards; 4 rejected: corrupt_json 2" in capsys.readouterr().out
    assert main(command(place, tmp_path / "a", "--workers", "0", "--strict")) == 65
    assert main(command(place, tmp_path / "a", "--workers", "0", "--task", "asr")) == 2
    assert "was begun with" in capsys.readouterr().err
    part = command(place, tmp_path / "b", "--workers", "0", "--part", "0/2")
    assert main(part) == 0
    assert main(["data", "merge", str(tmp_path / "b")]) == 66
    assert "part-1-of-2.json" in capsys.readouterr().err
    assert main(command(tmp_path, tmp_path / "c")) == 66
    assert main([*part[:-1], "2/2"]) == 2


def test_a_directory_of_other_shards_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "shard-000000.tar").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="not made by prepare"):
        run(place, tmp_path)
    assert (tmp_path / "shard-000000.tar").read_bytes() == b"mine"


def test_a_restart_sweeps_what_it_left_half_written_and_nothing_of_other_parts(
    tmp_path: Path,
) -> None:
    (tmp_path / FOLDER).mkdir()
    mine = [".shard-000005.tar.tmp-9", ".000005.json.tmp-9", "..000005.check.tmp-9.tmp-9"]
    others = [".000006.json.tmp-9", "..000006.check.tmp-9.tmp-9"]
    for name in mine + others:
        (tmp_path / FOLDER / name).touch()
    _sweep(tmp_path, [5])
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == sorted(others)
