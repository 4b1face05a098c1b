"""Curves of a run for its views: what `events.jsonl` says at which step.

step and held-out events -> read_curves -> [CurvePoint], in step order
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# Numbers of a step event that are of no use as a curve.
_NOT_CURVES = {"kind", "time", "elapsed_s", "step", "keys", "applied", "position", "best_step"}
# State of the machine of rank 0, in a section of its own.
_SYSTEM = {"peak_rss_mib", "peak_device_mib", "cpu_cores", "load", "disk_free_gib"}
_HELD_OUT = ("heldout", "spoken")


@dataclass(slots=True)
class CurvePoint:
    """All figures of a step.

    Args:
        step: global step.
        time: seconds since the epoch; 0 where the event has none.
        figures: by `group/name`.
    """

    step: int
    time: float
    figures: dict[str, float] = field(default_factory=dict)


def flatten(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the finite numbers of a nested record under `a/b` names.

    The writer of events turns the others into strings; a line of other hands may still hold one,
    and a page with NaN in its JSON shows no curve at all.
    """
    flat: dict[str, float] = {}
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat.update(flatten(value, f"{name}/"))
        elif isinstance(value, bool) or not isinstance(value, int | float):
            continue
        elif math.isfinite(value):
            flat[name] = float(value)
    return flat


def read_curves(events: Sequence[dict[str, Any]]) -> list[CurvePoint]:
    """Return the points in step order; what a resumed run repeated counts as it came last.

    Args:
        events: of the run, in order.
    """
    points: dict[int, CurvePoint] = {}
    for event in events:
        if event["kind"] not in ("step", *_HELD_OUT) or "step" not in event:
            continue
        step = int(event["step"])
        if event["kind"] == "step" or step not in points:
            points[step] = CurvePoint(step, float(event.get("time", 0.0)))
        points[step].figures |= _figures(event)
    return [points[step] for step in sorted(points)]


def _figures(event: dict[str, Any]) -> dict[str, float]:
    kept = {key: value for key, value in event.items() if key not in _NOT_CURVES}
    if event["kind"] in _HELD_OUT:
        return flatten(
            kept, "/".join(filter(None, (event["kind"], str(event.get("task", ""))))) + "/"
        )
    return flatten({f"system/{k}" if k in _SYSTEM else k: v for k, v in kept.items()})


def last_evaluations(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Figures of the last `evaluation` event of each task, under its name."""
    found: dict[str, float] = {}
    for event in events:
        if event["kind"] == "evaluation":
            figures = {k: v for k, v in event.items() if k not in ("time", "elapsed_s")}
            found |= flatten(figures, f"{event['task']}/" if "task" in event else "")
    return found
