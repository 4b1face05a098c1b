"""Seconds of one global step, part by part.

    matmul      (2 | 4 | 6) P t, and what is recomputed of it, at the device's achievable rate
    attention   6 L d_q * sum(len^2) / SP for training, per document, not per pack
    encoders    (2 | 6) P_encoder * units
    gathers     ZeRO-3: all weights twice, trained gradients once, over the slowest link
    exchange    Ulysses: all-to-all of queries, keys, values and outputs, forward and backward
    micro-step  sqrt(compute^2 + gathers^2) + exchange
    step        micro-steps * micro-step * imbalance

The square root is what overlap of compute and gathers comes to: all ten rows of VeOmni lie within
6 % of it, while the larger of the two plus a tenth of the smaller is 16 % off where they are alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from omni_train.planning.constants import Constants, Hardware
from omni_train.planning.shapes import TOWER_SHARES, DecoderLoad, Recompute, Setup


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of a global step.

    Args:
        matmul, attention, encoders: of compute.
        exposed: what gathers and reductions add to it.
        exchange: of sequence parallelism.
        waiting: for ranks with more work; part of `total`.
        gathers: of communication if nothing hid it; not part of `total`.
        model_flops: of one device, nothing recomputed counted, the head over all tokens.
    """

    matmul: float
    attention: float
    encoders: float
    exposed: float
    exchange: float
    waiting: float
    gathers: float
    model_flops: float

    @property
    def total(self) -> float:
        """Seconds of a global step."""
        busy = self.matmul + self.attention + self.encoders
        return busy + self.exposed + self.exchange + self.waiting


def estimate_step(
    setup: Setup,
    hardware: Hardware,
    constants: Constants,
    *,
    imbalance: float = 1.0,
    slowdown: float = 1.0,
) -> StepTime:
    """Return the time of a global step.

    Args:
        setup: the run.
        hardware: its machines.
        constants: fitted.
        imbalance: the slowest rank's work over the mean.
        slowdown: what a measured step of this code took over its estimate; 1 where none is known.
    """
    rate = constants.matmul_efficiency * hardware.matmul_flops
    attention_rate = constants.attention_efficiency * hardware.matmul_flops
    sp = setup.sequence_parallel
    matmul = attention = model = 0.0
    for load in setup.decoders:
        flops, again = _matmul_flops(load, setup.recompute, constants)
        pairs, pairs_again = _attention_flops(load, setup.recompute)
        matmul += (flops + again) / sp / rate
        attention += (pairs + pairs_again) / sp / attention_rate
        whole = load.flops_per_parameter * load.shape.matmul_parameters * load.tokens
        model += (whole + pairs) / sp
    encoders = 0.0
    for tower in setup.encoders:
        once = tower.parameters * tower.units
        again = constants.recompute_flops * once * TOWER_SHARES[setup.recompute] * tower.trained
        encoders += ((2 + 4 * tower.trained) * once + again) / rate
        model += (2 + 4 * tower.trained) * once
    compute = matmul + attention + encoders
    gathers = _gather_seconds(setup, hardware, constants)
    exchange = _exchange_seconds(setup, hardware, constants)
    exposed = math.hypot(compute, gathers) - compute
    factor = setup.micro_steps * slowdown
    return StepTime(
        matmul=matmul * factor,
        attention=attention * factor,
        encoders=encoders * factor,
        exposed=exposed * factor,
        exchange=exchange * factor,
        waiting=(imbalance - 1.0) * (compute + exposed + exchange) * factor,
        gathers=gathers * factor,
        model_flops=model * setup.micro_steps,
    )


def _matmul_flops(
    load: DecoderLoad, recompute: Recompute, constants: Constants
) -> tuple[float, float]:
    """Products of training, and those done again."""
    layers = load.shape.layers * load.shape.layer_parameters
    head = load.shape.matmul_parameters - layers
    flops = load.flops_per_parameter * (layers * load.tokens + head * load.loss_tokens)
    if not load.gradients:
        return flops, 0.0
    share = load.shape.recomputed_share(recompute)
    # The rows behind `recompute_flops` count the head among what full checkpointing repeats.
    repeated = load.shape.matmul_parameters if recompute is Recompute.full else layers
    return flops, constants.recompute_flops * share * repeated * load.tokens


def _attention_flops(load: DecoderLoad, recompute: Recompute) -> tuple[float, float]:
    forward = 2.0 * load.shape.layers * load.shape.query_width * load.pairs
    if not load.gradients:
        return forward, 0.0
    again = {Recompute.full: 1.0, Recompute.selective: 0.5}.get(recompute, 0.0)
    return 3.0 * forward, again * forward


def _gather_seconds(setup: Setup, hardware: Hardware, constants: Constants) -> float:
    """Communication of one micro-step if nothing overlapped it."""
    if setup.devices == 1:
        return 0.0
    if setup.devices <= hardware.devices_per_node:
        bandwidth = constants.link_efficiency * hardware.link_bytes_per_s
    else:
        # All network cards of a node take part, so the ring sees the node's total.
        node = hardware.network_bytes_per_s * hardware.devices_per_node
        bandwidth = constants.network_efficiency * node
    value, trained = setup.bytes_per_value, setup.trained_parameters
    if setup.zero_stage == 3:
        moved = value * (2 * setup.parameters + trained)
    else:
        moved = value * trained * (1 + 1 / setup.micro_steps)
    layers = sum(load.shape.layers for load in setup.decoders)
    latency = 3 * layers * setup.devices * constants.collective_latency_s
    return moved / bandwidth + latency


def _exchange_seconds(setup: Setup, hardware: Hardware, constants: Constants) -> float:
    sp = setup.sequence_parallel
    if sp == 1:
        return 0.0
    seconds = 0.0
    for load in setup.decoders:
        widths = 2 * load.shape.query_width + 2 * load.shape.kv_width
        moved = 4 * load.shape.layers * load.tokens / sp * widths * setup.bytes_per_value
        seconds += moved * (sp - 1) / sp / (constants.link_efficiency * hardware.link_bytes_per_s)
    return seconds
