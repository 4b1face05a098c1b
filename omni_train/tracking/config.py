"""Settings of the views of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Which views are written beside `events.jsonl`.

    Args:
        wandb: write an offline W&B run at the end; `wandb sync` uploads it from anywhere.
        project: W&B project.
    """

    wandb: bool = True
    project: str = "omni-train"
