"""Two ZeRO-3 ranks of which one hangs, falls silent or lags: named, stacks of both, code 79."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.local import run_module
from omni_train.config.errors import ConfigError
from omni_train.engine.exit_codes import ExitCode
from omni_train.engine.watchdog import Beat, WatchConfig, hung_ranks
from omni_train.tracking.events import read_jsonl, read_steps
from tests.faults.watch_worker import FIRST_S, STEP_S, STEPS
from tests.wandb_files import read_wandb

# A port of this machine where nobody listens.
CLOSED = "http://127.0.0.1:9"


def launch(run_dir: Path, *faults: str) -> int:
    return run_module(
        "tests.faults.watch_worker",
        [str(run_dir), *faults],
        ranks=2,
        run_dir=run_dir,
        follow=lambda: None,
        stop_s=10,
    )


def hang_of(run_dir: Path) -> dict[str, Any]:
    (event,) = [e for e in read_jsonl(run_dir / "events.jsonl") if e["kind"] == "hang"]
    return event


def check_end(run_dir: Path, *, rank: int, phase: str, step: int) -> dict[str, Any]:
    state = json.loads((run_dir / "state.json").read_text())
    assert (state["status"], state["exit_code"]) == ("failed", 79)
    event = hang_of(run_dir)
    assert event["ranks"] == [rank]
    place = event["places"][rank]
    assert (place["phase"], place["step"]) == (phase, step)
    assert f"rank {rank} hangs in {phase} of step {step}" in state["reason"]
    for number in (0, 1):
        stacks = (run_dir / "stacks" / f"rank-{number:05d}.txt").read_text()
        assert "watch_worker.py" in stacks
    return event


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch: a run with a slow rank, one whose W&B is not there, one with a hung rank."""
    run_dir = tmp_path_factory.mktemp("watch") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_BASE_URL", CLOSED)
        patch.setenv("WANDB_API_KEY", "0" * 40)
        assert launch(run_dir, "slow", "tracked", "hang") == ExitCode.hang
    return run_dir


def test_a_hung_rank_is_named_in_time_and_all_stacks_are_kept(both: Path) -> None:
    event = check_end(both, rank=1, phase="forward", step=3)
    place = event["places"][1]
    assert STEP_S < place["seconds"] < STEP_S + 15
    assert "threading.py" in place["at"]
    # Rank 0 is in the same phase; it waits for a collective that rank 1 has not reached.
    assert event["places"][0]["phase"] == "forward"
    assert event["places"][0]["begun"] > place["begun"]
    assert "faults.py" in (both / "stacks" / "rank-00001.txt").read_text()
    assert [step["step"] for step in read_steps(both / "events.jsonl")] == [1, 2]


def test_a_slow_rank_is_named_though_all_ranks_take_as_long(both: Path) -> None:
    run_dir = both.with_name("run-slow")
    events = list(read_jsonl(run_dir / "events.jsonl"))
    (event,) = [e for e in events if e["kind"] == "straggler"]
    assert (event["rank"], event["part"]) == (1, "forward")
    assert event["seconds"] > 0.5
    steps = read_steps(run_dir / "events.jsonl")
    assert len(steps) == STEPS
    for step in steps[2:]:
        found = step["rank_seconds"]
        assert found["min"] <= found["median"] <= found["max"]
        assert found["max"] > 0.5
    # A busy machine may hold up the other rank for once.
    slowest = [step["rank_seconds"]["slowest"] for step in steps[2:]]
    assert slowest.count(1) > len(slowest) / 2
    assert not (run_dir / "stacks" / "rank-00000.txt").exists()


def test_without_its_server_wandb_delays_no_step_and_loses_none(
    both: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = both.with_name("run-tracked")
    firsts = [
        read_steps(folder / "events.jsonl")[0]["elapsed_s"]
        for folder in (run_dir, both.with_name("run-slow"))
    ]
    # A server that is waited for costs 20 s and more; so much a busy machine does not.
    assert firsts[0] < 2 * firsts[1] + 2
    steps = {step["step"]: step["loss"] for step in read_steps(run_dir / "events.jsonl")}
    assert len(steps) == STEPS
    # Nobody is there to send it to: it says so, and what is sent later is whole again.
    monkeypatch.setenv("WANDB_BASE_URL", CLOSED)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    for _ in range(2):
        shown = read_wandb(run_dir / "wandb").history
        assert {number: row["loss"] for number, row in shown.items() if "loss" in row} == steps
        assert main(["track", "sync", str(run_dir), "--offline"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "rank", "phase", "step"),
    [("hang_at_once", 1, "forward", 1), ("hang_0", 0, "data", 3)],
)
def test_before_the_first_step_and_at_rank_0(
    tmp_path: Path, fault: str, rank: int, phase: str, step: int
) -> None:
    assert launch(tmp_path / "run", fault) == ExitCode.hang
    event = check_end(tmp_path / "run", rank=rank, phase=phase, step=step)
    assert event["places"][rank]["seconds"] < STEP_S + 15


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "rank"), [("lock", 1), ("lock_0", 0), ("stopped", 1)])
def test_a_rank_whose_threads_stand_still_is_named_by_the_others(
    tmp_path: Path, fault: str, rank: int
) -> None:
    run_dir = tmp_path / "run"
    assert launch(run_dir, fault) == ExitCode.hang
    assert hang_of(run_dir)["ranks"] == [rank]
    state = json.loads((run_dir / "state.json").read_text())
    assert (state["status"], state["exit_code"]) == ("failed", 79)
    assert f"rank {rank} does not answer any more" in state["reason"]
    last = read_steps(run_dir / "events.jsonl")[-1]
    # The last reports may be of the time before the first step, whose limit is the longer one.
    assert hang_of(run_dir)["time"] - last["time"] < FIRST_S + 15
    others = (run_dir / "stacks" / f"rank-{1 - rank:05d}.txt").read_text()
    assert "watch_worker.py" in others
    if fault != "stopped":  # of a stopped process nobody can take the stacks
        stacks = (run_dir / "stacks" / f"rank-{rank:05d}.txt").read_text()
        assert "holds_the_lock" in stacks


def beat(entered: int, begun: int, seconds: float, limit: float = 10.0) -> Beat:
    return Beat(entered, begun, 1, "forward", seconds, limit, "", leaving=False)


def test_who_is_behind_hangs_and_who_waits_does_not() -> None:
    late = beat(5, 7, 11)
    assert hung_ranks([late, beat(6, 9, 10.5), beat(6, 9, 10.5)]) == [0]
    assert hung_ranks([beat(6, 9, 10.5), late]) == [1]
    assert hung_ranks([beat(5, 8, 11), late]) == [1]
    # Nobody is ahead of anybody: a collective that never ends.
    assert hung_ranks([late, late]) == [0, 1]
    # Rank 1 is slow, but goes on from phase to phase.
    assert hung_ranks([beat(6, 9, 99), beat(5, 7, 1)]) == []


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"step_s": 0.0}, "step_s"),
        ({"first_s": 10.0, "step_s": 20.0}, "first_s"),
        ({"first_s": 1800.0}, "first_s"),
        ({"slow_ratio": 0.5}, "slow_ratio"),
    ],
)
def test_limits_that_cannot_work_are_refused(settings: dict[str, float], key: str) -> None:
    with pytest.raises(ConfigError) as found:
        WatchConfig(**settings)
    assert found.value.key == f"fit.watch.{key}"
