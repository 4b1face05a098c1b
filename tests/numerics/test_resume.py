"""The engine on real DeepSpeed: exact resume, damaged checkpoints, non-finite steps, equivalences.

Two launches serve all tests: one of two ranks under torchrun, one of a single process without it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("engine_worker.py")
PROJECT = WORKER.parents[2]
NAMES = [f"{stage}-{precision}" for stage in (1, 2, 3) for precision in ("bf16", "fp32")]
Results = dict[str, dict[str, Any]]


def _launch(command: list[str], out: Path, scenarios: list[str]) -> Results:
    free = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
    environment = {**free, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    environment["PYTHONPATH"] = str(PROJECT)
    done = subprocess.run(
        [sys.executable, *command, str(WORKER), str(out), *scenarios],
        env=environment,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    results = [json.loads((out / f"{name}.json").read_text()) for name in scenarios]
    return {key: value for result in results for key, value in result.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("engine")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master-port={port}"]
    two = _launch(torchrun, out, ["resume", "equal", "damage", "numbers"])
    return {**two, **_launch([], out, ["moved", "alone"])}


@pytest.mark.parametrize("name", NAMES)
def test_run_ten_equals_run_five_and_resume_five(runs: Results, name: str) -> None:
    straight, first, resumed = (runs[f"{name}-{kind}"] for kind in ("straight", "first", "resumed"))
    assert first["ended"] == "StopHereError: stopped at 5"
    assert (first["state"]["status"], first["state"]["exit_code"]) == ("failed", 70)
    assert resumed["state"]["status"] == "done"
    assert [event["kind"] for event in resumed["events"]] == ["resume"]
    assert resumed["steps"] == straight["steps"] == list(range(1, 11))
    # Bit for bit: losses (with dropout), norms, samples, and the weights at the end.
    for key in ("losses", "norms", "keys", "lr", "metrics"):
        assert resumed[key] == straight[key], key
    assert resumed["hashes"][-1] == straight["hashes"][-1]
    assert len(set(straight["losses"])) == 10


@pytest.mark.parametrize("name", NAMES)
def test_a_stop_at_one_rank_saves_all_at_one_step_and_costs_nothing(
    runs: Results, name: str
) -> None:
    straight, asked, went_on = (runs[f"{name}-{kind}"] for kind in ("straight", "asked", "went-on"))
    said = "asked to stop by SIGUSR1 at rank 1; saved step 7; the same command goes on from there"
    assert asked["ended"] == f"RunError: {said}"
    assert (asked["state"]["status"], asked["state"]["exit_code"]) == ("preempted", 75)
    assert (asked["state"]["step"], asked["steps"][-1]) == (7, 7)
    assert [event["step"] for event in went_on["events"]] == [7]
    for key in ("losses", "norms", "keys", "lr", "metrics"):
        assert went_on[key] == straight[key], key
    assert went_on["hashes"][-1] == straight["hashes"][-1]


@pytest.mark.parametrize("name", NAMES)
def test_only_trained_groups_change(runs: Results, name: str) -> None:
    before, *_, after = runs[f"{name}-straight"]["hashes"]
    assert {group for group in before if before[group] == after[group]} == {"fixed"}


def test_stages_and_accumulation_give_the_same_losses(runs: Results) -> None:
    expected = pytest.approx(runs["stage-3"]["losses"], rel=1e-6)
    for name in ("stage-1", "stage-2", "accumulated-1", "accumulated-2", "accumulated-3"):
        assert runs[name]["losses"] == expected, name
        assert runs[name]["keys"] == runs["stage-3"]["keys"]
        assert runs[name]["metrics"][-1]["toy/error"] == pytest.approx(runs[name]["losses"][-1])
    assert runs["accumulated-bf16"]["losses"] == pytest.approx(
        runs["whole-bf16"]["losses"], rel=2e-2
    )


def test_loss_gradient_and_update_equal_a_plain_torch_loop(runs: Results) -> None:
    assert runs["engine"]["losses"] == pytest.approx(runs["plain"]["losses"], rel=1e-5)
    norms = [norm["total"] for norm in runs["engine"]["norms"]]
    assert norms == pytest.approx(runs["plain"]["norms"], rel=1e-5)
    assert runs["stage-3"]["losses"] == pytest.approx(runs["plain"]["losses"], rel=1e-5)


def test_two_ranks_resume_on_one(runs: Results) -> None:
    moved, straight = runs["moved"], runs["stage-3"]
    assert moved["losses"] == pytest.approx(straight["losses"], rel=1e-5)
    assert moved["keys"] == straight["keys"]
    assert moved["shapes"]["body.weight"] == [7, 5]
    assert moved["fixed_equal"]
    # The first hash is of fresh weights; a restore that did nothing would leave it.
    assert moved["hashes"][0]["body"] == moved["fresh"]["body"] != moved["hashes"][1]["body"]


@pytest.mark.parametrize(
    ("kind", "file", "reason"),
    [
        ("flip", "rank-00001.safetensors", "xxh3"),
        ("truncate", "rank-00000.safetensors", "size"),
        ("missing", "rank-00001.safetensors", "missing"),
        ("rng", "rank-00001.json", "xxh3"),
        ("manifest", "manifest.json", "unreadable"),
        ("no-manifest", "manifest.json", "unreadable"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    runs: Results, kind: str, file: str, reason: str
) -> None:
    run = runs[kind]
    bad, resumed = run["events"]
    assert (bad["kind"], bad["checkpoint"], bad["file"]) == ("checkpoint_bad", "step-4", file)
    assert bad["reason"] == reason
    assert (resumed["kind"], resumed["step"]) == ("resume", 2)
    assert [name.rpartition("-")[0] for name in run["quarantine"]] == ["step-4"]
    assert run["losses"] == runs["straight"]["losses"]


def test_damaged_frozen_weights_are_rewritten_from_the_model(runs: Results) -> None:
    bad, resumed = runs["frozen"]["events"]
    assert (bad["file"], bad["reason"]) == ("rank-00000.safetensors", "xxh3")
    assert resumed["step"] == 4
    assert runs["frozen"]["quarantine"][0].startswith("frozen-")
    assert runs["frozen"]["losses"] == runs["straight"]["losses"]


def test_pointer_and_leftovers_do_not_matter(runs: Results) -> None:
    assert [event["step"] for event in runs["pointer"]["events"]] == [4]
    kinds = [event["kind"] for event in runs["leftover"]["events"]]
    assert kinds == ["checkpoint_leftover", "resume"]
    assert runs["leftover"]["quarantine"][0].startswith("step-6.tmp-12345678")
    for kind in ("pointer", "leftover"):
        assert runs[kind]["losses"] == runs["straight"]["losses"]


def test_without_a_good_checkpoint_the_run_ends(runs: Results) -> None:
    assert "no complete checkpoint among step-4, step-2" in runs["all"]["ended"]
    assert (runs["all"]["state"]["status"], runs["all"]["state"]["exit_code"]) == ("failed", 65)


@pytest.mark.parametrize("name", NAMES)
def test_nan_on_one_rank_is_skipped_by_all(runs: Results, name: str) -> None:
    run, empty = runs[f"nan-{name}"], runs[f"empty-{name}"]
    (event,) = run["events"]
    assert (event["step"], event["rank"], event["what"]) == (3, 1, "loss")
    assert event["keys"] == [["s20", "s21", "s22", "s23"]]
    assert run["applied"] == [True, True, False, True, True]
    assert run["losses"][2] == "nan"
    assert run["hashes"][3] == run["hashes"][2] != run["hashes"][4]
    # Nothing of the discarded gradients is left: a step without supervision ends alike.
    assert run["losses"][3:] == empty["losses"][3:]
    assert run["norms"][3:] == empty["norms"][3:]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_without_supervision_is_neither_nan_nor_an_update(runs: Results, name: str) -> None:
    run = runs[f"empty-{name}"]
    assert run["losses"][2] == 0.0
    assert run["norms"][2]["total"] == 0.0
    assert run["applied"] == [True, True, False, True, True]
    assert run["hashes"][3] == run["hashes"][2]
    assert all(isinstance(loss, float) for loss in run["losses"])


def test_too_many_skipped_steps_end_the_run(runs: Results) -> None:
    run = runs["stopped"]
    assert run["ended"].startswith("RunError: 1 non-finite steps in a row")
    assert (run["state"]["status"], run["state"]["exit_code"]) == ("failed", 76)
    assert run["steps"] == [1, 2, 3]


def test_unusable_samples_of_all_ranks_reach_the_ledger(runs: Results) -> None:
    rows = [(row["step"], row["key"], row["reason"]) for row in runs["stage-3"]["ledger"]]
    assert rows == [(2, "s8", "truncated"), (2, "s12", "truncated")]
