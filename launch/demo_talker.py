"""What the demo proved about speech: figures of the Talker's stages, and the checks on them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omni_train.evaluation.tts import bootstrap_interval
from omni_train.tracking.events import read_jsonl

# What the demo promises on held-out content; rates are 0..1.
MAX_CODEC_WER = 0.05
# Of the demo's own Talker, half of whose texts are wrong, and of the control's.
MAX_TALKER_WER = {"talker_wer_icl": 0.5, "talker_wer_icl_clean": 0.12}
# DPO takes so much of the word errors away, and so much more of them than the control does.
MIN_DPO_FALL, MIN_DPO_LEAD = 0.40, 0.15
MIN_NEAREST_SHARE, MAX_SPEAKER_WER, MAX_OLD_VOICES_RISE = 0.90, 0.25, 0.05
# The same requests, sampled with two seeds.
_SEEDS = ("tts", "tts_again")
_RUNS = {
    "talker_wer_icl": "talker_icl",
    "talker_wer_icl_clean": "talker_icl_clean",
    "talker_wer_dpo": "talker_dpo",
    "talker_wer_sft_control": "talker_sft_control",
}


def speech_rates(root: Path) -> dict[str, Any]:
    """Figures of speech, through the codec and sampled, of the runs that there are."""
    found: dict[str, Any] = {}
    if voices := scores_of(root / "speech_codec").values():
        found["codec_wer"] = {score["voice"]: score["value"] for score in voices}
    for key, name in _RUNS.items():
        if (rate := spoken_rate(root / f"evaluate_{name}")) is not None:
            found[key] = rate
    pairs = root / "pairs" / "pairs.json"
    if pairs.is_file():
        made = json.loads(pairs.read_bytes())
        found["pairs"] = {name: made[name] for name in ("pairs", "ordered_by_pauses", "reasons")}
    run_dir = root / "evaluate_talker_speaker"
    if (new := spoken_rate(run_dir, ("new",))) is not None:
        figures = scores_of(run_dir)["new"]["figures"]
        found["talker_wer_speaker"] = new
        found["speaker_nearest_share"] = figures["nearest_share"]
        old = spoken_rate(run_dir)
        assert old is not None, "one run has both"
        found["old_voices_wer_before"] = found["talker_wer_dpo"]["mean"]
        found["old_voices_wer_after"] = old["mean"]
    return found


def spoken_rate(run_dir: Path, tasks: Iterable[str] = _SEEDS) -> dict[str, float] | None:
    """Word and pause error rates over some tasks of an evaluation; None where it never ran.

    The interval is over texts: samples of one text are no independent draws.
    """
    paths = [run_dir / f"predictions-{task}.jsonl" for task in tasks]
    rows = [row for path in paths if path.is_file() for row in read_jsonl(path)]
    if not rows:
        return None
    by_text: dict[int, list[float]] = {}
    for row in rows:
        by_text.setdefault(row["number"], []).append(row["wer"])
    low, high = bootstrap_interval([sum(of) / len(of) for of in by_text.values()])
    pauses = [row["pauses"] for row in rows if row["pauses"] is not None]
    wrong = sum(found["missing"] + found["extra"] for found in pauses)
    return {
        "mean": sum(row["wer"] for row in rows) / len(rows),
        "low": low,
        "high": high,
        "n": len(rows),
        "pause_error": wrong / max(sum(found["boundaries"] for found in pauses), 1),
    }


def scores_of(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Return the last `evaluation` event of each task of a run; none where it never ran."""
    log = run_dir / "events.jsonl"
    events = read_jsonl(log) if log.exists() else ()
    return {event["task"]: event for event in events if event["kind"] == "evaluation"}


def speech_failures(metrics: dict[str, Any]) -> list[str]:
    """Return what was promised of speech and did not happen."""
    found = [
        f"WER of {voice} after the codec {rate:.3f} is above {MAX_CODEC_WER}"
        for voice, rate in metrics.get("codec_wer", {}).items()
        if rate > MAX_CODEC_WER
    ]
    for key, most in MAX_TALKER_WER.items():
        if key in metrics and metrics[key]["mean"] > most:
            found.append(f"{key} {metrics[key]['mean']:.3f} is above {most}")
    if "talker_wer_sft_control" in metrics:
        found += _preference_failures(metrics)
    if "talker_wer_speaker" in metrics:
        found += _speaker_failures(metrics)
    return found


def _preference_failures(metrics: dict[str, Any]) -> list[str]:
    icl, dpo, control = (
        metrics[f"talker_wer_{name}"]["mean"] for name in ("icl", "dpo", "sft_control")
    )
    fall, of_control = (icl - dpo) / icl, (icl - control) / icl
    found = []
    if fall < MIN_DPO_FALL:
        found.append(f"DPO took {fall:.0%} of the word errors away, not {MIN_DPO_FALL:.0%}")
    if fall - of_control < MIN_DPO_LEAD:
        lead = f"{fall:.0%} against {of_control:.0%}"
        found.append(f"DPO is not {MIN_DPO_LEAD:.0%} ahead of its control: {lead}")
    if not metrics["pairs"]["ordered_by_pauses"]:
        found.append("pauses decided the order of no pair")
    return found


def _speaker_failures(metrics: dict[str, Any]) -> list[str]:
    found = []
    share, rate = metrics["speaker_nearest_share"], metrics["talker_wer_speaker"]["mean"]
    if share < MIN_NEAREST_SHARE:
        found.append(f"the new voice is nearest to its target in {share:.0%} of the replies")
    if rate > MAX_SPEAKER_WER:
        found.append(f"WER of the new voice {rate:.3f} is above {MAX_SPEAKER_WER}")
    rise = metrics["old_voices_wer_after"] - metrics["old_voices_wer_before"]
    if rise > MAX_OLD_VOICES_RISE:
        found.append(f"the old voices' WER rose by {rise:.3f}, more than {MAX_OLD_VOICES_RISE}")
    return found


def speech_rows(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What is measured, by whom, and the figure."""
    heard = "PocketSphinx, jiwer"
    rows = []
    if "codec_wer" in metrics:
        worst = max(metrics["codec_wer"].values())
        rows.append(("WER after the codec, worst voice kept", heard, f"{worst:.1%}"))
    for key, what in (
        ("talker_wer_icl", "texts half of them wrong"),
        ("talker_wer_dpo", "after DPO"),
        ("talker_wer_sft_control", "control: SFT on the chosen"),
        ("talker_wer_icl_clean", "texts right"),
        ("talker_wer_speaker", "new voice"),
    ):
        if key in metrics:
            rate = metrics[key]
            shown = f"{rate['mean']:.1%} ({rate['low']:.1%} to {rate['high']:.1%})"
            rows.append((f"WER of the Talker, {what}", heard, shown))
    for key, what in (("talker_wer_icl", "before"), ("talker_wer_dpo", "after")):
        if key in metrics:
            rows.append(
                (
                    f"pause error {what} DPO",
                    "silence at commas",
                    f"{metrics[key]['pause_error']:.1%}",
                )
            )
    if "speaker_nearest_share" in metrics:
        share = f"{metrics['speaker_nearest_share']:.1%}"
        rows.append(("new voice nearest to its target", "mean log-mel", share))
        rows.append(
            ("WER of the old voices after it", heard, f"{metrics['old_voices_wer_after']:.1%}")
        )
    return rows
