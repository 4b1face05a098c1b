"""Preference objective (DPO) over pairs of answers to one prompt, and its control without a pair.

With r(y) = log P(y|x) - log P_ref(y|x) and d = r(chosen) - r(rejected), a pair's loss is

    sigmoid        -log sigmoid(beta * d)                          (Rafailov et al., 2023)
    sigmoid_norm   the same with each r over its answer's number of tokens
    sft            no preference: mean loss per token of the chosen answer

`label_smoothing` e is the chance that a pair is the wrong way round; the loss is then Robust DPO's
((1 - e) * l(d) - e * l(-d)) / (1 - 2 e) (Chowdhury et al., 2024). `sft_weight` adds that much of
`sft`. Names of losses and metrics, and all values, are those of trl.DPOTrainer; its `sft` averages
over the tokens of a micro-batch, ours over pairs, so that packing changes no gradient: they are
equal where a micro-batch is one pair. Reference log-probabilities come with the batch.

Letters: N targets, M pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from omni_train.config.errors import check_fields
from omni_train.objectives.types import StepOutput


class PreferenceLoss(Enum):
    """Loss of a pair; see the module."""

    sigmoid = "sigmoid"
    sigmoid_norm = "sigmoid_norm"
    sft = "sft"


@dataclass(kw_only=True, slots=True)
class PreferenceConfig:
    """How a pair is learnt from.

    Args:
        loss: of a pair; `sft` is the control that learns from the chosen answers alone.
        beta: how strongly the policy is held to the reference; also scales the reward metrics.
        label_smoothing: chance that a pair is the wrong way round, below 0.5.
        sft_weight: of the chosen answer's own loss beside the preference.
    """

    loss: PreferenceLoss = PreferenceLoss.sigmoid
    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    def __post_init__(self) -> None:
        control = self.loss is PreferenceLoss.sft
        check_fields(
            self,
            "preference",
            ("beta", self.beta > 0, "must be positive"),
            ("label_smoothing", 0 <= self.label_smoothing < 0.5, "must lie in [0, 0.5)"),
            ("label_smoothing", not (control and self.label_smoothing), "has no effect with sft"),
            ("sft_weight", self.sft_weight >= 0, "must not be negative"),
            ("sft_weight", not (control and self.sft_weight), "has no effect with sft"),
            remedy="leave it out for the default",
        )


@dataclass(slots=True)
class PairTargets:
    """Which targets of a micro-batch belong to which answer.

    Args:
        answers: int64 [N]; 2m is the chosen, 2m + 1 the rejected answer of pair m; 2M for a dummy.
        lengths: float32 [2M], targets of each answer.
        reference: float32 [2M], summed log-probability of each answer under the reference.
    """

    answers: Tensor
    lengths: Tensor
    reference: Tensor

    @property
    def num_pairs(self) -> int:
        """M."""
        return self.lengths.numel() // 2

    def to(self, device: torch.device) -> PairTargets:
        """Return the same on `device`."""
        return PairTargets(
            answers=self.answers.to(device, non_blocking=True),
            lengths=self.lengths.to(device, non_blocking=True),
            reference=self.reference.to(device, non_blocking=True),
        )


class PairedBatch(Protocol):
    """A micro-batch of pairs; its `num_target_tokens`, which losses are divided by, is M."""

    pairs: PairTargets


def preference(model: nn.Module, batch: PairedBatch, config: PreferenceConfig) -> StepOutput:
    """Return the summed loss of the pairs of one pack; zero, with a graph, where there is none.

    Args:
        model: called with the batch, returns float32 log-probabilities [N].
        batch: pairs with their reference log-probabilities.
        config: which loss.
    """
    logprobs: Tensor = model(batch)
    pairs = batch.pairs
    answers = answer_logprobs(logprobs, pairs)
    chosen, rejected = answers.view(-1, 2).unbind(1)
    ratios = answers - pairs.reference
    nll = -chosen / pairs.lengths[0::2]
    if config.loss is PreferenceLoss.sft:
        losses = nll
    else:
        normed = config.loss is PreferenceLoss.sigmoid_norm
        scores = (ratios / pairs.lengths if normed else ratios).view(-1, 2)
        losses = pair_losses(config.beta * (scores[:, 0] - scores[:, 1]), config.label_smoothing)
        losses = losses + config.sft_weight * nll
    # The dummy of an empty pack belongs to no answer; it keeps the graph alike.
    loss = losses.sum() + 0.0 * logprobs.sum()
    rewards = config.beta * ratios.detach().view(-1, 2)
    margins = rewards[:, 0] - rewards[:, 1]
    found = {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/accuracies": (margins > 0).float(),
        "rewards/margins": margins,
        "logps/chosen": chosen.detach(),
        "logps/rejected": rejected.detach(),
    }
    count = pairs.num_pairs
    metrics = {name: (values.sum(), count) for name, values in found.items()}
    return StepOutput(loss=loss, metrics=dict(metrics), num_tokens=count)


def answer_logprobs(logprobs: Tensor, pairs: PairTargets) -> Tensor:
    """Return the summed log-probability of each answer, float32 [2M], of targets [N]."""
    sums = logprobs.new_zeros(2 * pairs.num_pairs + 1)
    return sums.index_add(0, pairs.answers, logprobs)[:-1]


def pair_losses(delta: Tensor, label_smoothing: float) -> Tensor:
    """Return the loss of each pair [M] of its scaled difference `delta` [M]."""
    losses = -logsigmoid(delta)
    if not label_smoothing:
        return losses
    right = (1 - label_smoothing) * losses
    return (right + label_smoothing * logsigmoid(-delta)) / (1 - 2 * label_smoothing)
