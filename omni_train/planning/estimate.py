"""The whole plan of a stage: settings in, everything that should be known before launch out.

    settings -> model (meta device) + traffic (indexes) -> Setup -> memory, step, run, reliability

Pure but for reading the tokenizer and the shards' indexes; no device is touched. The command that
prints it is launch/plan.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from omni_train.config.errors import ConfigError
from omni_train.data.config import DataConfig
from omni_train.data.tokenizer import load_tokenizer
from omni_train.models.presets import model_spec, resolve_config
from omni_train.planning.checks import Finding, check_plan
from omni_train.planning.constants import Constants, Hardware
from omni_train.planning.memory import Memory, estimate_memory
from omni_train.planning.model import ModelSizes, measure_model, model_settings, section
from omni_train.planning.reliability import Reliability, expect
from omni_train.planning.setup import (
    checkpointing,
    choose_recompute,
    first_knob,
    make_setup,
    sequence_parallel,
)
from omni_train.planning.shapes import Setup
from omni_train.planning.speed import StepTime, estimate_step
from omni_train.planning.traffic import Traffic, assume_traffic, measure_traffic

# Of the device's memory; what fragments and what is asked for in one piece.
MARGIN = 0.06
# fp32 master weights and both moments; frozen weights are written once (engine/checkpoint.py).
CHECKPOINT_BYTES_PER_TRAINED = 12.0
MFU_DEFINITION = (
    "2, 4 or 6 multiplications per matmul parameter and token (frozen, passed by gradients, "
    "trained; lm_head over every token), causal attention 6*L*d*s, encoders; nothing recomputed; "
    "over the device's dense bf16 peak"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is planned for.

    Args:
        devices, hardware: how many of what.
        price: of one device hour; None where no cost is asked for.
        mtbf_device_hours: device hours between failures.
        slowdown: of measured steps over their estimate; 1 where none is known.
    """

    devices: int
    hardware: Hardware
    price: float | None
    mtbf_device_hours: float
    slowdown: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """The whole run.

    Args:
        steps, tokens: global steps, and their tokens. by_modality: the same, split.
        hours: of training without interruption. device_hours: times devices.
        cost: None without a price.
        checkpoint_bytes: one checkpoint; weights that are frozen are written once, `frozen_bytes`.
        export_bytes: the exported model. save_s: seconds that a checkpoint takes.
    """

    steps: int
    tokens: float
    by_modality: dict[str, float]
    hours: float
    device_hours: float
    cost: float | None
    checkpoint_bytes: float
    frozen_bytes: float
    export_bytes: float
    save_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Supply:
    """Whether the data keep up.

    Args:
        cpu_s_per_device_s: CPU seconds of encoding for one second of a device.
        cores_needed: per node. cores: that it has. workers: configured per rank.
    """

    cpu_s_per_device_s: float
    cores_needed: float
    cores: int
    workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything; see the parts."""

    recipe: str
    options: Options
    model: ModelSizes
    traffic: Traffic
    setup: Setup
    memory: Memory
    fits: bool
    knob: str
    step: StepTime
    tokens_per_s: float
    mfu: float
    supply: Supply
    totals: Totals
    reliability: Reliability
    findings: list[Finding]


def plan_stage(
    recipe: str,
    values: Mapping[str, Any],
    options: Options,
    constants: Constants,
    *,
    root: Path,
    save_s: float | None = None,
) -> Plan:
    """Return the plan of a stage.

    Args:
        recipe, values: its name and its resolved settings; their paths start from `root`.
        options, constants: what it is planned for, and with.
        save_s: of a checkpoint, where it was measured.

    Raises:
        ConfigError, DataError: the settings describe no model, or the indexes cannot be read.
    """
    tokenizer, hardware = _tokenizer(values, root), options.hardware
    model = measure_model(recipe, values, tokenizer, root=root)
    groups = _groups(options.devices, sequence_parallel(values))
    traffic = _traffic(recipe, values, tokenizer, groups, root)
    setup = make_setup(values, model, traffic, devices=options.devices)

    def memory_of(variant: Setup) -> Memory:
        return estimate_memory(variant, constants, devices_per_node=hardware.devices_per_node)

    def fits(variant: Setup) -> bool:
        return memory_of(variant).total <= (1.0 - MARGIN) * hardware.memory_bytes

    if checkpointing(values) == "auto":
        setup = choose_recompute(setup, fits)
    step = _step(setup, traffic, options, constants)
    save_s = _save_seconds(model, options, constants) if save_s is None else save_s
    totals = _totals(values, model, traffic, step, options, save_s)
    plan = Plan(
        recipe=recipe,
        options=options,
        model=model,
        traffic=traffic,
        setup=setup,
        memory=memory_of(setup),
        fits=fits(setup),
        knob="" if fits(setup) else first_knob(setup, fits, model),
        step=step,
        tokens_per_s=totals.tokens / totals.steps / step.total / options.devices,
        mfu=step.model_flops / step.total / hardware.peak_flops,
        supply=_supply(values, traffic, step, options, constants),
        totals=totals,
        reliability=_fate(totals, options, constants),
        findings=[],
    )
    plan.findings.extend(check_plan(plan, values))
    return plan


def checkpoint_bytes(recipe: str, values: Mapping[str, Any], *, root: Path) -> tuple[float, float]:
    """Return the bytes of one checkpoint of a stage, and of the frozen weights written once.

    Args:
        recipe, values, root: as in `plan_stage`.
    """
    model = measure_model(recipe, values, _tokenizer(values, root), root=root)
    return CHECKPOINT_BYTES_PER_TRAINED * model.trained_parameters, _frozen_bytes(values, model)


def _tokenizer(values: Mapping[str, Any], root: Path) -> PreTrainedTokenizerFast | None:
    path = root / str(values["model"]["tokenizer"])
    return load_tokenizer(path) if (path / "tokenizer.json").is_file() else None


def _groups(devices: int, sp: int) -> int:
    """Groups of devices that share their packs."""
    if devices % sp:
        raise ConfigError(
            key="--devices",
            value=devices,
            rule=f"each group of {sp} devices shares its packs (sequence parallelism)",
            remedy=f"use a multiple of {sp}",
        )
    return devices // sp


def _traffic(
    recipe: str,
    values: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerFast | None,
    ranks: int,
    root: Path,
) -> Traffic:
    data: DataConfig = section(DataConfig, values["data"])
    for source in data.sources.values():
        if "://" not in source.path:
            source.path = str(root / source.path)
    readable = all(
        "://" in source.path or (Path(source.path) / "manifest.json").is_file()
        for source in data.sources.values()
    )
    # A Talker's loader also needs codes and its own budgets; those packs are assumed.
    if not readable or tokenizer is None or recipe.startswith("talker"):
        return assume_traffic(recipe, data)
    config = resolve_config(model_settings(values, root), tokenizer)
    spec = model_spec(config.thinker_config, tokenizer)
    return measure_traffic(data, tokenizer, spec, ranks=ranks, seed=int(values["run"]["seed"]))


def _step(setup: Setup, traffic: Traffic, options: Options, constants: Constants) -> StepTime:
    return estimate_step(
        setup,
        options.hardware,
        constants,
        imbalance=traffic.imbalance,
        slowdown=options.slowdown,
    )


def _save_seconds(model: ModelSizes, options: Options, constants: Constants) -> float:
    nodes = -(-options.devices // options.hardware.devices_per_node)
    written = CHECKPOINT_BYTES_PER_TRAINED * model.trained_parameters
    return written / nodes / constants.checkpoint_bytes_per_s


def _fate(totals: Totals, options: Options, constants: Constants) -> Reliability:
    return expect(
        hours=totals.hours,
        devices=options.devices,
        mtbf_device_hours=options.mtbf_device_hours,
        save_s=totals.save_s,
        restart_s=constants.restart_s,
    )


def _totals(
    values: Mapping[str, Any],
    model: ModelSizes,
    traffic: Traffic,
    step: StepTime,
    options: Options,
    save_s: float,
) -> Totals:
    tokens = traffic.tokens * traffic.packs_per_step
    steps, budget = int(values["fit"]["max_steps"]), values["data"]["budget_tokens"]
    if budget is not None:
        steps = min(steps, math.ceil(int(budget) / tokens))
    hours = steps * step.total / 3600.0
    hours += steps // int(values["fit"]["save_steps"]) * save_s / 3600.0
    device_hours = hours * options.devices
    return Totals(
        steps=steps,
        tokens=steps * tokens,
        by_modality={name: share * steps * tokens for name, share in traffic.shares.items()},
        hours=hours,
        device_hours=device_hours,
        cost=None if options.price is None else options.price * device_hours,
        checkpoint_bytes=CHECKPOINT_BYTES_PER_TRAINED * model.trained_parameters,
        frozen_bytes=_frozen_bytes(values, model),
        export_bytes=2.0 * model.parameters,
        save_s=save_s,
    )


def _frozen_bytes(values: Mapping[str, Any], model: ModelSizes) -> float:
    value = 2 if values["deepspeed"]["precision"] == "bf16" else 4
    return float(value * (model.parameters - model.trained_parameters))


def _supply(
    values: Mapping[str, Any],
    traffic: Traffic,
    step: StepTime,
    options: Options,
    constants: Constants,
) -> Supply:
    cpu_s = traffic.patches * constants.vision_encode_s_per_patch
    cpu_s += traffic.frames * constants.audio_encode_s_per_frame
    per_device = cpu_s * traffic.packs_per_step / options.devices / step.total
    hardware = options.hardware
    return Supply(
        cpu_s_per_device_s=per_device,
        cores_needed=per_device * min(options.devices, hardware.devices_per_node),
        cores=hardware.cores_per_node,
        workers=int(values["data"]["num_workers"]),
    )
