"""What an objective returns; nothing here knows a particular loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(slots=True)
class StepOutput:
    """Result of one micro-batch.

    Args:
        loss: float scalar with gradient, the SUM over supervised tokens (not the mean); the loop
            divides by the token count of the global step.
        metrics: by name `group/name`: (sum, count). Both are summed over micro-steps and ranks,
            then divided; a Tensor is a detached scalar.
        num_tokens: supervised tokens that the sum runs over, equal to the batch's
            `num_target_tokens`.
        flops: of the model's forward and backward pass, for MFU; 0 where nobody counts them.
    """

    loss: Tensor
    metrics: dict[str, tuple[Tensor, Tensor | int]] = field(default_factory=dict)
    num_tokens: int = 0
    flops: float = 0.0


StepFunction = Callable[[nn.Module, Any], StepOutput]
