"""The sections that every training stage has; a recipe's root adds what is its own."""

from __future__ import annotations

from dataclasses import dataclass, field

from omni_train.data.config import DataConfig
from omni_train.engine.deepspeed import DeepSpeedConfig
from omni_train.engine.fit_config import FitConfig
from omni_train.engine.optim import OptimConfig
from omni_train.engine.run import RunConfig
from omni_train.models.config import ModelConfig
from omni_train.tracking.config import TrackingConfig


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """Run directory, model, data, optimiser, sharding, length and views of a stage."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    fit: FitConfig
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
