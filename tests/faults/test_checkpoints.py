"""Checkpoints under attack: killed saves, damaged files, no room, another number of ranks."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from launch.cli import main
from omni_train.engine.checkpoint_reader import CheckpointReader
from tests.security import evil

WORKER = Path(__file__).with_name("checkpoint_worker.py")
PROJECT = WORKER.parents[2]
KILLED = -9


def launch(out: Path, scenario: str, *, ranks: int = 1, **extra: str) -> dict[str, Any]:
    command = [sys.executable]
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        command += [f"--master-port={port}"]
    free = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
    done = subprocess.run(
        [*command, str(WORKER), str(out), scenario],
        env={**free, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT), **extra},
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((out / f"{scenario}.json").read_text())


def test_a_save_may_be_killed_at_any_write(tmp_path: Path) -> None:
    found = launch(tmp_path, "kills")
    for name, oldest in (("later", 2), ("first", 0)):
        rows = found[name]
        print(f"{name}: {len(rows)} write points")
        assert len(rows) >= 30
        for point, (status, step, same, left, _) in enumerate(rows):
            assert status == KILLED
            # Never less than what was there before, and never half of anything.
            assert step in (oldest, 3), f"point {point}"
            assert same, f"point {point}"
            assert left == [], f"point {point}"
        assert {row[1] for row in rows} == {oldest, 3}
        # Once the new one counts it stays: what follows is only tidying up.
        assert [row[1] for row in rows] == sorted(row[1] for row in rows)
        assert any(row[4] for row in rows), "something partial was moved to quarantine"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[str]:
    """A disk of 256 KiB, where this machine lets us make one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    try:
        made = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        made = False
    yield str(folder) if made else ""
    if made:
        subprocess.run(["umount", str(folder)], check=True)


def test_no_room_ends_in_74_and_harms_no_checkpoint(tmp_path: Path, small_disk: str) -> None:
    found = launch(tmp_path, "disk", SMALL_DISK=small_disk)
    assert found["limited"] == 74
    assert [name[:7] for name in found["limited-left"]] == ["frozen-", "step-1", "step-2"]
    if small_disk:
        # There was room for it as soon as the oldest had given way.
        assert (found["first"], found["left"]) == ("saved", ["step-2", "step-3"])
        assert found["second"].startswith("74 ")
        assert found["restored"] == 3


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    found = launch(tmp_path, "beside")
    order = found["order"]
    # Step 3 was done before the checkpoint of step 2 was there; its successor waited for it.
    assert order.index(["step", 3]) < order.index(["save", 2]) < order.index(["save", 4])
    assert [step for kind, step in order if kind == "save"] == [2, 4, 5]
    blocked_s, seconds = found["waits"][0]
    assert blocked_s < 0.2 < 1 < seconds
    assert found["resumed"] == [4, True]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Where two ranks attacked and wrote, and a row for each damage."""
    out = tmp_path_factory.mktemp("two-ranks")
    return out, launch(out, "damage", ranks=2)["rows"]


def test_every_damage_to_every_file_is_found_by_all_ranks(
    two_ranks: tuple[Path, list[Any]],
) -> None:
    rows = two_ranks[1]
    files = {row[0] for row in rows}
    assert len(files) == 6 + 3, files
    reasons = {"flip": "xxh3", "truncate": "size", "delete": "missing"}
    for name, kind, steps, same, said in rows:
        home, file = Path(name).parent.name, Path(name).name
        assert same, (name, kind)
        assert len(set(steps)) == 1, "all ranks restored the same step"
        if file == "manifest.json":
            # Of frozen weights, what the step's own manifest says counts.
            expected = [] if home.startswith("frozen") else [["step-2", file, "unreadable"]]
        else:
            expected = [["step-2", file, reasons[kind]]]
        assert said == expected, (name, kind)
        # Frozen weights are in the model already, so they are only written anew.
        assert steps[0] == (2 if home.startswith("frozen") else 1), (name, kind)


def test_weights_of_deepspeeds_own_files(
    two_ranks: tuple[Path, list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = two_ranks
    target = tmp_path / "converted"
    assert main(["checkpoint", "convert", str(out / "deepspeed"), str(target)]) == 0
    assert "6 tensors" in capsys.readouterr().out
    found = load_file(target / "model.safetensors")
    (step,) = (out / "ours" / "checkpoints").glob("step-*")
    ours = CheckpointReader(step)
    assert found.keys() == set(ours.names())
    for name, tensor in found.items():
        assert tensor.equal(ours.full(name)), name
    # A rank's file that is gone, and one that runs code: nothing is written.
    broken = shutil.copytree(out / "deepspeed", tmp_path / "broken")
    (shard,) = broken.rglob("*zero_pp_rank_1_*optim_states.pt")
    evil.zip_pickle(shard, tmp_path / "hacked")
    assert main(["checkpoint", "convert", str(broken), str(tmp_path / "no")]) == 77
    assert "asks for posix.system" in capsys.readouterr().err
    shard.unlink()
    assert main(["checkpoint", "convert", str(broken), str(tmp_path / "no")]) == 65
    assert "rank 1 of 2 is missing" in capsys.readouterr().err
    assert main(["checkpoint", "convert", str(tmp_path), str(tmp_path / "no")]) == 2
    assert not list(tmp_path.glob("no*"))
    assert not (tmp_path / "hacked").exists()


def test_a_run_says_which_of_its_checkpoints_are_whole(
    two_ranks: tuple[Path, list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(two_ranks[0] / "ours", tmp_path / "run")
    for action in ("ls", "verify"):
        assert main(["checkpoint", action, str(run)]) == 0
        assert capsys.readouterr().out.startswith("step-3: ")
    (shard,) = run.rglob("step-3/rank-00001.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["checkpoint", "verify", str(run), "--json"]) == 65
    (row,) = json.loads(capsys.readouterr().out)
    assert row["ranks"] == 2
    assert row["problems"][0].startswith("rank-00001.safetensors: size")
    assert main(["checkpoint", "ls", str(tmp_path)]) == 66


@pytest.mark.slow
def test_two_ranks_one_rank_and_two_again(tmp_path: Path) -> None:
    """Two learning rates and a frozen layer; the same samples, and the losses of two ranks."""
    straight = launch(tmp_path, "chain-first", ranks=2)
    launch(tmp_path, "chain-alone")
    back = launch(tmp_path, "chain-back", ranks=2)
    for precision, tolerance in (("fp32", 1e-4), ("bf16", 5e-2)):
        wanted, found = straight[f"{precision}-straight"], back[precision]
        assert found["keys"] == wanted["keys"]
        assert found["lr"] == wanted["lr"]
        off = [abs(a / b - 1) for a, b in zip(found["losses"], wanted["losses"], strict=True)]
        print(f"{precision}: losses differ by at most {max(off):.1e}")
        assert max(off) < tolerance
        assert found["steps"] == list(range(1, 11))
        assert [event["step"] for event in found["events"]] == [3, 6]
