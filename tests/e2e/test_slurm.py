"""Stages on a real SLURM of two nodes: two ZeRO-3 ranks, preemption and requeue, chains."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.cluster import ClusterConfig
from launch.local import child_environment
from launch.slurm import StageJob, submit
from launch.stages import REPO
from omni_train.tracking.events import read_jsonl, read_steps
from tests.recipes.launching import RUN_LIMIT_S
from tests.slurm import Slurm, two_nodes

STEPS = 8
CANARY = "canary-1618033988"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with two_nodes(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


def launch(slurm: Slurm, *words: str) -> dict[str, str]:
    """Submit; return the number of each job."""
    environment = {**child_environment(), **slurm.environment, "WANDB_API_KEY": CANARY}
    done = subprocess.run(
        [sys.executable, "-m", "launch", "launch", *words, "--submit"],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=RUN_LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    return {
        line.partition(":")[0]: line.partition("job ")[2].split(",")[0].split(";")[0]
        for line in done.stdout.splitlines()
    }


def text_lm(corpus: Path, run_dir: Path, *extra: str) -> list[str]:
    return [
        *("text_lm", "target=slurm", "cluster=cpu", "cluster.nodes=2", "cluster.time=00:30:00"),
        *(
            "cluster.secrets=[WANDB_API_KEY]",
            "experiment=text_lm/debug",
            f"run.dir={json.dumps(str(run_dir))}",
        ),
        f"model.tokenizer='{corpus}/tokenizer'",
        f"data.sources.text.path='{corpus}/train/text'",
        f"fit.max_steps={STEPS}",
        "fit.save_steps=100",
        *extra,
    ]


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    return read_steps(run_dir / "events.jsonl")


def wait_for_step(slurm: Slurm, run_dir: Path, job: str, number: int) -> None:
    while len(steps_of(run_dir)) < number:
        assert slurm.state(job) in {"PENDING", "CONFIGURING", "RUNNING"}, output_of(run_dir)
        time.sleep(0.1)


def output_of(run_dir: Path) -> str:
    """Everything that a job and its ranks printed, for a message."""
    files = [*run_dir.glob("slurm-*.out"), *(run_dir / "logs").glob("*.out")]
    return "\n".join(f"{path.name}: {path.read_text(errors='replace')[-2500:]}" for path in files)


def test_two_nodes_are_preempted_requeued_and_end_done(
    slurm: Slurm, corpus: Path, tmp_path: Path
) -> None:
    # A name that a shell would take apart.
    run_dir = tmp_path / "it's $(touch hacked) & `b`"
    (job,) = launch(slurm, *text_lm(corpus, run_dir, "fit.max_steps=200")).values()
    wait_for_step(slurm, run_dir, job, 2)
    slurm.ask("scancel", "--signal=USR1", job)
    slurm.wait(job, "PENDING", "REQUEUED")
    state = json.loads((run_dir / "state.json").read_text())
    assert (state["status"], state["exit_code"]) == ("preempted", 75), state
    assert "asked to stop by SIGUSR1" in state["reason"]
    last = steps_of(run_dir)[-1]["step"]
    assert (run_dir / "checkpoints" / f"step-{last}" / "manifest.json").is_file()
    wait_for_step(slurm, run_dir, job, last + 2)
    slurm.ask("scancel", job)
    assert slurm.wait(job, "CANCELLED", "PENDING") == "CANCELLED"
    events = list(read_jsonl(run_dir / "events.jsonl"))
    assert [e["step"] for e in events if e["kind"] == "resume"] == [last]
    assert {e["ranks"] for e in events if "ranks" in e} == {2}
    # Each step once, across both attempts.
    steps = [e["step"] for e in events if e["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1))
    assert not list(tmp_path.glob("**/hacked"))
    written = b"".join(p.read_bytes() for p in run_dir.rglob("*") if p.is_file())
    assert CANARY.encode() not in written
    nodes = (run_dir / "job.sbatch").read_text()
    assert "#SBATCH --export=HOME,USER,LANG,PATH,WANDB_API_KEY" in nodes


@pytest.mark.slow
def test_a_preempted_job_has_the_losses_of_an_uninterrupted_run(
    slurm: Slurm, corpus: Path, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    (job,) = launch(slurm, *text_lm(corpus, stopped)).values()
    wait_for_step(slurm, stopped, job, 2)
    slurm.ask("scancel", "--signal=USR1", job)
    slurm.wait(job, "PENDING", "REQUEUED")
    (other,) = launch(slurm, *text_lm(corpus, whole)).values()
    for number, run_dir in ((job, stopped), (other, whole)):
        state = slurm.wait(number, "COMPLETED", "FAILED", "CANCELLED", limit_s=500)
        assert state == "COMPLETED", output_of(run_dir)
        assert [e["step"] for e in steps_of(run_dir)] == list(range(1, STEPS + 1))
    resumed = [e["step"] for e in read_jsonl(stopped / "events.jsonl") if e["kind"] == "resume"]
    assert len(resumed) == 1
    for key in ("loss", "keys", "grad_norm", "lr"):
        assert [e[key] for e in steps_of(stopped)] == [e[key] for e in steps_of(whole)], key
    # A job that is done does not start again.
    (again,) = launch(slurm, *text_lm(corpus, whole)).values()
    assert slurm.wait(again, "COMPLETED", "FAILED") == "COMPLETED"
    assert "already done" in (whole / f"slurm-{again}.out").read_text()


def chain_of_five(corpus: Path, root: Path) -> list[StageJob]:
    """Three stages that end well, one that starts from nothing, and one that waits for it."""
    tokenizer = f"model.tokenizer='{corpus}/tokenizer'"
    short = [tokenizer, "fit.max_steps=2", "tracking.wandb=false"]
    audio = ["experiment=stage1_audio/debug", f"data.sources.asr.path='{corpus}/train/asr'"]

    def job(name: str, recipe: str, words: list[str], *after: str) -> StageJob:
        return StageJob(name, recipe, [*words, *short], root / name, after)

    text = ["experiment=text_lm/debug", f"data.sources.text.path='{corpus}/train/text'"]
    adapter = [*audio, "phase=adapter", f"model.init_from='{root}/one'"]
    encoder = [*audio, "phase=encoder", f"model.init_from='{root}/two'"]
    missing = [*audio, "phase=encoder", f"model.init_from='{root}/nothing'"]
    return [
        job("one", "text_lm", text),
        job("two", "stage1_audio", adapter, "one"),
        job("three", "stage1_audio", encoder, "two"),
        job("broken", "stage1_audio", missing, "three"),
        job("never", "stage1_audio", encoder, "broken"),
    ]


@pytest.mark.slow
def test_a_chain_runs_by_dependencies_and_stops_where_a_stage_fails(
    slurm: Slurm,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for key, value in {**child_environment(), **slurm.environment}.items():
        monkeypatch.setenv(key, value)

    def listed() -> dict[str, dict[str, Any]]:
        capsys.readouterr()
        assert main(["runs", "list", str(tmp_path), "--json"]) == 0
        return {Path(row["path"]).name: row for row in json.loads(capsys.readouterr().out)}

    size = ClusterConfig(nodes=1, gpus_per_node=0, lead_s=60)
    numbers = submit(chain_of_five(corpus, tmp_path), size)
    assert slurm.state(numbers["three"]) == "PENDING"
    waiting = listed()["three"]
    assert (waiting["status"], waiting["step"]) == ("sent", 0)
    assert waiting["job"] == f"{numbers['three']} PENDING (Dependency)"
    ends = {
        name: slurm.wait(number, "COMPLETED", "FAILED", "CANCELLED", limit_s=500)
        for name, number in numbers.items()
    }
    assert ends == {
        **dict.fromkeys(("one", "two", "three"), "COMPLETED"),
        "broken": "FAILED",
        "never": "CANCELLED",
    }, output_of(tmp_path / "broken")
    starts = [
        next(e["time"] for e in read_jsonl(tmp_path / name / "events.jsonl"))
        for name in ("one", "two", "three")
    ]
    assert starts == sorted(starts)
    state = json.loads((tmp_path / "broken" / "state.json").read_text())
    assert state["status"] == "failed"
    assert "nothing" in state["reason"]
    assert not (tmp_path / "never" / "events.jsonl").exists()
    rows = listed()
    assert list(rows) == sorted(numbers)
    assert rows["three"]["job"] == f"{numbers['three']} COMPLETED"
    assert rows["broken"]["reason"] == state["reason"]
    assert f"{numbers['broken']} FAILED" in rows["broken"]["job"]
    assert (rows["never"]["status"], rows["never"]["reason"]) == ("sent", "")
    assert f"{numbers['never']} CANCELLED" in rows["never"]["job"]
    assert main(["runs", "list", str(tmp_path)]) == 0
    assert state["reason"] in capsys.readouterr().out
