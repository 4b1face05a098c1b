"""Optimiser settings and the learning-rate schedule, a pure function of the step.

There is no scheduler object, so there is no scheduler state to save.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from omni_train.config.errors import ConfigError


class Schedule(Enum):
    """Shape of the learning rate after the warm-up."""

    constant = "constant"
    cosine = "cosine"


@dataclass(kw_only=True, slots=True)
class GroupConfig:
    """Settings of one named parameter group.

    Args:
        trainable: True trains and False freezes the group, whatever the stage; None leaves it to
            the stage.
        lr: peak learning rate; None takes the optimiser's.
        weight_decay: None takes the optimiser's.
    """

    trainable: bool | None = None
    lr: float | None = None
    weight_decay: float | None = None


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW over named groups.

    Args:
        lr: peak learning rate of groups that set none.
        beta1, beta2, eps: of AdamW.
        weight_decay: decoupled, of groups that set none.
        warmup_steps: steps of linear warm-up.
        schedule: shape after the warm-up.
        min_lr_ratio: share of the peak at which `cosine` ends.
        groups: what differs from the stage and from these values, by group name.
    """

    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: Schedule = Schedule.cosine
    min_lr_ratio: float = 0.1
    groups: dict[str, GroupConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rules = [
            ("lr", self.lr, self.lr >= 0.0, "must not be negative"),
            ("beta1", self.beta1, 0.0 <= self.beta1 < 1.0, "must be in [0, 1)"),
            ("beta2", self.beta2, 0.0 <= self.beta2 < 1.0, "must be in [0, 1)"),
            ("eps", self.eps, self.eps > 0.0, "must be positive"),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0.0, "must not be negative"),
            ("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "must not be negative"),
            ("min_lr_ratio", self.min_lr_ratio, 0.0 <= self.min_lr_ratio <= 1.0, "is a share"),
        ]
        for key, value, holds, rule in rules:
            if not holds:
                raise ConfigError(
                    key=f"optim.{key}", value=value, rule=rule, remedy="give a value that does"
                )


def lr_factor(config: OptimConfig, *, step: int, max_steps: int) -> float:
    """Return the share of the peak learning rate for the update number `step`, counted from 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule is Schedule.constant:
        return 1.0
    span = max(1, max_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * cosine
