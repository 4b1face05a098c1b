"""From settings, model and traffic to the `Setup` that the estimates take, and its variants."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from omni_train.planning.model import ModelSizes, TowerShape
from omni_train.planning.shapes import DecoderLoad, EncoderLoad, Recompute, Setup
from omni_train.planning.traffic import ASSUMED_DOCUMENT, ASSUMED_FILL, Traffic

Fits = Callable[[Setup], bool]
_ENCODER_GROUPS = {
    "vision": ("vision_encoder", "vision_merger"),
    "audio": ("audio_encoder", "audio_projection"),
}


def sequence_parallel(values: Mapping[str, Any]) -> int:
    """Return how many ranks share a pack; 1 where a stage has no such setting."""
    return int(values["deepspeed"].get("sequence_parallel", 1))


def checkpointing(values: Mapping[str, Any]) -> str:
    """Return the policy of activation checkpointing; `none` where a stage has no such setting."""
    return str(values["deepspeed"].get("activation_checkpointing", "none"))


def make_setup(
    values: Mapping[str, Any], model: ModelSizes, traffic: Traffic, *, devices: int
) -> Setup:
    """Return the run as the estimates see it; policy `auto` starts as none."""
    engine = values["deepspeed"]
    policy = checkpointing(values)
    sp = sequence_parallel(values)
    decoders = []
    if model.thinker is not None:
        decoders.append(_thinker(model, traffic))
    if model.talker is not None:
        decoders.append(_talker(values, model))
    # What is trained sets the pace and is named first.
    decoders.sort(key=lambda load: not load.gradients)
    return Setup(
        decoders=tuple(decoders),
        encoders=_encoders(model, traffic),
        parameters=model.parameters,
        trained_parameters=model.trained_parameters,
        largest_tensor=model.largest_tensor,
        devices=devices,
        sequence_parallel=sp,
        micro_steps=max(1, -(-round(traffic.packs_per_step) // (devices // sp))),
        zero_stage=int(engine["zero_stage"]),
        bytes_per_value=2 if engine["precision"] == "bf16" else 4,
        recompute=Recompute.none if policy == "auto" else Recompute(policy),
        offload_activations=bool(engine.get("offload_activations", False)),
    )


def _thinker(model: ModelSizes, traffic: Traffic) -> DecoderLoad:
    assert model.thinker is not None
    # Every group of the Thinker but its head lies before or in the decoder.
    before = ("audio_encoder", "audio_projection", "vision_encoder", "vision_merger", "llm")
    return DecoderLoad(
        shape=model.thinker,
        tokens=traffic.tokens,
        pairs=traffic.pairs,
        gradients=any(model.trains(name) for name in before),
        trained=model.trains("llm"),
        loss_tokens=traffic.tokens * traffic.supervised,
    )


def _talker(values: Mapping[str, Any], model: ModelSizes) -> DecoderLoad:
    assert model.talker is not None
    positions = ASSUMED_FILL * float(values["data"]["pack_positions"])
    return DecoderLoad(
        shape=model.talker,
        tokens=positions,
        pairs=positions * min(ASSUMED_DOCUMENT, positions),
        gradients=True,
        trained=model.trains("talker"),
        loss_tokens=positions,
    )


def _encoders(model: ModelSizes, traffic: Traffic) -> tuple[EncoderLoad, ...]:
    towers: tuple[tuple[str, TowerShape | None, float, float], ...] = (
        ("vision", model.vision, traffic.patches, traffic.peak_patches),
        ("audio", model.audio, traffic.frames, traffic.peak_frames),
    )
    return tuple(
        EncoderLoad(
            name=name,
            parameters=tower.parameters,
            units=units,
            peak_units=peak,
            layers=tower.layers,
            width=tower.width,
            ffn=tower.ffn,
            trained=model.trains(_ENCODER_GROUPS[name][0]),
        )
        for name, tower, units, peak in towers
        if tower is not None
    )


def choose_recompute(setup: Setup, fits: Fits) -> Setup:
    """Return the setup with the policy that does the least again and still fits; else with full."""
    for policy in (Recompute.none, Recompute.selective):
        chosen = dataclasses.replace(setup, recompute=policy)
        if fits(chosen):
            return chosen
    return dataclasses.replace(setup, recompute=Recompute.full)


def first_knob(setup: Setup, fits: Fits, model: ModelSizes) -> str:
    """Return the first change, cheapest in speed first, that makes a setup fit."""
    full = dataclasses.replace(setup, recompute=Recompute.full)
    knobs: list[tuple[str, Setup]] = []
    if setup.zero_stage != 3:
        knobs.append(("deepspeed.zero_stage=3", dataclasses.replace(setup, zero_stage=3)))
        full = dataclasses.replace(full, zero_stage=3)
    if setup.recompute is not Recompute.full:
        selective = dataclasses.replace(full, recompute=Recompute.selective)
        knobs += [("deepspeed.activation_checkpointing=selective", selective)]
        knobs += [("deepspeed.activation_checkpointing=full", full)]
    offloaded = dataclasses.replace(full, offload_activations=True)
    knobs.append(("full checkpointing and deepspeed.offload_activations=true", offloaded))
    for size in (2, 4):
        divides = all(heads % size == 0 and kv % size == 0 for heads, kv in model.heads.values())
        if size > setup.sequence_parallel and divides and setup.devices % size == 0:
            shared = dataclasses.replace(full, sequence_parallel=size)
            knobs.append((f"full checkpointing and deepspeed.sequence_parallel={size}", shared))
    knobs += [
        (f"full checkpointing and {times} times the devices", _more(full, times))
        for times in (2, 4, 8)
    ]
    for name, changed in knobs:
        if fits(changed):
            return name
    return "shorter packs (data.pack_tokens), or devices with more memory"


def _more(setup: Setup, times: int) -> Setup:
    return dataclasses.replace(setup, devices=times * setup.devices)
