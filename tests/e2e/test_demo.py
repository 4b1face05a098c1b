"""The whole chain as a user starts it: `omni-train demo --quick` on two ZeRO-3 ranks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.demo import STAGES
from launch.demo_report import failures
from launch.local import child_environment
from launch.stages import REPO
from omni_train.tracking.events import read_jsonl

TRAINING = [stage for stage in STAGES if stage.recipe != "evaluate"]


def demo(name: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", "demo", "--quick", "--name", name]
    return subprocess.run(
        command, cwd=REPO, env=child_environment(), capture_output=True, text=True, timeout=900
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


def test_summary_has_what_was_promised(done: tuple[Path, str, str]) -> None:
    root, _, output = done
    summary = json.loads((root / "summary.json").read_text())
    assert (summary["ranks"], summary["zero_stage"]) == (2, 3)
    assert [stage["name"] for stage in summary["stages"]] == [stage.name for stage in TRAINING]
    for stage, planned in zip(summary["stages"], TRAINING, strict=True):
        assert stage["steps"] == planned.quick_steps
        assert stage["frozen_unchanged"], stage
        assert stage["trained_changed"], stage
        assert stage["seconds"] > 0
    assert {"torch", "deepspeed", "transformers"} <= set(summary["versions"])
    metrics = summary["metrics"]
    assert {"asr_wer_before_encoder", "asr_wer_stage1", "caption_accuracy"} <= set(metrics)
    assert all(wer <= 0.05 for wer in metrics["raw_speech_wer"].values())
    assert "all promises held" in output


def test_a_finished_demo_is_not_trained_again(done: tuple[Path, str, str]) -> None:
    root, name, _ = done
    again = demo(name)
    assert again.returncode == 0, again.stdout + again.stderr
    for stage in TRAINING:
        events = list(read_jsonl(root / stage.name / "events.jsonl"))
        assert sum(e["kind"] == "step" for e in events) == stage.quick_steps
        assert sum(e["kind"] == "run_resume" for e in events) == 1


def summary_with(**changes: Any) -> dict[str, Any]:
    stage = {"name": "s", "frozen_unchanged": True, "trained_changed": True}
    metrics = {"asr_wer_before_encoder": 0.9, "asr_wer_stage1": 0.1, "caption_accuracy": 0.9}
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
    ],
)
def test_each_broken_promise_fails_the_demo(changes: dict[str, Any], said: str) -> None:
    assert failures(summary_with(), quick=False) == []
    found = failures(summary_with(**changes), quick=False)
    assert len(found) == 1
    assert said in found[0]
