"""This rank's piece of every parameter: fp32 master weights, moments, gradients, frozen weights.

One place that knows how DeepSpeed lays out ZeRO 1, 2 and 3. A piece is a flat range
[start, stop) of one parameter; over ranks the pieces of a parameter cover it exactly once, the
padding that DeepSpeed adds is never part of them.

Written against DeepSpeed 0.19.8; the pins hold that version and `tests/numerics` would notice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omni_train.config.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Piece:
    """Flat range [start, stop) of one parameter."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Elements of the range, 0 where this rank owns none of the parameter."""
        return self.stop - self.start


def is_partitioned(param: nn.Parameter) -> bool:
    """Return whether ZeRO-3 holds the parameter."""
    return hasattr(param, "ds_id")


def check_whole(model: nn.Module, *, each: str) -> None:
    """Refuse a ZeRO-3 model where it is run over and over.

    Args:
        model: to be run.
        each: what one run gives, such as `token`.

    Raises:
        ConfigError: it is one.
    """
    if any(is_partitioned(param) for param in model.parameters()):
        raise ConfigError(
            key="model",
            value="a ZeRO-3 model",
            rule=f"decoding would gather all weights for every {each}",
            remedy="gather the weights into a plain replica first",
        )


def full_shape(param: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of the whole parameter, partitioned or not."""
    return tuple(getattr(param, "ds_shape", param.shape))


def piece_of(param: nn.Parameter, *, rank: int, world_size: int) -> Piece:
    """Return the range of `param` that `rank` owns."""
    holder: Any = param
    if is_partitioned(param):
        numel, width = int(holder.ds_numel), int(holder.partition_numel())
    elif param.requires_grad:
        mapping = holder._hp_mapping
        if mapping is None:
            return Piece(0, 0)
        address = mapping.lp_fragment_address
        return Piece(int(address.start), int(address.start + address.numel))
    else:
        numel, width = param.numel(), -(-param.numel() // world_size)
    start = min(rank * width, numel)
    return Piece(start, min(start + width, numel))


def master(param: nn.Parameter, piece: Piece) -> Tensor:
    """Return the fp32 weights of a trained parameter: [piece.length], a view where possible."""
    return _optimizer_tensor(param, piece, None)


def moment(param: nn.Parameter, piece: Piece, key: str) -> Tensor:
    """Return `exp_avg` or `exp_avg_sq` of a trained parameter: fp32 [piece.length]."""
    return _optimizer_tensor(param, piece, key)


def _optimizer_tensor(param: nn.Parameter, piece: Piece, key: str | None) -> Tensor:
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    holder: Any = param
    tensor: Tensor
    if not is_partitioned(param):
        tensor = holder._hp_mapping.get_hp_fragment(key)
    elif key is None:
        tensor = safe_get_local_fp32_param(param)
    else:
        tensor = safe_get_local_optimizer_state(param, key)
    return tensor.detach().narrow(0, 0, piece.length)


def gradient(param: nn.Parameter, piece: Piece) -> Tensor:
    """Return the averaged gradient between backward and update: [piece.length]."""
    from deepspeed.utils import safe_get_local_grad

    holder: Any = param
    if is_partitioned(param):
        local: Tensor = safe_get_local_grad(param)
        return local.narrow(0, 0, piece.length)
    flat = holder._hp_mapping.get_lp_grad_fragment(holder._index_in_param_group).flatten()
    # ZeRO-1 with bf16 keeps the whole accumulated gradient on every rank.
    offset = piece.start if flat.numel() == param.numel() else 0
    return flat.narrow(0, offset, piece.length)


def frozen(param: nn.Parameter, piece: Piece) -> Tensor:
    """Return a frozen parameter's weights in the dtype it is kept in: [piece.length]."""
    holder: Any = param
    if is_partitioned(param):
        local: Tensor = holder.ds_tensor
        return local.detach().narrow(0, 0, piece.length)
    return param.detach().flatten().narrow(0, piece.start, piece.length)


def write_trained(param: nn.Parameter, piece: Piece, values: dict[str, Tensor]) -> None:
    """Set `master`, `exp_avg` and `exp_avg_sq` of this rank's piece; `publish` must follow."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    holder: Any = param
    if not is_partitioned(param):
        master(param, piece).copy_(values["master"])
        for key in MOMENTS:
            moment(param, piece, key).copy_(values[key])
        return
    width = int(holder.partition_numel())
    safe_set_local_fp32_param(param, _padded(values["master"], width))
    for key in MOMENTS:
        safe_set_local_optimizer_state(param, _padded(values[key], width), key)
    # The optimiser writes the low-precision partition only after an update.
    holder.ds_tensor.data.narrow(0, 0, piece.length).copy_(values["master"])


def write_frozen(param: nn.Parameter, piece: Piece, values: Tensor) -> None:
    """Set this rank's piece of a frozen parameter, or all of it where each rank keeps it whole."""
    holder: Any = param
    if is_partitioned(param):
        holder.ds_tensor.data.narrow(0, 0, piece.length).copy_(values)
    else:
        param.data.copy_(values.view(param.shape))


def _padded(values: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.numel()))


def release_gathered(model: Any) -> None:
    """Drop gathered ZeRO-3 weights before pieces are written, so that none of them is stale."""
    if hasattr(model.optimizer, "empty_partition_cache"):
        model.optimizer.empty_partition_cache()


def publish(model: Any) -> None:
    """Bring written master weights into the weights that the forward pass uses, on all ranks."""
    if hasattr(model.optimizer, "update_lp_params"):
        model.optimizer.update_lp_params()
    else:
        model.optimizer.checkpoint_event_epilogue()


def flat_partitions(model: Any) -> list[tuple[str, Tensor]]:
    """Return (group name, flat fp32 tensor) for all tensors that the inner optimiser steps."""
    optimizer = model.optimizer
    groups = optimizer.optimizer.param_groups
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        owners = optimizer.sub_group_to_group_id
        return [
            (groups[owners[i]]["name"], flat)
            for i, flat in enumerate(optimizer.fp32_partitioned_groups_flat)
        ]
    return [(group["name"], flat) for group in groups for flat in group["params"]]


def create_optimizer_state(model: Any) -> None:
    """Give AdamW its zero moments at once; otherwise they exist only after the first update."""
    state = model.optimizer.optimizer.state
    for _, flat in flat_partitions(model):
        if not state[flat]:
            state[flat]["step"] = torch.zeros((), dtype=torch.float32)
            for key in MOMENTS:
                state[flat][key] = torch.zeros_like(flat)
    if hasattr(model.optimizer, "_lazy_init_hp_params_optimizer_state"):
        model.optimizer._lazy_init_hp_params_optimizer_state()


def optimizer_steps(model: Any) -> dict[str, int]:
    """Return the number of updates of each trained group."""
    state = model.optimizer.optimizer.state
    return {name: int(state[flat]["step"].item()) for name, flat in flat_partitions(model)}


def set_optimizer_steps(model: Any, steps: dict[str, int]) -> None:
    """Set the number of updates of each trained group (AdamW's bias correction reads it)."""
    state = model.optimizer.optimizer.state
    for name, flat in flat_partitions(model):
        state[flat]["step"].fill_(float(steps[name]))


def discard_gradients(model: Any) -> None:
    """Forget the gradients of this global step; weights, moments and step counts stay.

    DeepSpeed has the same clean-up for its own overflow check, but offers it nowhere alone.
    """
    optimizer = model.optimizer
    if hasattr(optimizer, "clear_hp_grads"):
        optimizer.clear_hp_grads()
        optimizer.clear_lp_grads(set_to_none=True)
        return
    optimizer.zero_grad(set_to_none=True)
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer._pre_step()
        optimizer.averaged_gradients = {}
        # A partition that no gradient reaches next time must not keep what is discarded here.
        optimizer.grad_partitions_flat_buffer.zero_()
        return
    optimizer.micro_step_id = -1
    optimizer._release_preflattened_grad_buffers()
    for index in optimizer.averaged_gradients:
        optimizer.averaged_gradients[index] = None
        optimizer.all_grad_tensors[index] = None
