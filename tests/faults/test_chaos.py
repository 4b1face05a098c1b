"""The chaos command on a real run: every fault ends as it should, the run itself is untouched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launch import chaos_run
from launch.chaos import KINDS
from launch.chaos_run import Report, parse_fault
from launch.cli import main
from launch.local import child_environment, run_module
from launch.stages import REPO
from omni_train.config.errors import ConfigError
from tests.candidate_sets import content
from tests.faults.test_preemption import command
from tests.unit.launch.test_local import TOY
from tests.unit.launch.test_runs import make_run


@pytest.mark.slow
def test_every_fault_ends_as_it_should_and_the_run_is_only_read(
    corpus: Path, tmp_path: Path
) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "copies"
    environment = child_environment(ranks=2)
    trained = command(corpus, run_dir, "fit.max_steps=2")
    subprocess.run(trained, cwd=REPO, env=environment, check=True, capture_output=True)
    before = content(run_dir)
    done = subprocess.run(
        [*(sys.executable, "-m", "launch", "chaos", str(run_dir)), "--json", "--out", str(out)],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert [row["fault"].partition("@")[0] for row in found["faults"]] == list(KINDS)
    assert all(len(row["checks"]) >= 3 for row in found["faults"])
    assert content(run_dir) == before
    assert not out.exists()


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("kill", "one of kill-rank"),
        ("nan@0", "a number from 1 on"),
        ("nan@x", "a number from 1 on"),
        ("nan@", "a number from 1 on"),
        ("wandb-down@2", "it has no step"),
        ("torn-checkpoint@2", "two checkpoints"),
        ("disk-full@1", "a checkpoint before it"),
    ],
)
def test_a_fault_that_cannot_be_is_refused(word: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule) as found:
        parse_fault(word)
    assert found.value.key == "--fault"


def test_steps_are_what_was_asked_for() -> None:
    assert [parse_fault(word).name for word in ("nan@7", "nan", "wandb-down")] == [
        "nan@7",
        "nan@3",
        "wandb-down",
    ]


def test_no_copy_is_made_where_it_cannot_be_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chaos", str(tmp_path)]) == 66
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text("run: {dir: x}\n")
    assert main(["chaos", str(run)]) == 2
    assert "it is not a training run" in capsys.readouterr().err
    (run / "config.yaml").write_text("fit: {max_steps: 4}\ndata: {path: '***'}\n")
    assert main(["chaos", str(run)]) == 2
    assert "data.path" in capsys.readouterr().err
    (run / "config.yaml").write_text("fit: {max_steps: 4}\n")
    (tmp_path / "there").mkdir()
    for extra, text in (
        (["--out", str(tmp_path / "there")], "there already"),
        (["--ranks", "0"], "1"),
    ):
        assert main(["chaos", str(run), *extra]) == 2
        assert text in capsys.readouterr().err
    assert not (tmp_path / "run-chaos").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_asks_to_stop_ends_the_command_whatever_the_fault(
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A copy that stops as the fault would have it, but for a signal from outside."""
    (tmp_path / "toy_recipe.py").write_text(TOY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = make_run(tmp_path / "user")
    (run / "config.yaml").write_text("fit: {max_steps: 4}\n")
    copy, starts = tmp_path / "user-chaos" / "preempt@3", []

    def waits(_module: str, _settings: Sequence[str], **options: Any) -> int:
        starts.append(options["run_dir"].name)
        if starts == ["whole"]:
            return 0
        # The toy takes no overrides of Hydra's form.
        return run_module("toy_recipe", ["wait", str(copy)], **options)

    def interrupt() -> None:
        deadline = time.monotonic() + 120
        while not (copy / "ready-0").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(chaos_run, "run_module", waits)
    thread = threading.Thread(target=interrupt)
    thread.start()
    faults = ["--fault", "preempt@3", "--fault", "torn-checkpoint@3"]
    code = main(["chaos", str(run), "--ranks", "1", *faults])
    thread.join()
    assert (code, starts) == (75, ["whole", "preempt@3"])
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"omni-train: asked to stop by {number.name}; the copies are in {copy.parent}"


def test_one_thing_that_did_not_hold_is_a_fault_that_did_not_hold() -> None:
    report = Report("nan@3")
    report.check("a", 1, held=True)
    assert report.held
    report.check("b", 2, held=False)
    assert not report.held
