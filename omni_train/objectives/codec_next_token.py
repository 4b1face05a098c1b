"""Next-codec-token objective of the Talker's stages: minus the log-probability of codes and eos."""

from __future__ import annotations

from torch import Tensor, nn

from omni_train.models.talker_layout import SpeechBatch
from omni_train.objectives.types import StepOutput


def codec_next_token(model: nn.Module, batch: SpeechBatch) -> StepOutput:
    """Return the summed loss of one pack of spoken replies.

    A pack without speech has one dummy target of weight zero: the loss is then exactly zero, with a
    graph like any other.

    Args:
        model: called with the batch, returns float32 log-probabilities [N].
        batch: one pack with N targets.
    """
    logprobs: Tensor = model(batch)
    loss = -(batch.talker.target_weights * logprobs).sum()
    return StepOutput(loss=loss, metrics={}, num_tokens=batch.num_target_tokens)
