"""What the demo hands to its stages, and what it reads from their event logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launch.demo import ALL, CONTROLS, Codes, Stage, overrides_of
from launch.demo_report import keep_audio, speech_rates
from launch.stages import REPO


def test_a_seed_reaches_every_stage() -> None:
    root = REPO / "runs" / "demo-seed3"
    for stage in ALL:
        if isinstance(stage, Codes):
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


def evaluation(wer: float) -> dict[str, Any]:
    figures = {"wer": wer, "low": wer - 0.1, "high": wer + 0.1, "empty": 0.0}
    return {"kind": "evaluation", "task": "tts", "num_samples": 7, "figures": figures}


def test_rates_are_those_of_the_last_evaluation_and_absent_where_there_is_none(
    tmp_path: Path,
) -> None:
    log(tmp_path / "evaluate_talker_icl", evaluation(0.5), evaluation(0.25))
    expected = {"mean": 0.25, "low": 0.15, "high": 0.35, "n": 7}
    assert speech_rates(tmp_path) == {"talker_wer_icl": expected}
    log(tmp_path / "evaluate_talker_icl_clean", evaluation(0.125))
    assert speech_rates(tmp_path)["talker_wer_icl_clean"]["mean"] == 0.125


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
