"""A run that is asked to stop: all ranks save after the same step, and go on bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.local import child_environment, measured_stop_s, stop_seconds
from launch.stages import REPO
from omni_train.engine.exit_codes import ExitCode, RunError
from omni_train.engine.run import RunConfig, start_run
from omni_train.tracking.events import JsonlWriter, read_jsonl, read_steps
from tests.recipes.launching import children_of, wait_for

STEPS = 24


def command(corpus: Path, run_dir: Path, *extra: str) -> list[str]:
    return [
        *(sys.executable, "-m", "launch", "train", "text_lm", "--ranks", "2"),
        "experiment=text_lm/debug",
        f"run.dir='{run_dir}'",
        f"model.tokenizer='{corpus}/tokenizer'",
        f"data.sources.text.path='{corpus}/train/text'",
        f"fit.max_steps={STEPS}",
        "fit.save_steps=100",
        *extra,
    ]


def launch(corpus: Path, run_dir: Path, *extra: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(corpus, run_dir, *extra),
        cwd=REPO,
        env=child_environment(ranks=2),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def steps_of(run_dir: Path) -> list[int]:
    return [event["step"] for event in read_steps(run_dir / "events.jsonl")]


def trace(run_dir: Path) -> list[tuple[Any, ...]]:
    steps = read_steps(run_dir / "events.jsonl")
    return [(e["step"], e["loss"], e["keys"], e["grad_norm"], e["lr"]) for e in steps]


def state_of(run_dir: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((run_dir / "state.json").read_text())
    return state


@pytest.mark.slow
def test_a_stop_at_one_rank_or_at_the_launcher_costs_nothing(corpus: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert launch(corpus, whole).wait(timeout=240) == 0
    # First at rank 1 alone, then at the launcher.
    for reached, sent in ((2, signal.SIGUSR1), (10, signal.SIGTERM)):
        process = launch(corpus, stopped)
        wait_for(lambda r=reached: len(steps_of(stopped)) >= r, process)
        (torchrun,) = children_of(process.pid)
        target = children_of(torchrun)[1] if sent is signal.SIGUSR1 else process.pid
        os.kill(target, sent)
        assert process.wait(timeout=60) == ExitCode.preempted
        state = state_of(stopped)
        assert (state["status"], state["exit_code"]) == ("preempted", 75)
        who = "SIGUSR1 at rank 1" if sent is signal.SIGUSR1 else "SIGTERM at rank 0"
        assert who in state["reason"]
        last = steps_of(stopped)[-1]
        assert state["step"] == last < STEPS
        assert (stopped / "checkpoints" / f"step-{last}" / "manifest.json").is_file()
    assert launch(corpus, stopped).wait(timeout=240) == 0
    assert state_of(stopped)["status"] == "done"
    assert trace(stopped) == trace(whole)
    ends = [
        [e for e in read_jsonl(d / "events.jsonl") if e["kind"] == "fit_end"]
        for d in (whole, stopped)
    ]
    assert ends[0][-1]["hashes"] == ends[1][-1]["hashes"]
    # No step was done twice.
    kinds = [e["kind"] for e in read_jsonl(stopped / "events.jsonl")]
    assert kinds.count("step") == STEPS
    assert kinds.count("run_resume") == 2


@dataclass(kw_only=True, slots=True)
class Nothing:
    """A recipe without settings."""


def stopped(folder: Path, error: Exception, *, deferred: bool) -> dict[str, Any]:
    """State of a run that gets a signal and then fails."""
    with (
        suppress(RunError),
        start_run(RunConfig(dir=str(folder)), stage="toy", settings=Nothing()) as run,
        run.stop.deferred() if deferred else nullcontext(),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
        raise error
    return state_of(folder)


def test_outside_of_training_a_stop_ends_the_run_at_once(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    state = stopped(tmp_path, AssertionError("the signal comes first"), deferred=False)
    assert (state["status"], state["exit_code"]) == ("preempted", 75)
    assert "asked to stop by SIGTERM; there was no step yet" in state["reason"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_peer_that_left_first_does_not_make_a_stop_a_failure(tmp_path: Path) -> None:
    state = stopped(tmp_path, RuntimeError("Connection closed by peer"), deferred=True)
    assert state["exit_code"] == 75
    assert "not saved: RuntimeError: Connection closed by peer" in state["reason"]


def test_errors_that_have_a_code_keep_it(tmp_path: Path) -> None:
    assert stopped(tmp_path, RunError(ExitCode.disk, "full"), deferred=True)["exit_code"] == 74


def test_time_to_stop_follows_from_what_saving_took(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measured_stop_s(tmp_path) is None
    assert stop_seconds(tmp_path, None) == 60
    writer = JsonlWriter(tmp_path / "events.jsonl")
    writer.write({"kind": "step", "step": 1, "seconds": {"forward": 2.0, "backward": 3.0}})
    writer.write({"kind": "save", "step": 1, "seconds": 40.5})
    writer.close()
    assert measured_stop_s(tmp_path) == 50.5
    assert stop_seconds(tmp_path, None) == 101
    assert capsys.readouterr().err == ""
    assert stop_seconds(tmp_path, 20) == 20
    said = capsys.readouterr().err
    assert "20 s" in said
    assert "50.5 s" in said
