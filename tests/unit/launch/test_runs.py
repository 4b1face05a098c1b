"""The runs command on run directories as runs write them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli import main
from launch.runs import describe_run, differences, removable
from launch.runs_tail import plot
from launch.stages import REPO
from omni_train.engine.lock import RunLock, living_owner


def step(number: int, loss: float | str) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": number,
        "loss": loss,
        "tokens_per_s": 100.0,
        "grad_norm": {"total": 1.0},
        "elapsed_s": float(number),
    }


def make_run(folder: Path, *, status: str = "done", lr: float = 0.1, steps: int = 4) -> Path:
    folder.mkdir(parents=True)
    events: list[dict[str, Any]] = [
        {"kind": "run_start", "stage": "stage1_audio", "ranks": 2, "versions": {"torch": "2"}},
        {"kind": "fit_start", "max_steps": 8},
        *(step(n, 1.0 / n) for n in range(1, steps + 1)),
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    state = {"status": status, "stage": "stage1_audio", "step": steps, "exit_code": 0, "reason": ""}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "resolved.yaml").write_text(yaml.safe_dump({"optim": {"lr": lr}, "phase": "adapter"}))
    (folder / "fingerprint.json").write_text(
        json.dumps({"data": {"asr": "abc"}, "code": {"omni_train": str(lr)}, "versions": {}})
    )
    return folder


def test_list_finds_runs_in_folders_and_sees_who_died(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "demo" / "b", status="running")
    assert main(["runs", "list", str(tmp_path), "--json"]) == 0
    rows = {Path(row["path"]).name: row for row in json.loads(capsys.readouterr().out)}
    assert (rows["a"]["status"], rows["b"]["status"]) == ("done", "died")
    assert (rows["a"]["step"], rows["a"]["max_steps"], rows["a"]["loss"]) == (4, 8, 0.25)
    assert main(["runs", "list", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "demo/b" in printed
    assert "4/8" in printed


def test_a_run_that_somebody_owns_is_running(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", status="running")
    lock = RunLock(run / "lock")
    lock.acquire("a")
    try:
        # Another process must see it: an flock says nothing to its own holder.
        code = f"from launch.runs import *; print(describe_run(Path({str(run)!r})).status)"
        seen = subprocess.run(
            [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
        )
        assert seen.stdout.strip() == "running"
        (run / "checkpoints" / "step-1.tmp-00").mkdir(parents=True)
        code = f"from launch.runs import *; print(removable(Path({str(run)!r}), keep=1))"
        seen = subprocess.run(
            [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
        )
        assert seen.stdout.strip() == "[]"
    finally:
        lock.release()
    assert living_owner(run / "lock") == {}
    assert describe_run(run).status == "died"


def test_an_owner_on_another_machine_is_believed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"host": f"not-{socket.gethostname()}", "pid": os.getpid()}))
    assert living_owner(lock)["pid"] == os.getpid()
    assert living_owner(tmp_path / "none") == {}


def test_diff_names_settings_data_and_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", lr=0.2)
    found = differences(one, two)
    assert found["settings"] == {"optim.lr": (0.1, 0.2)}
    assert found["data"] == {}
    assert found["code"] == {"omni_train": ("0.1", "0.2")}
    assert main(["runs", "diff", str(one), str(two)]) == 0
    assert "data: the same" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [30, 80])
def test_no_name_and_no_value_is_cut(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    long = "a_run_whose_name_has_rather_many_letters_" * 2
    make_run(tmp_path / long), make_run(tmp_path / "b", lr=0.2)
    assert main(["runs", "list", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert long in text
    assert "tok/s" not in text
    assert main(["runs", "diff", str(tmp_path / long), str(tmp_path / "b")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"    0.1    ({tmp_path / long})" in lines
    assert "  optim.lr" in lines


def test_show_counts_what_happened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a")
    (run / "ledger.jsonl").write_text(json.dumps({"reason": "over_budget: 9 tokens"}) + "\n")
    (run / "checkpoints" / "step-3").mkdir(parents=True)
    (run / "checkpoints" / "step-4").mkdir()
    (run / "checkpoints" / "step-3" / "manifest.json").write_text("{}")
    assert main(["runs", "show", str(run), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["ledger"] == {"over_budget": 1}
    assert (values["checkpoints"], values["incomplete"]) == (["step-3"], ["step-4"])
    assert values["events"]["step"] == 4


def test_clean_names_first_and_deletes_only_what_it_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "a")
    for name in ("step-1", "step-2", "step-3", "step-9.tmp-11"):
        (run / "checkpoints" / name).mkdir(parents=True)
        (run / "checkpoints" / name / "manifest.json").write_text("{}")
    (run / "quarantine" / "x").mkdir(parents=True)
    found = {path.name for path in removable(run, keep=2)}
    assert found == {"step-1", "step-9.tmp-11", "quarantine"}
    assert main(["runs", "clean", str(tmp_path / "a" / "checkpoints")]) == 0
    assert "nothing to delete" in capsys.readouterr().out
    assert main(["runs", "clean", str(tmp_path), "--keep", "2"]) == 0
    assert "would be deleted" in capsys.readouterr().out
    assert (run / "quarantine").is_dir()
    assert main(["runs", "clean", str(tmp_path), "--keep", "2", "--yes"]) == 0
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert left == {"step-2", "step-3"}
    assert not (run / "quarantine").exists()


def test_the_curve_has_the_shape_of_the_losses() -> None:
    lines = plot([4.0, 3.0, 2.0, float("nan"), 1.0], width=40, rows=4).splitlines()
    stars = [(row, line.index("*", 10)) for row, line in enumerate(lines) if "*" in line[10:]]
    assert len(lines) == 4
    assert stars == [(0, 10), (1, 11), (2, 12), (3, 14)]
    assert lines[0].split("|")[0].strip() == "4"
    assert lines[-1].split("|")[0].strip() == "1"
    many = plot([float(n) for n in range(1000)], width=80)
    assert max(map(len, many.splitlines())) <= 80
    assert plot([], width=40) == plot([float("nan")], width=40) == "no training step"


def test_tail_follows_until_the_run_ends(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", status="running")
    lock = RunLock(run / "lock")
    lock.acquire("a")
    try:
        watcher = subprocess.Popen(
            [sys.executable, "-m", "launch", "runs", "tail", str(run), "--json"],
            cwd=REPO,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert watcher.stdout is not None
        first = [json.loads(watcher.stdout.readline())["step"] for _ in range(4)]
        with (run / "events.jsonl").open("a") as file:
            file.write(json.dumps(step(5, "nan")) + "\n")
        then = json.loads(watcher.stdout.readline())["step"]
        state = json.loads((run / "state.json").read_text()) | {"status": "done"}
        (run / "state.json").write_text(json.dumps(state))
        assert watcher.wait(timeout=60) == 0
    finally:
        lock.release()
    assert (first, then) == ([1, 2, 3, 4], 5)


def test_tail_once_draws_the_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a")
    started = time.monotonic()
    assert main(["runs", "tail", str(run), "--once"]) == 0
    assert time.monotonic() - started < 30
    printed = capsys.readouterr().out
    assert "done, 4 steps" in printed
    assert "step       4" in printed


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["runs", "show"], 2, "takes 1 directories"),
        (["runs", "show", "nowhere"], 66, "no run there"),
        (["runs", "list", "nowhere"], 66, "no such directory"),
        (["runs", "list", "--yes"], 2, "belongs to runs clean"),
        (["runs", "clean", "--keep", "0"], 2, "one checkpoint stays"),
    ],
)
def test_mistakes_are_answered(
    argv: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == code
    assert said in capsys.readouterr().err


def test_what_slurm_says_of_a_job_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """squeue and sacct as scripts that print what the real ones do (tests/e2e has those)."""
    root, programs = tmp_path / "runs", tmp_path / "bin"
    make_run(root / "lost", status="running")
    make_run(root / "old")
    for name, number in (("lost", 7), ("old", 3), ("next", 8), ("sweep", 9)):
        (root / name).mkdir(exist_ok=True)
        (root / name / "job.json").write_text(json.dumps({"target": "slurm", "job": str(number)}))
    (root / "ranking").mkdir()
    (root / "ranking" / "job.json").write_text('{"by": "another file of that name"}')
    make_run(root / "sweep" / "0")
    said = {
        "squeue": [
            f"7|NODE_FAIL|None|{root}/lost",
            f"8|PENDING|Dependency|{root}/next",
            f"9|RUNNING|None|{root}/sweep",
            f"9|RUNNING|None|{root}/sweep",
            f"9|PENDING|Resources|{root}/sweep",
            "3|FAILED|NonZeroExitCode|/another/cluster",
        ],
        "sacct": [f"3|COMPLETED|None|{root}/old"],
    }
    programs.mkdir()
    for name, lines in said.items():
        program = programs / name
        program.write_text("#!/bin/sh\ncat <<END\n{}\nEND\n".format("\n".join(lines)))
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    assert main(["runs", "list", str(root), "--json"]) == 0
    rows = {Path(row["path"]).name: row for row in json.loads(capsys.readouterr().out)}
    assert {name: (row["status"], row["job"]) for name, row in rows.items()} == {
        "lost": ("died", "7 NODE_FAIL"),
        "next": ("sent", "8 PENDING (Dependency)"),
        "old": ("done", "3 COMPLETED"),
        "sweep": ("sent", "9 2 RUNNING, 1 PENDING (Resources)"),
        "0": ("done", ""),
    }
    assert main(["runs", "show", str(root / "next")]) == 0
    assert "8 PENDING (Dependency)" in capsys.readouterr().out
    assert main(["runs", "tail", str(root / "next")]) == 66
    # Without SLURM the runs are what they say themselves.
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["runs", "list", str(root), "--json"]) == 0
    rows = {Path(row["path"]).name: row for row in json.loads(capsys.readouterr().out)}
    assert (rows["old"]["job"], rows["next"]["status"]) == ("3", "sent")
