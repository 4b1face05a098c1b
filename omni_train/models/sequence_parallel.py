"""Several ranks run one pack: the language model over a part of it each, attention over all of it.

Ulysses, by DeepSpeed: before attention the ranks of a group trade tokens for heads, and back after
it (arXiv 2309.14509); everything else is done token by token. The towers' embeddings go from the
rank that made them to those that hold their tokens. Gradients need nothing more: each rank's loss
is the sum over its own targets, and the mean over all ranks, which ZeRO takes, is that of any other
split of the tokens. Which tokens and media a rank has is decided in `omni_train.data.sequence`.

Letters: T tokens of a rank, M embeddings, H hidden size, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniTextConfig

from omni_train.config.errors import ConfigError
from omni_train.data.types import Exchange, SequencePlace
from omni_train.engine.deepspeed import import_deepspeed
from omni_train.engine.distributed import get_world
from omni_train.models.attention import segment_attention

_GROUPS: dict[int, dist.ProcessGroup] = {}


@dataclass(frozen=True, slots=True)
class SequenceParallel:
    """A group of ranks that share packs.

    Args:
        place: of this rank in it.
        group: its process group.
        attention: DeepSpeed's attention over the tokens of the group, in transformers' form.
    """

    place: SequencePlace
    group: dist.ProcessGroup
    attention: nn.Module

    def exchange(self, features: Tensor, rows: Exchange) -> Tensor:
        """Return the embeddings [M, H] of this rank's tokens, in their order.

        Args:
            features: [M', H], what this rank made; rows that nobody takes come last.
            rows: how many go where.
        """
        sent = features[: sum(rows.send)].contiguous()
        exchanged: Tensor = _Exchange.apply(sent, rows.send, rows.receive, self.group)
        return exchanged


class _Exchange(Function):
    """All-to-all of rows; the gradient goes the same ways back."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        """Return the received rows of a contiguous [sum(send), H]."""
        ctx.send, ctx.receive, ctx.group = send, receive, group
        received = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(received, rows, list(receive), list(send), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the rows that were sent."""
        grad = grads[0].contiguous()
        returned = grad.new_empty(sum(ctx.send), grad.shape[1])
        dist.all_to_all_single(returned, grad, list(ctx.send), list(ctx.receive), group=ctx.group)
        return returned, None, None, None


def check_sequence_parallel(
    size: int, *, world_size: int, num_heads: int, num_key_value_heads: int
) -> None:
    """Refuse a number of ranks per pack that does not go with the world or with the heads.

    Raises:
        ConfigError: see above.
    """
    fits = [
        n
        for n in range(1, num_heads + 1)
        if num_heads % n == 0 and (num_key_value_heads % n == 0 or n % num_key_value_heads == 0)
    ]
    if size not in fits:
        raise ConfigError(
            key="deepspeed.sequence_parallel",
            value=size,
            rule=f"it must divide the {num_heads} query heads, and divide the "
            f"{num_key_value_heads} key and value heads or be a multiple of them",
            remedy=f"use one of {fits}",
        )
    if world_size % size:
        raise ConfigError(
            key="deepspeed.sequence_parallel",
            value=size,
            rule=f"the {world_size} ranks are shared out in groups of this size",
            remedy="use a divisor of the number of ranks",
        )


def refuse_sequence_parallel(size: int, *, stage: str) -> None:
    """Refuse what a stage has no use for.

    Raises:
        ConfigError: `size` is not 1.
    """
    if size != 1:
        raise ConfigError(
            key="deepspeed.sequence_parallel",
            value=size,
            rule=f"{stage} has no packs that ranks could share",
            remedy="leave it out",
        )


def start_sequence_parallel(size: int, config: Qwen2_5OmniTextConfig) -> SequenceParallel | None:
    """Make this rank's group of `size` neighbouring ranks; None for 1. All ranks must call.

    Args:
        size: as `check_sequence_parallel` lets it pass.
        config: of the language model.
    """
    if size == 1:
        return None
    world = get_world()
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    if size not in _GROUPS:
        for first in range(0, world.size, size):
            group = dist.new_group(list(range(first, first + size)))
            if first <= world.rank < first + size:
                _GROUPS[size] = group
    attention = UlyssesSPAttentionHF(
        attn=segment_attention,
        batch_size=1,
        attn_head_count=config.num_attention_heads,
        attn_head_size=config.hidden_size // config.num_attention_heads,
        kv_head_count=config.num_key_value_heads,
        num_hidden_layers=config.num_hidden_layers,
        process_group=_GROUPS[size],
        seq_length_is_variable=True,
    )
    place = SequencePlace(rank=world.rank % size, size=size)
    return SequenceParallel(place, _GROUPS[size], attention)
