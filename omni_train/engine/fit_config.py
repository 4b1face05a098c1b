"""Settings of the training loop; the loop itself is fit.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from omni_train.config.errors import ConfigError, check_at_least
from omni_train.engine.faults import FaultConfig, FaultKind
from omni_train.engine.spikes import SpikeConfig
from omni_train.engine.watchdog import WatchConfig


@dataclass(kw_only=True, slots=True)
class FitConfig:
    """How long to train and how often to save.

    Args:
        max_steps: global steps of the stage; the learning rate's schedule ends there.
        save_steps: global steps between checkpoints; one more is written at the end.
        log_steps: global steps between progress lines; every step is an event.
        keep_checkpoints: complete checkpoints to keep.
        milestone_steps: checkpoints whose step this divides are kept for ever; 0 for none.
        max_skipped_steps: non-finite steps in a row after which the run stops (exit code 76).
        spikes: when to alert, and steps to go back to or to leave out by hand.
        watch: when a rank hangs, or is slower than the others.
        fault: what goes wrong on purpose, to see what the run makes of it.
    """

    max_steps: int
    save_steps: int = 500
    log_steps: int = 10
    keep_checkpoints: int = 2
    milestone_steps: int = 0
    max_skipped_steps: int = 5
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    fault: FaultConfig = field(default_factory=FaultConfig)

    def __post_init__(self) -> None:
        check_at_least(
            self,
            "fit",
            max_steps=1,
            save_steps=1,
            log_steps=1,
            keep_checkpoints=2,
            milestone_steps=0,
            max_skipped_steps=0,
        )
        if self.milestone_steps % self.save_steps:
            raise ConfigError(
                key="fit.milestone_steps",
                value=self.milestone_steps,
                rule=f"nothing is saved there: fit.save_steps={self.save_steps}",
                remedy="give a multiple of it",
            )
        if self.fault.kind is not FaultKind.none and self.fault.step > self.max_steps:
            raise ConfigError(
                key="fit.fault.step",
                value=self.fault.step,
                rule=f"never reached: fit.max_steps={self.max_steps}",
                remedy="give an earlier step",
            )
