from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launch import local

REPO = Path(__file__).parents[3]
TOY = """
import json, os, signal, sys, time
mode, run_dir = sys.argv[1], sys.argv[2]
rank = int(os.environ["RANK"])
print("hello from rank", rank, "of", os.environ["WORLD_SIZE"], flush=True)
def end(code):
    if rank == 0:
        with open(os.path.join(run_dir, "state.json"), "w") as file:
            json.dump({"status": "failed", "exit_code": code, "pid": os.getpid()}, file)
    sys.exit(code)
if mode == "environment" and rank == 0:
    print(json.dumps({k: os.environ.get(k) for k in sys.argv[3:]}), flush=True)
if mode == "nan":
    end(76)
if mode == "dies" and not os.path.exists(os.path.join(run_dir, "died")):
    open(os.path.join(run_dir, "died"), "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "plain" and rank == 1:
    sys.exit(65)
if mode == "wait":
    signal.signal(signal.SIGTERM, lambda *_: end(75))
    # As a run does once it can note the request.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    open(os.path.join(run_dir, f"ready-{rank}"), "w").close()
    time.sleep(60)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "toy_recipe.py").write_text(TOY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    return run_dir


def test_ranks_run_and_only_rank_0_is_shown(
    toy: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    names = ["OMP_NUM_THREADS", "DS_ACCELERATOR", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"]
    arguments = ["environment", str(toy), *names]
    assert local.run_module("toy_recipe", arguments, ranks=2, run_dir=toy) == 0
    shown = capfdbinary.readouterr().out.decode()
    assert "hello from rank 0 of 2" in shown
    assert "rank 1" not in shown
    assert "hello from rank 1 of 2" in (toy / "logs" / "rank-00001.out").read_text()
    if local.count_gpus() == 0:
        values = json.loads(shown.splitlines()[1])
        assert values == dict(zip(names, ["1", "cpu", "1", "false"], strict=True))


def test_a_follower_replaces_the_screen(
    toy: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    calls: list[float] = []
    code = local.run_module(
        "toy_recipe",
        ["plain", str(toy)],
        ranks=1,
        run_dir=toy,
        follow=lambda: calls.append(time.monotonic()),
    )
    assert code == 0
    assert len(calls) > 2
    assert capfdbinary.readouterr().out == b""


def test_the_state_decides_the_exit_code(toy: Path) -> None:
    assert local.run_module("toy_recipe", ["nan", str(toy)], ranks=1, run_dir=toy) == 76


def test_a_rank_s_own_code_counts_where_no_state_was_written(toy: Path) -> None:
    (toy / "state.json").write_text('{"exit_code": 74}')
    assert local.run_module("toy_recipe", ["plain", str(toy)], ranks=2, run_dir=toy) == 65


def test_ranks_that_died_are_started_again_and_errors_that_stay_are_not(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    starts: list[str] = []
    run_module = local.run_module

    def counted(_module: str, overrides: Sequence[str], **options: Any) -> int:
        starts.append(overrides[0])
        # The toy takes no overrides of Hydra's form.
        return run_module("toy_recipe", [overrides[0], str(toy)], **options)

    monkeypatch.setattr(local, "run_module", counted)
    assert local.run_recipe("toy", ["dies"], run_dir=toy, restarts=2) == 0
    assert local.run_recipe("toy", ["nan"], run_dir=toy, restarts=2) == 76
    assert starts == ["dies", "dies", "nan"]
    assert "starting again from the newest checkpoint; 1 more" in capfd.readouterr().err


def test_who_asks_to_stop_gets_no_new_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[str] = []

    def interrupted(module: str, _overrides: Sequence[str], *, asked: list[int], **_: Any) -> int:
        starts.append(module)
        asked.append(signal.SIGINT)
        return 70

    monkeypatch.setattr(local, "run_module", interrupted)
    assert local.run_recipe("toy", run_dir=tmp_path, restarts=2) == 70
    assert starts == ["recipes.toy"]


@pytest.mark.parametrize(
    ("state", "before", "output", "code"),
    [
        ('{"exit_code": 75}', "", b"", 75),
        ('{"exit_code": 75}', '{"exit_code": 75}', b"", 70),
        ('{"exit_code": null}', "", b"  exitcode  : 2 (pid: 1)", 2),
        ("", "", b"  exitcode  : -9 (pid: 1)", 70),
        ("", "", b"", 70),
        # The rank that ended first comes last. One was killed; the other thought it was preempted.
        ('{"exit_code": 75}', "", b"  exitcode  : 75 (pid: 2)\n  exitcode  : -9 (pid: 1)", 70),
        ('{"exit_code": 75}', "", b"  exitcode  : -9 (pid: 2)\n  exitcode  : 75 (pid: 1)", 75),
        ('{"exit_code": 75}', "", b"  exitcode  : 75 (pid: 2)\n  exitcode  : -15 (pid: 1)", 75),
    ],
)
def test_code_of_a_failed_run(state: str, before: str, output: bytes, code: int) -> None:
    assert local._code_of(state, before, output) == code


def test_a_killed_rank_is_no_preemption_in_the_state_either(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    preempted = {"status": "preempted", "exit_code": 75, "reason": "asked to stop"}
    state.write_text(json.dumps(preempted))
    local._correct(tmp_path)
    found = json.loads(state.read_text())
    assert (found["status"], found["exit_code"]) == ("failed", 70)
    assert found["reason"].startswith("a rank was killed")
    assert list(tmp_path.iterdir()) == [state]


def test_a_signal_reaches_the_ranks(toy: Path) -> None:
    script = (
        "import sys, pathlib\nfrom launch import local\n"
        f"run = pathlib.Path({str(toy)!r})\n"
        "sys.exit(local.run_module('toy_recipe', ['wait', str(run)], ranks=1, run_dir=run))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{REPO}{os.pathsep}{toy.parent}"}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=REPO, env=environment)
    deadline = time.monotonic() + 40
    while not (toy / "ready-0").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=40) == 75


def test_new_output_is_copied_once(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    path = tmp_path / "rank-00000.out"
    path.write_bytes(b"of the run before\n")
    show = local._Screen(path)
    show()
    for text in (b"one\n", b"two\rthree"):
        with path.open("ab") as file:
            file.write(text)
        show()
    show()
    assert capfdbinary.readouterr().out == b"one\ntwo\rthree"
