"""What `fit` asks of a loader and of a micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import torch


class MicroBatch(Protocol):
    """One pack; `omni_train.data.types.Batch` is the usual one.

    `keys` are sample keys, `num_target_tokens` the supervised tokens, `bad` the samples that were
    planned but could not be used, as (source, shard, key, reason).
    """

    keys: list[str]
    num_target_tokens: int
    bad: list[tuple[str, str, str, str]]

    @property
    def num_tokens(self) -> int:
        """Tokens of the pack, supervised or not."""
        ...

    def to(self, device: torch.device) -> Self:
        """Return the same micro-batch on `device`."""
        ...


@dataclass(slots=True)
class StepItem:
    """This rank's share of one global step.

    Args:
        micro_batches: the same number on every rank.
        epoch, window, step: the plan's position of this global step.
        tokens_by_source: planned tokens of the whole global step, the same on every rank.
    """

    micro_batches: Sequence[MicroBatch]
    epoch: int
    window: int
    step: int
    tokens_by_source: dict[str, int] = field(default_factory=dict)


class Loader(Protocol):
    """Source of global steps whose whole state is a few numbers and a fingerprint."""

    def steps(self) -> Iterable[StepItem]:
        """Yield one item per global step, starting at the current position."""
        ...

    def state(self) -> dict[str, int | str]:
        """Return the position of the global step after the last one that `steps` yielded."""
        ...

    def load_state(self, state: dict[str, int | str]) -> None:
        """Continue at a position that `state` returned, on any number of ranks."""
        ...

    def count_bad(self, bad: Sequence[tuple[str, str, str, str]], *, num_samples: int) -> None:
        """Take note of the unusable samples of a step, of all ranks; may raise on all of them."""
        ...
