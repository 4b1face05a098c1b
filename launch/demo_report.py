"""What the demo proved: figures from the stages' event logs, the checks on them, and the table.

Reads event logs and `corpus.json`; starts nothing.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from omni_train.engine.exit_codes import ExitCode
from omni_train.tracking.events import read_jsonl, read_steps

# Steps whose mean stands for the loss at the start and at the end of a stage.
_LOSS_STEPS = 5
# What the demo promises on held-out content; rates are 0..1.
MAX_ASR_WER = 0.15
MIN_CAPTION_ACCURACY = 0.75


@dataclass(frozen=True, slots=True)
class StageResult:
    """One training stage.

    Args:
        name: of the stage.
        steps: global steps.
        seconds: wall time of its processes, start-up included.
        loss_first, loss_last: mean loss of the first and last steps.
        frozen_unchanged: whether the hash of every frozen group is what it was.
        trained_changed: whether the hash of every trained group is another one.
    """

    name: str
    steps: int
    seconds: float
    loss_first: float
    loss_last: float
    frozen_unchanged: bool
    trained_changed: bool


def stage_result(run_dir: Path) -> StageResult:
    """Read one stage's result from its event log."""
    events = list(read_jsonl(run_dir / "events.jsonl"))
    steps = read_steps(run_dir / "events.jsonl")
    losses = [float(step["loss"]) for step in steps]
    count = min(_LOSS_STEPS, max(1, len(losses) // 2))
    before = next(e for e in events if e["kind"] == "fit_start")
    after = next(e for e in reversed(events) if e["kind"] == "fit_end")
    same = {name: before["hashes"][name] == after["hashes"][name] for name in before["hashes"]}
    trained = set(before["trained"])
    ends = [e for e in events if e["kind"] == "run_end"]
    return StageResult(
        name=run_dir.name,
        steps=len(steps),
        seconds=round(sum(float(e["elapsed_s"]) for e in ends), 1),
        loss_first=sum(losses[:count]) / count,
        loss_last=sum(losses[-count:]) / count,
        frozen_unchanged=all(same[name] for name in same if name not in trained),
        trained_changed=not any(same[name] for name in trained),
    )


def summarise(
    root: Path,
    *,
    stages: list[str],
    evaluations: list[str],
    seconds: float,
) -> dict[str, Any]:
    """Return the content of `summary.json`.

    Args:
        root: directory of the demo.
        stages: run directories of training stages, in order.
        evaluations: run directories of evaluations.
        seconds: of the whole command.
    """
    results = [stage_result(root / name) for name in stages]
    scores = {
        name: {
            event["task"]: float(event["value"])
            for event in read_jsonl(root / name / "events.jsonl")
            if event["kind"] == "evaluation"
        }
        for name in evaluations
    }
    corpus = json.loads((root / "corpus" / "corpus.json").read_text(encoding="utf-8"))
    start = next(e for e in read_jsonl(root / stages[0] / "events.jsonl") if "versions" in e)
    resolved = yaml.safe_load((root / stages[0] / "resolved.yaml").read_text(encoding="utf-8"))
    return {
        "seconds": round(seconds, 1),
        "ranks": start["ranks"],
        "zero_stage": resolved["deepspeed"]["zero_stage"],
        "precision": resolved["deepspeed"]["precision"],
        "versions": start["versions"],
        "stages": [asdict(result) for result in results],
        "metrics": {
            "asr_wer_before_encoder": scores["evaluate_audio_adapter"]["asr"],
            "asr_wer_stage1": scores["evaluate_audio_encoder"]["asr"],
            "caption_accuracy": scores["evaluate_vision_encoder"]["caption"],
            "raw_speech_wer": {
                name: voice["wer"] for name, voice in corpus["voices"].items() if voice["kept"]
            },
        },
    }


def write_summary(root: Path, summary: dict[str, Any]) -> None:
    """Write `summary.json`."""
    (root / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def failures(summary: dict[str, Any], *, quick: bool) -> list[str]:
    """Return what was promised and did not happen; a quick run only promises the structure."""
    found = []
    for stage in summary["stages"]:
        if not stage["frozen_unchanged"]:
            found.append(f"{stage['name']}: a frozen weight changed")
        if not stage["trained_changed"]:
            found.append(f"{stage['name']}: a trained group did not change")
        if not quick and not stage["loss_last"] < stage["loss_first"]:
            found.append(f"{stage['name']}: the loss did not fall")
    if quick:
        return found
    metrics = summary["metrics"]
    before, after = metrics["asr_wer_before_encoder"], metrics["asr_wer_stage1"]
    if not after < before:
        found.append(f"ASR WER did not fall: {before:.3f} before the encoder phase, {after:.3f}")
    if after > MAX_ASR_WER:
        found.append(f"ASR WER {after:.3f} is above {MAX_ASR_WER}")
    if metrics["caption_accuracy"] < MIN_CAPTION_ACCURACY:
        low = metrics["caption_accuracy"]
        found.append(f"caption accuracy {low:.3f} is below {MIN_CAPTION_ACCURACY}")
    return found


def print_summary(console: Console, summary: dict[str, Any], root: Path, *, quick: bool) -> int:
    """Print the final tables and return the exit code."""
    ranks, zero, precision = (summary[key] for key in ("ranks", "zero_stage", "precision"))
    title = f"{ranks} ranks, ZeRO-{zero}, {precision}, CPU"
    table = Table(title=title, box=SIMPLE)
    for name in ("stage", "steps", "seconds", "loss", "frozen", "trained"):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for stage in summary["stages"]:
        table.add_row(
            stage["name"],
            str(stage["steps"]),
            f"{stage['seconds']:.0f}",
            f"{stage['loss_first']:.2f} -> {stage['loss_last']:.2f}",
            "same" if stage["frozen_unchanged"] else "CHANGED",
            "changed" if stage["trained_changed"] else "SAME",
        )
    console.print(table)
    metrics = summary["metrics"]
    scores = Table(title="on held-out content", box=SIMPLE)
    for name in ("measure", "by", "value"):
        scores.add_column(name, justify="right" if name == "value" else "left")
    worst = max(metrics["raw_speech_wer"].values())
    rows = [
        ("WER of the raw speech, worst voice kept", "PocketSphinx, jiwer", worst),
        ("ASR WER before the encoder phase", "jiwer", metrics["asr_wer_before_encoder"]),
        ("ASR WER after stage 1", "jiwer", metrics["asr_wer_stage1"]),
        ("captions right, word for word", "exact match", metrics["caption_accuracy"]),
    ]
    for measure, by, value in rows:
        scores.add_row(measure, by, f"{100 * value:.1f} %")
    console.print(scores)
    found = failures(summary, quick=quick)
    for failure in found:
        console.print(f"[red]failed:[/red] {failure}")
    verdict = "quick run, structure only: " if quick else ""
    verdict += "not as promised" if found else "all promises held"
    console.print(f"{verdict}, {summary['seconds']:.0f} s, figures in {root / 'summary.json'}")
    return int(ExitCode.bug) if found else 0
