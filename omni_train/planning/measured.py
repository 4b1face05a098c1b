"""What a finished run says of its own speed and memory, from its `events.jsonl`.

The first steps warm up (compilation, allocator, page cache) and are left out. Medians, because
saves, evaluations and other users of a machine only ever make a step longer.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from omni_train.config.errors import ConfigError
from omni_train.tracking.events import read_jsonl, read_steps

WARM_UP_STEPS = 5
FEWEST_STEPS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A run's figures.

    Args:
        stage: as the run called it.
        values: its resolved settings.
        ranks: processes.
        steps: how many were counted.
        tokens: of a global step.
        compute_s: forward, backward and update of a step. data_s: waiting for data.
        peak_bytes: of a rank; the device's where the run recorded it, else the process's.
        save_s: that training waited for one checkpoint; None where there was none.
    """

    stage: str
    values: dict[str, Any]
    ranks: int
    steps: int
    tokens: float
    compute_s: float
    data_s: float
    peak_bytes: float
    save_s: float | None


def read_run(folder: Path) -> Measured:
    """Read a run directory.

    Raises:
        ConfigError: it is no run, or has too few steps to learn from.
    """
    events, settings = folder / "events.jsonl", folder / "resolved.yaml"
    if not events.is_file() or not settings.is_file():
        raise ConfigError(
            key="--refit",
            value=str(folder),
            rule="a run directory with events.jsonl and resolved.yaml is needed",
            remedy="give the directory of a run of this project",
        )
    steps = read_steps(events)[WARM_UP_STEPS:]
    if len(steps) < FEWEST_STEPS:
        raise ConfigError(
            key="--refit",
            value=str(folder),
            rule=f"{len(steps)} steps after the first {WARM_UP_STEPS}; "
            f"{FEWEST_STEPS} are needed for a median",
            remedy="let it run on, or give a longer run",
        )
    start: dict[str, Any] = {}
    saves = []
    for event in read_jsonl(events):
        if event.get("kind") == "run_start":
            start = event
        elif event.get("kind") == "save":
            # What training waits for: the rest is written beside it.
            saves.append(float(event.get("blocked_s", event["seconds"])))
    seconds = [{k: float(v) for k, v in step["seconds"].items()} for step in steps]
    return Measured(
        stage=str(start["stage"]),
        values=yaml.safe_load(settings.read_text(encoding="utf-8")),
        ranks=int(start["ranks"]),
        steps=len(steps),
        tokens=statistics.median(float(step["tokens"]) for step in steps),
        compute_s=statistics.median(sum(s.values()) - s.get("data", 0.0) for s in seconds),
        data_s=statistics.median(s.get("data", 0.0) for s in seconds),
        peak_bytes=max(_peak(step) for step in steps),
        save_s=statistics.median(saves) if saves else None,
    )


def _peak(step: dict[str, Any]) -> float:
    mib = step.get("peak_device_mib") or step["peak_rss_mib"]
    return float(mib) * 2**20
