"""Activation checkpointing: which layers keep only their input and run again in the backward pass.

Works on transformers' `GradientCheckpointingLayer`s, the layers of the language models and of the
towers. Checkpoints are reentrant: under ZeRO-3 a layer's weights are then gathered again by the
same hooks as in the forward pass. Every rank decides the same, or its gathers would be others.

Letters: t tokens of a rank's pack.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from omni_train.engine.distributed import World, gather_json

# What a layer keeps without checkpointing, over the inputs and outputs of its matrix products:
# norms in fp32 and the parts of the gated product come on top (measured in the tests).
KEPT_PER_PRODUCT_VALUE = 1.3
# Of the free memory; the rest is for buckets, gathered weights and what fragments.
USABLE_SHARE = 0.8


class Checkpointing(Enum):
    """Which layers run twice.

    none: no layer. selective: every second one. full: every one. auto: the first of these whose
    activations fit the memory that is free once weights and optimiser are there.
    """

    none = "none"
    selective = "selective"
    full = "full"
    auto = "auto"


POLICIES = (Checkpointing.none, Checkpointing.selective, Checkpointing.full)


def checkpoint_layers(model: nn.Module, policy: Checkpointing, *, offload: bool) -> int:
    """Set which layers of `model` are checkpointed; return how many.

    Args:
        model: its stacks of layers are taken one by one, so that each has its share.
        policy: not `auto`.
        offload: keep the layers' inputs in pinned host memory.
    """
    every = {Checkpointing.none: 0, Checkpointing.selective: 2, Checkpointing.full: 1}[policy]
    count = 0
    for layers in _stacks(model).values():
        for number, layer in enumerate(layers):
            # The last of each pair: its neighbour's activations come and go first.
            on = bool(every) and number % every == every - 1
            layer.gradient_checkpointing = on
            layer._gradient_checkpointing_func = partial(_run_twice, offload)
            count += on
    return count


def choose(
    model: nn.Module, *, pack_tokens: int, value_bytes: int, free_bytes: int
) -> Checkpointing:
    """Return the policy that does the least again and fits; `full` where none does.

    Args:
        model: with its layers, and `units_per_token` where some are no tokens.
        pack_tokens: t at most.
        value_bytes: of an activation.
        free_bytes: of the device, once all that stays is there.
    """
    for policy in POLICIES:
        if activation_bytes(model, policy, pack_tokens, value_bytes) <= USABLE_SHARE * free_bytes:
            return policy
    return Checkpointing.full


def activation_bytes(
    model: nn.Module, policy: Checkpointing, pack_tokens: int, value_bytes: int
) -> int:
    """Estimate what the layers keep for the backward pass of the fullest pack.

    The language model's tokens, and for the towers the kind of media that takes most if all tokens
    are of it; plus the one layer that is being run again.

    Args:
        model, pack_tokens, value_bytes: as in `choose`.
        policy: not `auto`.
    """
    units: dict[str, int] = getattr(model, "units_per_token", {})
    own, towers, working = 0.0, [0.0], [0.0]
    for name, layers in _stacks(model).items():
        per_token = units.get(name, 1)
        kept = 0.0
        for number, layer in enumerate(layers):
            whole = _kept_values(layer)
            again = policy is Checkpointing.full
            again |= policy is Checkpointing.selective and number % 2 == 1
            kept += _width(layer) if again else whole
            working.append(per_token * whole)
        if name in units:
            towers.append(per_token * kept)
        else:
            own += kept
    return round((own + max(towers) + max(working)) * pack_tokens * value_bytes)


def free_memory(world: World) -> int:
    """Return the bytes that are free for this rank: of its device, or its share of the host's."""
    if world.device.type == "cuda":
        free: int = torch.cuda.mem_get_info(world.device)[0]
        # What torch has reserved and not handed out is free too.
        cached = torch.cuda.memory_reserved(world.device)
        return free + cached - torch.cuda.memory_allocated(world.device)
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 // world.size
    raise AssertionError("the kernel does not say how much memory is available")


def agreed_policy(policy: Checkpointing) -> Checkpointing:
    """Return the policy of the rank that has to do most again; all ranks must call."""
    numbers: list[int] = gather_json(POLICIES.index(policy))
    return POLICIES[max(numbers)]


def _stacks(model: nn.Module) -> dict[str, list[GradientCheckpointingLayer]]:
    """Layers by the name of the list that holds them."""
    found: dict[str, list[GradientCheckpointingLayer]] = {}
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            found.setdefault(name.rpartition(".")[0], []).append(module)
    return found


def _linears(layer: nn.Module) -> list[nn.Linear]:
    return [module for module in layer.modules() if isinstance(module, nn.Linear)]


def _kept_values(layer: nn.Module) -> float:
    sizes = [linear.in_features + linear.out_features for linear in _linears(layer)]
    return KEPT_PER_PRODUCT_VALUE * sum(sizes)


def _width(layer: nn.Module) -> int:
    return min(linear.in_features for linear in _linears(layer))


def _run_twice(offload: bool, function: Callable[..., Any], *args: Any) -> Any:
    """Run a layer so that only its input is kept; where nothing needs a gradient, just run it."""
    if not any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
        return function(*args)
    # No layer draws random numbers in training, so none are kept for the second run.
    run = partial(checkpoint, function, *args, use_reentrant=True, preserve_rng_state=False)
    if not offload:
        return run()
    with saved_tensors_hooks(_to_host, _from_host):
        return run()


def _to_host(kept: Tensor) -> tuple[torch.device, Tensor]:
    """Copy to pinned memory without waiting; the stream's order keeps it right."""
    pinned = torch.empty(kept.shape, dtype=kept.dtype, pin_memory=kept.is_cuda)
    pinned.copy_(kept, non_blocking=True)
    return kept.device, pinned


def _from_host(packed: tuple[torch.device, Tensor]) -> Tensor:
    device, pinned = packed
    return pinned.to(device, non_blocking=True)
