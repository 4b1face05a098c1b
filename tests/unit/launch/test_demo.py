"""What the demo hands to its stages, and what it reads from their event logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.demo import ALL, CONTROLS, Stage, overrides_of
from launch.demo_report import keep_audio
from launch.demo_talker import speech_failures, speech_rates
from launch.demo_work import Codes
from launch.stages import REPO


def test_a_seed_reaches_every_stage() -> None:
    root = REPO / "runs" / "demo-seed3"
    for stage in ALL:
        if not isinstance(stage, Stage):
            continue
        given = overrides_of(stage, root, quick=False, seed=3)
        assert "run.seed=3" in given
        assert "run.experiment=demo-seed3" in given
        assert not any(
            o.startswith("run.seed") for o in overrides_of(stage, root, quick=False, seed=None)
        )


def test_the_control_is_the_same_training_on_the_right_texts() -> None:
    root = REPO / "runs" / "demo"
    stages = {step.name: step for step in ALL if isinstance(step, Stage)}
    own, control = (
        set(overrides_of(stages[name], root, quick=True, seed=1))
        for name in ("talker_icl", "talker_icl_clean")
    )
    assert own < control
    (other,) = control - own
    assert other.startswith("data.sources.speech.path=")
    (made,) = (step for step in CONTROLS if isinstance(step, Codes))
    assert other.endswith(f"codes/{made.subset}")


def log(run_dir: Path, *events: dict[str, Any]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (run_dir / "events.jsonl").write_text(lines)


def predictions(run_dir: Path, task: str, *rates: float) -> None:
    """A line for each text; every text has one wrong boundary of two."""
    run_dir.mkdir(parents=True, exist_ok=True)
    pauses = {"missing": 1, "extra": 0, "boundaries": 2}
    rows = [{"number": n, "wer": wer, "pauses": pauses} for n, wer in enumerate(rates)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run_dir / f"predictions-{task}.jsonl").write_text(lines)


def test_rates_join_both_seeds_and_are_absent_where_nothing_ran(tmp_path: Path) -> None:
    assert speech_rates(tmp_path) == {}
    predictions(tmp_path / "evaluate_talker_icl", "tts", 0.5, 0.5)
    predictions(tmp_path / "evaluate_talker_icl", "tts_again", 0.0, 0.0)
    expected = {"mean": 0.25, "low": 0.25, "high": 0.25, "n": 4, "pause_error": 0.5}
    assert speech_rates(tmp_path) == {"talker_wer_icl": expected}
    predictions(tmp_path / "evaluate_talker_dpo", "tts", 0.0, 0.5)
    found = speech_rates(tmp_path)["talker_wer_dpo"]
    assert (found["mean"], found["n"]) == (0.25, 2)
    assert found["low"] < found["mean"] < found["high"]


def spoken(**changes: float) -> dict[str, Any]:
    rates = {"icl": 0.4, "dpo": 0.1, "sft_control": 0.2, "speaker": 0.2} | changes
    named = ("icl", "dpo", "sft_control", "speaker")
    return {
        **{f"talker_wer_{name}": {"mean": rates[name]} for name in named},
        "pairs": {"ordered_by_pauses": changes.get("by_pauses", 3)},
        "speaker_nearest_share": changes.get("share", 0.95),
        "old_voices_wer_before": 0.1,
        "old_voices_wer_after": changes.get("after", 0.14),
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dpo": 0.25, "sft_control": 0.4}, "DPO took 38%"),
        ({"sft_control": 0.15}, "ahead of its control"),
        ({"by_pauses": 0}, "pauses decided"),
        ({"speaker": 0.26}, "the new voice 0.260"),
        ({"share": 0.89}, "in 89%"),
        ({"after": 0.16}, "rose by 0.060"),
    ],
)
def test_each_broken_promise_of_speech_is_named(changes: dict[str, float], said: str) -> None:
    assert speech_failures(spoken()) == []
    (found,) = speech_failures(spoken(**changes))
    assert said in found


def test_kept_waves_lie_beside_their_texts_and_old_ones_go(tmp_path: Path) -> None:
    run_dir = tmp_path / "evaluate_talker_icl"
    (run_dir / "audio" / "tts").mkdir(parents=True)
    (run_dir / "audio" / "tts" / "a.wav").write_bytes(b"sound")
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "old.wav").write_bytes(b"")
    said = {"speaker": "en-us", "text": "river", "heard": "winter", "wer": 1.0}
    event = {"kind": "audio", "task": "tts", "key": "a", "wave": "audio/tts/a.wav", **said}
    # Evaluated twice: one line.
    log(run_dir, event, event)
    keep_audio(tmp_path)
    assert sorted(p.name for p in (tmp_path / "audio").iterdir()) == ["a.wav", "texts.jsonl"]
    assert (tmp_path / "audio" / "a.wav").read_bytes() == b"sound"
    (line,) = (tmp_path / "audio" / "texts.jsonl").read_text().splitlines()
    assert json.loads(line) == {"wave": "a.wav", **said}
