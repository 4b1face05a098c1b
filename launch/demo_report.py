"""What the demo proved: figures from the stages' event logs, the checks on them, and the table.

Reads event logs and `corpus.json`; starts nothing.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from launch.demo_alignment import alignment_failures, alignment_rows, alignment_scores
from launch.demo_talker import scores_of, speech_failures, speech_rates, speech_rows
from omni_train.engine.exit_codes import ExitCode
from omni_train.tracking.events import read_jsonl, read_steps

# Steps whose mean stands for the loss at the start and at the end of a stage.
_LOSS_STEPS = 5
# What the demo promises on held-out content; rates are 0..1.
MAX_ASR_WER = 0.15
MIN_CAPTION_ACCURACY = 0.75
MAX_ASR_WER_STAGE3 = 0.10
MIN_STAGE3_ACCURACY = {"picture_accuracy": 0.85, "av_accuracy": 0.80}
MIN_DIALOGUE_ACCURACY = 0.75
# How much worse a question may be answered by voice than in writing.
MAX_VOICE_LOSS = 0.10


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


def summarise(root: Path, *, stages: list[str], seconds: float) -> dict[str, Any]:
    """Return the content of `summary.json`.

    Args:
        root: directory of the demo.
        stages: run directories of training stages, in order.
        seconds: of the whole command.
    """
    results = [stage_result(root / name) for name in stages]
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
            "asr_wer_before_encoder": scores_of(root / "evaluate_audio_adapter")["asr"]["value"],
            "asr_wer_stage1": scores_of(root / "evaluate_audio_encoder")["asr"]["value"],
            "caption_accuracy": scores_of(root / "evaluate_vision_encoder")["caption"]["value"],
            "raw_speech_wer": {
                name: voice["wer"] for name, voice in corpus["voices"].items() if voice["kept"]
            },
            **thinker_scores(root),
            **alignment_scores(root),
            **speech_rates(root),
        },
    }


def thinker_scores(root: Path) -> dict[str, float]:
    """Scores of the Thinker after stage 3 and stage 4; none where it has not been evaluated."""
    scores = scores_of(root / "evaluate_stage3")
    keys = {"asr": "asr_wer_stage3", "picture": "picture_accuracy", "av": "av_accuracy"}
    found = {keys[task]: float(score["value"]) for task, score in scores.items()}
    return found | dialogue_scores(root)


def dialogue_scores(root: Path) -> dict[str, float]:
    """Scores after dialogues were taught; none where that has not been evaluated."""
    scores = scores_of(root / "evaluate_thinker_sft")
    if not scores:
        return {}
    asked = scores["question"]["groups"]
    return {
        "dialogue_accuracy": float(scores["dialogue"]["value"]),
        **{f"{way}_question_accuracy": float(asked[way]["value"]) for way in ("voice", "text")},
    }


def keep_audio(root: Path) -> None:
    """Copy the waves that the Talker's evaluation kept to `audio/`, with what was to be said."""
    evaluation, folder = root / "evaluate_talker_icl", root / "audio"
    if not (evaluation / "events.jsonl").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    spoken = [e for e in read_jsonl(evaluation / "events.jsonl") if e["kind"] == "audio"]
    shown = ("wave", "speaker", "text", "heard", "wer")
    lines = []
    for event in {event["key"]: event for event in spoken}.values():
        name = Path(event["wave"]).name
        shutil.copy(evaluation / event["wave"], folder / name)
        lines.append(json.dumps({field: event[field] for field in shown} | {"wave": name}) + "\n")
    (folder / "texts.jsonl").write_text("".join(lines), encoding="utf-8")


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
    found += _thinker_failures(metrics) + alignment_failures(metrics)
    return found + speech_failures(metrics)


def _thinker_failures(metrics: dict[str, Any]) -> list[str]:
    found = []
    if (wer := metrics.get("asr_wer_stage3", 0.0)) > MAX_ASR_WER_STAGE3:
        found.append(f"ASR WER after stage 3 {wer:.3f} is above {MAX_ASR_WER_STAGE3}")
    for key, least in MIN_STAGE3_ACCURACY.items():
        if metrics.get(key, 1.0) < least:
            found.append(f"{key} {metrics[key]:.3f} is below {least}")
    if "dialogue_accuracy" not in metrics:
        return found
    if (right := metrics["dialogue_accuracy"]) < MIN_DIALOGUE_ACCURACY:
        found.append(f"dialogue accuracy {right:.3f} is below {MIN_DIALOGUE_ACCURACY}")
    voice, text = metrics["voice_question_accuracy"], metrics["text_question_accuracy"]
    # Counts of the same questions: their difference is exact but for floats.
    if text - voice > MAX_VOICE_LOSS + 1e-9:
        found.append(f"questions by voice {voice:.3f}, in writing {text:.3f}: more than 10 points")
    return found


def _rows(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What is measured, by whom, and the figure."""
    raw = max(metrics["raw_speech_wer"].values())
    rows = [
        ("WER of the raw speech, worst voice kept", "PocketSphinx, jiwer", raw),
        ("ASR WER before the encoder phase", "jiwer", metrics["asr_wer_before_encoder"]),
        ("ASR WER after stage 1", "jiwer", metrics["asr_wer_stage1"]),
        ("captions right, word for word", "exact match", metrics["caption_accuracy"]),
    ]
    names = {
        "asr_wer_stage3": ("ASR WER after stage 3", "jiwer"),
        "picture_accuracy": ("questions about pictures right, after stage 3", "exact match"),
        "av_accuracy": ("questions about clips right, after stage 3", "exact match"),
        "dialogue_accuracy": ("last turns of dialogues right, after SFT", "exact match"),
        "voice_question_accuracy": ("questions by voice right", "exact match"),
        "text_question_accuracy": ("the same questions in writing", "exact match"),
    }
    rows += [(*said, metrics[key]) for key, said in names.items() if key in metrics]
    shown = [(measure, by, f"{100 * value:.1f} %") for measure, by, value in rows]
    return shown + alignment_rows(metrics) + speech_rows(metrics)


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
    for measure, by, value in _rows(metrics):
        scores.add_row(measure, by, value)
    console.print(scores)
    found = failures(summary, quick=quick)
    for failure in found:
        console.print(f"[red]failed:[/red] {failure}")
    verdict = "quick run, structure only: " if quick else ""
    verdict += "not as promised" if found else "all promises held"
    console.print(f"{verdict}, {summary['seconds']:.0f} s, figures in {root / 'summary.json'}")
    return int(ExitCode.bug) if found else 0
