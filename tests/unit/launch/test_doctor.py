"""The doctor's checks on good and on broken ground, and its ranks with a clock that is off."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import doctor_checks
from launch.cli import main
from launch.doctor_checks import Check, numbers
from launch.local import child_environment
from launch.stages import REPO


def by_name(found: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in found}


def test_versions_are_held_to_the_pins_and_to_the_floors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert numbers("2.13.0+cpu") == (2, 13, 0)
    assert by_name(doctor_checks.check_packages())["packages"].status == "pass"
    other = tmp_path / "constraints.txt"
    other.write_text("torch==0.0.1\n")
    warned = by_name(doctor_checks.check_packages(other))["packages"]
    assert warned.status == "warn"
    assert "tested with 0.0.1" in warned.detail
    monkeypatch.setattr(doctor_checks, "SAFE_FROM", {"torch": (99,)})
    unsafe = by_name(doctor_checks.check_packages())["torch"]
    assert (unsafe.status, unsafe.remedy) == ("fail", "install torch>=99")


def test_disk_wants_room_for_three_checkpoints(tmp_path: Path) -> None:
    small, large = (
        by_name(doctor_checks.check_disk(tmp_path / "not" / "there", needed))["disk space"]
        for needed in (1.0, 1e18)
    )
    assert (small.status, large.status) == ("pass", "fail")
    assert "--dir" in large.remedy
    assert not list(tmp_path.iterdir())


def test_a_source_that_cannot_be_read_fails_with_its_place(tmp_path: Path) -> None:
    found = by_name(doctor_checks.check_sources({"talks": str(tmp_path)}))["data talks"]
    assert found.status == "fail"
    assert str(tmp_path) in found.detail


def test_every_codec_that_data_may_use_is_there() -> None:
    assert [check.status for check in doctor_checks.check_codecs()] == ["pass"]


def test_tracking_that_does_not_answer_only_warns() -> None:
    assert [check.status for check in doctor_checks.check_wandb("127.0.0.1", 1)] == ["warn"]


def report(**changes: Any) -> dict[str, Any]:
    ranks = [
        {"host": host, "device": "cpu", "packages": {"torch": "2"}, "offset_s": offset}
        for host, offset in (("a", 0.0), ("b", 0.001))
    ]
    return {"ranks": ranks, "bytes_per_s": 1e9, "backend": "gloo"} | changes


def test_ranks_are_judged() -> None:
    good = by_name(doctor_checks.judge_ranks(report()))
    assert {check.status for check in good.values()} == {"pass"}
    assert "2 ranks on 2 hosts" in good["ranks"].detail
    slow = report(bytes_per_s=1e6)
    assert by_name(doctor_checks.judge_ranks(slow))["all-reduce"].status == "warn"
    nccl = report(bytes_per_s=1e9, backend="cpu:gloo,cuda:nccl")
    assert by_name(doctor_checks.judge_ranks(nccl))["all-reduce"].status == "warn"
    for offset, status in ((-0.5, "warn"), (9.0, "fail")):
        apart = report()
        apart["ranks"][1]["offset_s"] = offset
        clocks = by_name(doctor_checks.judge_ranks(apart))["clocks"]
        assert (clocks.status, "chrony) on b" in clocks.remedy) == (status, True)
    mixed = report()
    mixed["ranks"][1]["packages"] = {"torch": "1"}
    assert by_name(doctor_checks.judge_ranks(mixed))["software"].status == "fail"


def test_the_command_prints_json_and_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_checks, "check_wandb", list)
    argv = ["doctor", "--ranks", "0", "--dir", str(tmp_path), "--json"]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"python", "packages", "GPU", "disk space", "codecs"} <= {c["name"] for c in found}
    monkeypatch.setattr(doctor_checks, "SAFE_FROM", {"torch": (99,)})
    assert main(argv) == 2


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["doctor", "stage1_audoi"], "there is no such stage"),
        (["doctor", "--nodes", "2"], "--rendezvous HOST:PORT"),
        (["doctor", "--nodes", "2", "--rendezvous", "a b"], "not HOST:PORT"),
        (["doctor", "--ranks", "-1"], "must not be negative"),
    ],
)
def test_mistakes_are_answered(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_clock_that_is_two_seconds_off_is_found(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, time\n"
        "real = time.time\n"
        "if os.environ['RANK'] == '1':\n"
        "    time.time = lambda: real() + 2.0\n"
        "from launch.doctor_ranks import main\n"
        "main()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--local-addr=127.0.0.1", "--nproc-per-node=2", str(script)],
        cwd=REPO,
        env=child_environment(ranks=2),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    found = json.loads(line)
    offsets = [rank["offset_s"] for rank in found["ranks"]]
    assert offsets == pytest.approx([0.0, 2.0], abs=0.05)
    assert found["bytes_per_s"] > 1e6


@pytest.mark.slow
def test_two_nodes_report_once() -> None:
    """Two agents of one rank each, as srun would start them on two nodes."""
    argv = ["doctor", "--nodes", "2", "--ranks", "1", "--rendezvous", "127.0.0.1:29731", "--json"]
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "launch", *argv],
            cwd=REPO,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [json.loads(agent.communicate(timeout=300)[0]) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0]
    clocks = [check for output in outputs for check in output if check["name"] == "clocks"]
    assert len(clocks) == 1
    assert clocks[0]["status"] == "pass"
