"""The whole chain as a user starts it: `demo --quick`, then all that follows it, on two ranks."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import soundfile

from launch.demo import PREFERENCES, STAGES, TALKER, THINKER, Stage
from launch.demo_report import failures
from launch.demo_work import Work
from launch.local import child_environment
from launch.stages import REPO
from omni_train.tracking.events import read_jsonl
from tests.recipes.launching import children_of, kill
from tests.wandb_files import origins, read_wandb

CANARY = "canary-2236067977"
FOLLOWS = ("--thinker", "--preferences")


def trained(steps: tuple[Stage | Work, ...]) -> list[Stage]:
    return [step for step in steps if isinstance(step, Stage) and step.quick_steps]


def demo(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", "demo", "--quick", "--name", name, *flags]
    environment = {**child_environment(), "WANDB_API_KEY": CANARY}
    return subprocess.run(
        command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def done() -> Iterator[tuple[Path, str, str]]:
    """Directory, name and output of a finished quick demo."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    result = demo(name)
    try:
        assert result.returncode == 0, result.stdout + result.stderr
        yield REPO / "runs" / name, name, result.stdout
    finally:
        shutil.rmtree(REPO / "runs" / name, ignore_errors=True)


@pytest.fixture(scope="module")
def whole(done: tuple[Path, str, str]) -> Path:
    """Directory of the same demo after all that follows it."""
    root, name, _ = done
    again = demo(name, *FOLLOWS)
    assert again.returncode == 0, again.stdout + again.stderr
    return root


def check_stages(found: list[dict[str, Any]], training: list[Stage]) -> None:
    assert [stage["name"] for stage in found] == [stage.name for stage in training]
    for stage, planned in zip(found, training, strict=True):
        assert stage["steps"] == planned.quick_steps
        assert stage["frozen_unchanged"], stage
        assert stage["trained_changed"], stage
        assert stage["seconds"] > 0


def check_wandb(root: Path, last: str) -> None:
    """The offline runs, read back: from the data to `last` nothing is missing, and no secret."""
    runs = {path.parent.name: read_wandb(path) for path in sorted(root.glob("*/wandb"))}
    assert set(runs) == {path.parent.name for path in root.glob("*/events.jsonl")}
    assert len({run.id for run in runs.values()}) == len(runs)
    assert {run.group for run in runs.values()} == {root.name}
    reached = origins(runs, last)
    assert any(address.startswith("omni-train://dataset/") for address in reached.used)
    # Whatever is no data set was made by another run.
    assert [a for a in reached.used - reached.made if "//dataset/" not in a] == []
    holders = [p for p in root.rglob("*") if p.is_file() and CANARY.encode() in p.read_bytes()]
    assert holders == []


def check_sound(root: Path, stage: str, table: str) -> None:
    """The media of a table are the run's own files, byte for byte."""
    run = read_wandb(root / stage / "wandb")
    columns, rows = run.tables[table]
    heard = [run.media[row[columns.index("audio")]].read_bytes() for row in rows]
    assert heard
    kept = {path.read_bytes() for path in (root / stage).rglob("*.wav")}
    assert set(heard) <= kept


def test_wandb_has_the_whole_chain_and_its_samples(done: tuple[Path, str, str]) -> None:
    root = done[0]
    check_wandb(root, "evaluate_audio_encoder")
    check_wandb(root, "evaluate_vision_encoder")
    check_sound(root, "evaluate_audio_encoder", "samples/asr")
    run = read_wandb(root / "stage1_audio_encoder" / "wandb")
    row = run.history[max(run.history)]
    assert {"loss", "metrics/loss_source/asr", "system/cpu_cores", "system/peak_rss_mib"} <= set(
        row
    )
    columns, rows = read_wandb(root / "evaluate_vision_encoder" / "wandb").tables["samples/caption"]
    assert {"image", "prompt", "reference", "prediction", "score"} <= set(columns)
    assert len(rows) == 8


def test_summary_has_what_was_promised(done: tuple[Path, str, str]) -> None:
    root, _, output = done
    summary = json.loads((root / "summary.json").read_text())
    assert (summary["ranks"], summary["zero_stage"]) == (2, 3)
    check_stages(summary["stages"], trained(STAGES))
    assert {"torch", "deepspeed", "transformers"} <= set(summary["versions"])
    metrics = summary["metrics"]
    assert {"asr_wer_before_encoder", "asr_wer_stage1", "caption_accuracy"} <= set(metrics)
    assert all(wer <= 0.05 for wer in metrics["raw_speech_wer"].values())
    assert "all promises held" in output


@pytest.mark.slow
def test_wandb_reaches_from_the_data_to_the_last_stage(whole: Path) -> None:
    check_wandb(whole, "evaluate_talker_speaker")
    runs = {path.parent.name: read_wandb(path) for path in whole.glob("*/wandb")}
    kinds = {a.split("/")[2] for a in origins(runs, "evaluate_talker_speaker").used}
    assert kinds == {"dataset", "checkpoint", "codec", "candidates"}
    for stage in ("evaluate_talker_icl", "evaluate_talker_speaker"):
        for title in runs[stage].tables:
            check_sound(whole, stage, title)
    assert any(title.startswith("speech/") for title in runs["evaluate_talker_icl"].tables)


@pytest.mark.slow
def test_the_talker_goes_on_from_a_finished_demo(whole: Path) -> None:
    root = whole
    # What was trained is not trained again.
    for stage in trained(STAGES):
        events = list(read_jsonl(root / stage.name / "events.jsonl"))
        assert sum(e["kind"] == "step" for e in events) == stage.quick_steps
        assert sum(e["kind"] == "run_resume" for e in events) == 1
    summary = json.loads((root / "summary.json").read_text())
    check_stages(summary["stages"], trained(STAGES + THINKER + TALKER + PREFERENCES))
    metrics = summary["metrics"]
    assert {"asr_wer_stage3", "picture_accuracy", "av_accuracy"} <= set(metrics)
    asked = {"dialogue_accuracy", "voice_question_accuracy", "text_question_accuracy"}
    assert asked <= set(metrics)
    assert set(metrics["codec_wer"]) == set(metrics["raw_speech_wer"])
    spoken = metrics["talker_wer_icl"]
    assert spoken["low"] <= spoken["mean"] <= spoken["high"]
    # Two seeds.
    assert spoken["n"] == 16
    assert {"talker_wer_dpo", "talker_wer_sft_control", "talker_wer_speaker"} <= set(metrics)
    assert metrics["pairs"]["pairs"] >= 8
    assert 0 <= metrics["speaker_nearest_share"] <= 1
    assert (root / "pairs" / "listen.html").is_file()
    lines = (root / "audio" / "texts.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    assert {entry["wave"] for entry in kept} == {p.name for p in (root / "audio").glob("*.wav")}
    assert len(kept) <= 5
    for entry in kept:
        assert soundfile.info(root / "audio" / entry["wave"]).samplerate == 16_000
        assert 1 <= len(entry["text"].split()) <= 3
    page = (root / "report.html").read_text()
    assert "Preference pairs" in page
    # The same texts before and after DPO, beside one another.
    head = page.partition("spoken by each</h2>")[2].partition("</tr>")[0]
    assert {"evaluate_talker_icl", "evaluate_talker_dpo"} <= set(re.findall("<th>([^<]+)", head))


def progress(root: Path) -> int:
    """How far a demo has come: everything that any of its stages has logged, and its files."""
    lines = sum(path.read_bytes().count(b"\n") for path in root.glob("*/events.jsonl"))
    return lines + sum(1 for folder in ("corpus", "codes") for _ in (root / folder).rglob("*"))


def run_until(name: str, moment: int) -> None:
    """Run a demo and kill all its processes once it has come so far."""
    command = [sys.executable, "-m", "launch", "demo", "--quick", "--name", name, *FOLLOWS]
    process = subprocess.Popen(
        command, cwd=REPO, env=child_environment(), stdout=subprocess.DEVNULL
    )
    while process.poll() is None and progress(REPO / "runs" / name) < moment:
        time.sleep(0.05)
    doomed = [process.pid] if process.poll() is None else []
    # A parent goes before its children, so that it starts no other in their place.
    while doomed:
        pid = doomed.pop(0)
        doomed += children_of(pid)
        with suppress(ProcessLookupError):
            kill(pid)
    process.wait()


def metrics_of(root: Path) -> Any:
    return json.loads((root / "summary.json").read_text())["metrics"]


@pytest.mark.slow
def test_killed_at_three_random_moments_it_ends_with_the_same_figures(whole: Path) -> None:
    name, seed = f"test-{uuid.uuid4().hex[:8]}", random.randrange(10**6)
    moments = sorted(random.Random(seed).sample(range(1, progress(whole)), 3))
    print(f"seed {seed}: killed at {moments} of {progress(whole)}")
    try:
        for moment in moments:
            run_until(name, moment)
        last = demo(name, *FOLLOWS)
        assert last.returncode == 0, last.stdout + last.stderr
        assert metrics_of(REPO / "runs" / name) == metrics_of(whole)
    finally:
        shutil.rmtree(REPO / "runs" / name, ignore_errors=True)


def summary_with(**changes: Any) -> dict[str, Any]:
    stage = {"name": "s", "frozen_unchanged": True, "trained_changed": True}
    metrics: dict[str, Any] = {
        "asr_wer_before_encoder": 0.9,
        "asr_wer_stage1": 0.1,
        "caption_accuracy": 0.9,
        "asr_wer_stage3": 0.1,
        "picture_accuracy": 0.85,
        "av_accuracy": 0.8,
        "av_alignment_accuracy": 0.9,
        "av_alignment_accuracy_interleaved_1d": 0.85,
        "av_alignment_accuracy_ablation": 0.6,
        "dialogue_accuracy": 0.75,
        "voice_question_accuracy": 0.8,
        "text_question_accuracy": 0.9,
        "codec_wer": {"en-us": 0.0},
        "talker_wer_icl": {"mean": 0.3},
        "talker_wer_icl_clean": {"mean": 0.1},
    }
    for key, value in changes.items():
        (metrics if key in metrics else stage)[key] = value
    return {"stages": [{"loss_first": 2.0, "loss_last": 1.0, **stage}], "metrics": metrics}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"frozen_unchanged": False}, "a frozen weight changed"),
        ({"trained_changed": False}, "did not change"),
        ({"loss_last": 2.5}, "the loss did not fall"),
        ({"asr_wer_stage1": 0.2}, "above 0.15"),
        ({"asr_wer_before_encoder": 0.05}, "did not fall"),
        ({"caption_accuracy": 0.7}, "below 0.75"),
        ({"dialogue_accuracy": 0.74}, "dialogue accuracy 0.740 is below 0.75"),
        ({"voice_question_accuracy": 0.79}, "more than 10 points"),
        ({"asr_wer_stage3": 0.11}, "after stage 3 0.110 is above 0.1"),
        ({"picture_accuracy": 0.84}, "picture_accuracy 0.840 is below 0.85"),
        ({"av_alignment_accuracy": 0.79}, "av_alignment_accuracy 0.790 is below 0.8"),
        ({"av_alignment_accuracy_ablation": 0.76}, "0.900 against 0.760"),
        ({"av_accuracy": 0.79}, "av_accuracy 0.790 is below 0.8"),
        ({"codec_wer": {"en-us": 0.01, "en-gb": 0.06}}, "en-gb after the codec 0.060"),
        ({"talker_wer_icl": {"mean": 0.51}}, "above 0.5"),
        ({"talker_wer_icl_clean": {"mean": 0.13}}, "above 0.12"),
    ],
)
def test_each_broken_promise_fails_the_demo(changes: dict[str, Any], said: str) -> None:
    assert failures(summary_with(), quick=False) == []
    found = failures(summary_with(**changes), quick=False)
    assert len(found) == 1
    assert said in found[0]
