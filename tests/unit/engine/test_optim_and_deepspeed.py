"""Learning-rate schedule, setting rules, and that DeepSpeed knows every key we give it."""

from __future__ import annotations

import itertools
import math

import pytest
from torch import nn

from omni_train.config.errors import ConfigError
from omni_train.engine.deepspeed import (
    DeepSpeedConfig,
    Precision,
    build_engine,
    deepspeed_json,
)
from omni_train.engine.distributed import prepare_environment
from omni_train.engine.fit import FitConfig
from omni_train.engine.groups import ParamGroup
from omni_train.engine.optim import OptimConfig, Schedule, lr_factor
from omni_train.engine.run import RunConfig


def test_schedule_warms_up_and_ends_at_its_floor() -> None:
    config = OptimConfig(warmup_steps=4, min_lr_ratio=0.2)
    factors = [lr_factor(config, step=step, max_steps=24) for step in range(25)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[14] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert factors[24] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(factors[4:]))
    constant = OptimConfig(schedule=Schedule.constant)
    assert {lr_factor(constant, step=step, max_steps=9) for step in (0, 5, 100)} == {1.0}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", list(Precision))
def test_deepspeed_knows_every_key(stage: int, precision: Precision) -> None:
    prepare_environment()
    from deepspeed.runtime import constants
    from deepspeed.runtime.config import DeepSpeedConfig as Theirs
    from deepspeed.runtime.precision_config import BFLOAT16, DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION, DeepSpeedZeroConfig

    ours = deepspeed_json(
        DeepSpeedConfig(zero_stage=stage, precision=precision), num_trained=10, largest_trained=7
    )
    known = {value for value in vars(constants).values() if isinstance(value, str)}
    assert set(ours) <= known | {BFLOAT16, ZERO_OPTIMIZATION}
    assert set(ours["data_types"]) <= known
    assert set(ours["bf16"]) <= set(DeepSpeedBF16Config.model_fields)
    zero = DeepSpeedZeroConfig.model_fields
    assert set(ours[ZERO_OPTIMIZATION]) <= set(zero) | {f.alias for f in zero.values()}
    theirs = Theirs(ours)
    assert theirs.zero_optimization_stage == stage
    assert theirs.bfloat16_config.enabled is (precision is Precision.bf16)
    assert theirs.gradient_clipping == 1.0
    assert theirs.grad_accum_dtype == "fp32"
    assert theirs.zero_config.reduce_bucket_size == 10


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: DeepSpeedConfig(zero_stage=0), "deepspeed.zero_stage"),
        (lambda: DeepSpeedConfig(gradient_clipping=-1.0), "deepspeed.gradient_clipping"),
        (lambda: OptimConfig(lr=-1.0), "optim.lr"),
        (lambda: OptimConfig(beta2=1.0), "optim.beta2"),
        (lambda: OptimConfig(min_lr_ratio=1.5), "optim.min_lr_ratio"),
        (lambda: FitConfig(max_steps=0), "fit.max_steps"),
        (lambda: FitConfig(max_steps=1, keep_checkpoints=1), "fit.keep_checkpoints"),
        (lambda: RunConfig(dir=""), "run.dir"),
        (lambda: RunConfig(dir="x", seed=-1), "run.seed"),
    ],
)
def test_bad_settings_are_named(make: object, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()  # type: ignore[operator]
    assert caught.value.key == key


def test_every_parameter_needs_exactly_one_group() -> None:
    model = nn.Linear(2, 2)
    weight, bias = model.named_parameters()

    def group(name: str, params: list, *, trainable: bool = True) -> ParamGroup:
        return ParamGroup(name, params, trainable, 1e-3, 0.0)

    cases = [
        ([group("a", [weight])], "bias"),
        ([group("a", [weight, bias]), group("b", [weight])], "weight"),
        ([group("a", [weight, bias]), group("b", [])], "b"),
        ([group("a", [weight, bias], trainable=False)], "a"),
    ]
    for groups, named in cases:
        with pytest.raises(ConfigError, match=named):
            build_engine(model, groups, OptimConfig(), DeepSpeedConfig())
