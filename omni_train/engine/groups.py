"""Named parameter groups as the engine sees them.

Which parameter belongs to which group is the model's business (`omni_train.models.groups`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from omni_train.engine.optim import LrCurve


@dataclass(slots=True)
class ParamGroup:
    """Parameters that are trained, or frozen, together.

    Args:
        name: such as `audio_encoder`.
        params: (name in the model, parameter) in the model's order.
        trainable: whether the group gets gradients and updates.
        lr: peak learning rate.
        weight_decay: decoupled weight decay (AdamW).
        curve: learning rate over the steps; None takes the optimiser's.
        scales: factor of the learning rate by parameter name; 1 where there is none.
    """

    name: str
    params: list[tuple[str, nn.Parameter]]
    trainable: bool
    lr: float
    weight_decay: float
    curve: LrCurve | None = None
    scales: dict[str, float] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        """Elements of the group, counted before or after ZeRO-3 has partitioned them."""
        return sum(int(getattr(p, "ds_numel", p.numel())) for _, p in self.params)
