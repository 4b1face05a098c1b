"""Next-token objective of the Thinker's stages: minus the log-probability of what is supervised."""

from __future__ import annotations

from torch import Tensor, nn

from omni_train.data.types import Batch
from omni_train.models.flops import thinker_flops
from omni_train.objectives.types import StepOutput


def next_token(model: nn.Module, batch: Batch) -> StepOutput:
    """Return the summed loss of one pack.

    A pack without supervision has one dummy target of weight zero: the loss is then exactly zero,
    with a graph like any other. The weights of turns scale their tokens' loss; what the loop
    divides by is the number of tokens, so a turn of weight 2 pulls twice as hard and takes from no
    other.

    Args:
        model: called with the batch, returns float32 log-probabilities [N].
        batch: one pack with N targets.
    """
    logprobs: Tensor = model(batch)
    losses = -batch.target_weights * logprobs
    return StepOutput(
        loss=losses.sum(),
        metrics=_by_kind(losses, batch),
        num_tokens=batch.num_target_tokens,
        flops=thinker_flops(model, batch),
    )


def _by_kind(losses: Tensor, batch: Batch) -> dict[str, tuple[Tensor, Tensor | int]]:
    """Loss per token by source, `loss_source/libri`, by task and by modality.

    Args:
        losses: float32 [N].
        batch: the pack they belong to.
    """
    sums = losses.new_zeros(len(batch.kinds)).index_add_(0, batch.target_kind, losses.detach())
    metrics: dict[str, tuple[Tensor, Tensor | int]] = {}
    none = losses.new_zeros(())
    for (source, task, modality), count, total in zip(
        batch.kinds, batch.kind_targets, sums.unbind(), strict=True
    ):
        names = [f"loss_task/{task or 'unnamed'}", f"loss_modality/{modality}"]
        for name in [f"loss_source/{source}", *names] if source else names:
            before, so_far = metrics.get(name, (none, 0))
            metrics[name] = (before + total, so_far + count)
    return metrics
