"""Next-token objective of the Thinker's stages: minus the log-probability of what is supervised."""

from __future__ import annotations

from torch import Tensor, nn

from omni_train.data.types import Batch
from omni_train.objectives.types import StepOutput


def next_token(model: nn.Module, batch: Batch) -> StepOutput:
    """Return the summed loss of one pack.

    A pack without supervision has one dummy target of weight zero: the loss is then exactly zero,
    with a graph like any other.

    Args:
        model: called with the batch, returns float32 log-probabilities [N].
        batch: one pack with N targets.
    """
    logprobs: Tensor = model(batch)
    loss = -(batch.target_weights * logprobs).sum()
    return StepOutput(loss=loss, metrics={}, num_tokens=batch.num_target_tokens)
