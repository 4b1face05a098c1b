"""What the alignment probe of `demo --controls` showed: three arms, their curves, the check.

Reads event logs; starts nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omni_train.tracking.events import read_jsonl

# Key in the summary -> arm of recipes/alignment_probe.py.
ARMS = {
    "av_alignment_accuracy": "tmrope",
    "av_alignment_accuracy_interleaved_1d": "interleaved_1d",
    "av_alignment_accuracy_ablation": "video_first_1d",
}
MIN_ACCURACY = 0.80
# Above the arm that has all video first and counts positions one by one.
MIN_ADVANTAGE = 0.15
_SAID = {
    "av_alignment_accuracy": "colour on screen at an audio token: TMRoPE, interleaved",
    "av_alignment_accuracy_interleaved_1d": "the same, interleaved, 1-D positions",
    "av_alignment_accuracy_ablation": "the same, video first, 1-D positions",
}


def alignment_scores(root: Path) -> dict[str, Any]:
    """Return the last read-out of each arm, and `av_alignment_curves`: (step, share) by arm."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for arm in ARMS.values():
        events = read_jsonl(root / f"alignment_{arm}" / "events.jsonl")
        # A run that was resumed has some of them twice.
        shares = {e["step"]: float(e["token_accuracy"]) for e in events if e["kind"] == "heldout"}
        if shares:
            curves[arm] = sorted(shares.items())
    if not curves:
        return {}
    last = {key: curves[arm][-1][1] for key, arm in ARMS.items() if arm in curves}
    return {**last, "av_alignment_curves": curves}


def alignment_failures(metrics: dict[str, Any]) -> list[str]:
    """Return what was promised of the probe and did not happen."""
    if not all(key in metrics for key in ARMS):
        return []
    ours, ablation = metrics["av_alignment_accuracy"], metrics["av_alignment_accuracy_ablation"]
    found = []
    if ours < MIN_ACCURACY:
        found.append(f"av_alignment_accuracy {ours:.3f} is below {MIN_ACCURACY}")
    if ours - ablation < MIN_ADVANTAGE:
        gap = f"{ours:.3f} against {ablation:.3f}"
        found.append(f"alignment: {gap} with all video first, less than {MIN_ADVANTAGE} above")
    return found


def alignment_rows(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return measure, by whom, and the figure, of the arms that there are."""
    return [
        (said, "exact match", f"{100 * metrics[key]:.1f} %")
        for key, said in _SAID.items()
        if key in metrics
    ]
