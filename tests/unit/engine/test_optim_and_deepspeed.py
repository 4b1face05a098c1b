"""Learning-rate schedule, setting rules, and that DeepSpeed knows every key we give it."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from omni_train.config.errors import ConfigError
from omni_train.engine.deepspeed import (
    DeepSpeedConfig,
    Engine,
    Precision,
    build_engine,
    deepspeed_json,
    optimizer_groups,
)
from omni_train.engine.distributed import prepare_environment
from omni_train.engine.fit_config import FitConfig
from omni_train.engine.groups import ParamGroup
from omni_train.engine.optim import GroupConfig, OptimConfig, Schedule, curve_of
from omni_train.engine.run import RunConfig


def factors(config: OptimConfig, max_steps: int, group: str = "") -> list[float]:
    curve = curve_of(config, group)
    return [curve.factor(step=step, max_steps=max_steps) for step in range(max_steps + 1)]


def test_cosine_warms_up_and_ends_at_its_floor() -> None:
    got = factors(OptimConfig(warmup_steps=4, min_lr_ratio=0.2), 24)
    assert got[:4] == [0.25, 0.5, 0.75, 1.0]
    assert got[14] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert got[24] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(got[4:]))
    assert set(factors(OptimConfig(schedule=Schedule.constant), 100)) == {1.0}


def test_wsd_is_flat_and_then_falls_in_a_line() -> None:
    config = OptimConfig(warmup_steps=4, schedule=Schedule.wsd, min_lr_ratio=0.2, decay_share=0.25)
    got = factors(config, 40)
    assert got[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(got[4:31]) == {1.0}
    assert got[35] == pytest.approx(0.6)
    assert got[40] == pytest.approx(0.2)
    # A warm-up that reaches into the decay goes first.
    late = OptimConfig(warmup_steps=9, schedule=Schedule.wsd, min_lr_ratio=0.0, decay_share=0.5)
    assert factors(late, 10)[8:] == [1.0, 1.0, 0.0]


def test_a_group_has_its_own_rate_decay_warm_up_and_schedule() -> None:
    own = GroupConfig(warmup_steps=2, schedule=Schedule.wsd, decay_share=0.5, min_lr_ratio=0.0)
    config = OptimConfig(warmup_steps=4, schedule=Schedule.constant, groups={"head": own})
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})

    def group(name: str, scales: dict[str, float]) -> ParamGroup:
        params = [(f"{name}.{key}", p) for key, p in model[name].named_parameters()]
        return ParamGroup(name, params, True, 1.0, 0.1, curve_of(config, name), scales)

    groups = [group("body", {}), group("head", {"head.weight": 0.5})]
    adamw = torch.optim.AdamW(optimizer_groups(groups))
    engine = Engine(
        model=SimpleNamespace(optimizer=SimpleNamespace(optimizer=adamw)),
        groups=groups,
        optim=config,
    )
    assert engine.set_lr(step=1, max_steps=8) == {"body": 0.5, "head": 1.0}
    assert engine.set_lr(step=6, max_steps=8) == {"body": 1.0, "head": 0.5}
    rates = {id(p): g["lr"] for g in adamw.param_groups for p in g["params"]}
    assert rates == {
        id(model["body"].weight): 1.0,
        id(model["body"].bias): 1.0,
        id(model["head"].weight): 0.25,
        id(model["head"].bias): 0.5,
    }
    assert {g["weight_decay"] for g in adamw.param_groups} == {0.1}


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
        (lambda: OptimConfig(decay_share=0.0), "optim.decay_share"),
        (lambda: GroupConfig(lr=-1.0), "optim.groups.*.lr"),
        (lambda: GroupConfig(layer_decay=1.1), "optim.groups.*.layer_decay"),
        (lambda: GroupConfig(warmup_steps=-1), "optim.groups.*.warmup_steps"),
        (lambda: FitConfig(max_steps=0), "fit.max_steps"),
        (lambda: FitConfig(max_steps=1, keep_checkpoints=1), "fit.keep_checkpoints"),
        (lambda: FitConfig(max_steps=1, milestone_steps=750), "fit.milestone_steps"),
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
