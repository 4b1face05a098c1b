"""Settings of the views of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Which views are written beside `events.jsonl`.

    Args:
        wandb: write an offline W&B run at the end; `omni-train track sync` uploads it.
        tensorboard: write `tensorboard/` at the end; needs the package of that name.
        project: W&B project.
    """

    wandb: bool = True
    tensorboard: bool = False
    project: str = "omni-train"
