"""Optimiser settings and the learning-rate schedules, pure functions of the step.

There is no scheduler object, so there is no scheduler state to save.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import Enum

from omni_train.config.errors import ConfigError


class Schedule(Enum):
    """Shape of the learning rate after the warm-up.

    constant keeps the peak; cosine falls from it all the way; wsd (warm-up, stable, decay) keeps it
    and falls in a straight line over the last `decay_share` of the steps.
    """

    constant = "constant"
    cosine = "cosine"
    wsd = "wsd"


@dataclass(kw_only=True, slots=True)
class GroupConfig:
    """Settings of one named parameter group; None takes the stage's or the optimiser's.

    Args:
        trainable: True trains and False freezes the group, whatever the stage.
        lr: peak learning rate.
        weight_decay: decoupled.
        layer_decay: factor of the learning rate per layer further from the output.
        warmup_steps, schedule, min_lr_ratio, decay_share: see `OptimConfig`.
    """

    trainable: bool | None = None
    lr: float | None = None
    weight_decay: float | None = None
    layer_decay: float | None = None
    warmup_steps: int | None = None
    schedule: Schedule | None = None
    min_lr_ratio: float | None = None
    decay_share: float | None = None

    def __post_init__(self) -> None:
        _check_rules("optim.groups.*", self)


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW over named groups.

    Args:
        lr: peak learning rate.
        beta1, beta2, eps: of AdamW.
        weight_decay: decoupled.
        warmup_steps: steps of linear warm-up.
        schedule: shape after the warm-up.
        min_lr_ratio: share of the peak at which `cosine` and `wsd` end.
        decay_share: last part of all steps in which `wsd` falls.
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
    decay_share: float = 0.1
    groups: dict[str, GroupConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_rules("optim", self)


_RULES: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": (lambda value: value >= 0.0, "must not be negative"),
    "beta1": (lambda value: 0.0 <= value < 1.0, "must be in [0, 1)"),
    "beta2": (lambda value: 0.0 <= value < 1.0, "must be in [0, 1)"),
    "eps": (lambda value: value > 0.0, "must be positive"),
    "weight_decay": (lambda value: value >= 0.0, "must not be negative"),
    "layer_decay": (lambda value: 0.0 < value <= 1.0, "must be in (0, 1]"),
    "warmup_steps": (lambda value: value >= 0, "must not be negative"),
    "min_lr_ratio": (lambda value: 0.0 <= value <= 1.0, "is a share"),
    "decay_share": (lambda value: 0.0 < value <= 1.0, "is a share above 0"),
}


def _check_rules(prefix: str, config: object) -> None:
    for name, (holds, rule) in _RULES.items():
        value = getattr(config, name, None)
        if value is not None and not holds(value):
            raise ConfigError(
                key=f"{prefix}.{name}", value=value, rule=rule, remedy="give a value that does"
            )


@dataclass(frozen=True, slots=True)
class LrCurve:
    """A group's learning rate over the steps, as a share of its peak.

    Args:
        warmup_steps, schedule, min_lr_ratio, decay_share: see `OptimConfig`.
    """

    warmup_steps: int
    schedule: Schedule
    min_lr_ratio: float
    decay_share: float

    def factor(self, *, step: int, max_steps: int) -> float:
        """Return the share of the peak for the update number `step`, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule is Schedule.constant:
            return 1.0
        start = float(self.warmup_steps)
        if self.schedule is Schedule.wsd:
            start = max(start, max_steps * (1.0 - self.decay_share))
        progress = min(1.0, max(0.0, step - start) / max(1.0, max_steps - start))
        left = 1.0 - progress
        if self.schedule is Schedule.cosine:
            left = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * left


def curve_of(optim: OptimConfig, group: str = "") -> LrCurve:
    """Return the curve of a named group; that of the optimiser where it sets nothing."""
    own = optim.groups.get(group, GroupConfig())
    return LrCurve(
        **{
            spec.name: getattr(optim, spec.name)
            if (value := getattr(own, spec.name)) is None
            else value
            for spec in fields(LrCurve)
        }
    )
