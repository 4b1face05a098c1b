"""What each rank reports of a global step before the update, and what all conclude from it.

Every rank computes the verdict from the same reports in the same order, so all ranks update or all
ranks skip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from omni_train.engine import shards
from omni_train.engine.deepspeed import Engine
from omni_train.engine.distributed import get_world
from omni_train.engine.hashing import keys_hash
from omni_train.engine.types import MicroBatch
from omni_train.objectives.types import StepOutput

# DeepSpeed squares the norm in fp32 for clipping; beyond this it would refuse the step itself.
_LARGEST_SQUARE = float(torch.finfo(torch.float32).max)


@dataclass(slots=True)
class Report:
    """One rank's part of a global step.

    Args:
        losses: summed loss of each micro-batch.
        squares: squared gradient norm of this rank's pieces, by group.
        metrics: (sum, count) by name, over this rank's micro-batches.
        keys: hash of its sample keys (see `keys_hash`).
        num_samples: number of its samples.
        all_tokens: tokens of its packs, supervised or not.
        bad_samples: (source, shard, key, reason) of samples that were planned but not used.
        flops: of the model, of its micro-batches.
        stop: signal that asked this rank to stop; empty where none did.
        own: seconds by part of the step that this rank itself took (see phases.py).
    """

    losses: list[float]
    squares: dict[str, float]
    metrics: dict[str, tuple[float, float]]
    keys: int
    num_samples: int
    all_tokens: int
    bad_samples: list[tuple[str, str, str, str]]
    flops: float
    stop: str
    own: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        return asdict(self)


@dataclass(slots=True)
class Verdict:
    """What all ranks agree on.

    Args:
        finite: whether all losses and gradients are; the update depends on it.
        loss: mean per supervised token of the global step; 0 where there is none.
        num_tokens: supervised tokens of the global step.
        grad_norm: L2 norm over all trained groups, before clipping.
        group_norms: the same by group.
        metrics: quotient of the sums over micro-steps and ranks, by name.
        keys: hash of the global step's sample keys, 16 hex digits, the same for any world size.
        num_samples: samples of the global step.
        all_tokens: its tokens, supervised or not.
        offenders: rank -> its micro-steps with a non-finite loss; no micro-step where only the
            gradient is not finite.
        bad_samples: of all ranks.
        flops: likewise.
        stop: signal and rank that ask all to stop after this step; empty where none does.
        own: seconds by part that each rank itself took, in rank order.
    """

    finite: bool
    loss: float
    num_tokens: int
    grad_norm: float
    group_norms: dict[str, float]
    metrics: dict[str, float]
    keys: str
    num_samples: int
    all_tokens: int
    offenders: dict[int, list[int]]
    bad_samples: list[tuple[str, str, str, str]]
    flops: float
    stop: str
    own: list[dict[str, float]]


def local_report(
    engine: Engine,
    outputs: Sequence[StepOutput],
    batches: Sequence[MicroBatch],
    *,
    stop: str,
    own: dict[str, float],
) -> Report:
    """Return this rank's report; reads all device numbers at once."""
    world = get_world()
    squares: dict[str, Tensor] = {}
    for group in engine.trained:
        local = []
        for _, param in group.params:
            piece = shards.piece_of(param, rank=world.rank, world_size=world.size)
            if piece.length:
                local.append(shards.gradient(param, piece))
        norms = torch._foreach_norm(local) if local else [torch.zeros((), device=world.device)]
        squares[group.name] = torch.stack(norms).double().square().sum()
    metrics: dict[str, list[tuple[Any, Any]]] = {}
    for output in outputs:
        for name, pair in output.metrics.items():
            metrics.setdefault(name, []).append(pair)
    keys = [key for batch in batches for key in batch.keys]
    return Report(
        losses=_floats([output.loss for output in outputs]),
        squares=dict(zip(squares, _floats(list(squares.values())), strict=True)),
        metrics={
            name: (sum(_floats([s for s, _ in pairs])), sum(_floats([c for _, c in pairs])))
            for name, pairs in metrics.items()
        },
        keys=keys_hash(keys),
        num_samples=len(keys),
        all_tokens=sum(batch.num_tokens for batch in batches),
        bad_samples=[row for batch in batches for row in batch.bad],
        flops=sum(output.flops for output in outputs),
        stop=stop,
        own=own,
    )


def _floats(values: Sequence[Tensor | float | int]) -> list[float]:
    """Return numbers as floats with one transfer for all that lie on a device."""
    tensors = [value.detach().double().reshape(()) for value in values if torch.is_tensor(value)]
    moved = iter(torch.stack(tensors).tolist() if tensors else [])
    return [float(next(moved) if torch.is_tensor(value) else value) for value in values]


def verdict_of(reports: Sequence[Report], num_tokens: int) -> Verdict:
    """Conclude from all ranks' reports, in rank order.

    Args:
        reports: of ranks 0, 1, ...
        num_tokens: supervised tokens of the global step.
    """
    groups = {name: sum(r.squares[name] for r in reports) for name in reports[0].squares}
    total = sum(groups.values())
    losses = [loss for report in reports for loss in report.losses]
    names = list(dict.fromkeys(name for report in reports for name in report.metrics))
    metrics: dict[str, float] = {}
    for name in names:
        pairs = [report.metrics[name] for report in reports if name in report.metrics]
        count = sum(pair[1] for pair in pairs)
        if count:
            metrics[name] = sum(pair[0] for pair in pairs) / count
    return Verdict(
        finite=all(math.isfinite(loss) for loss in losses) and total < _LARGEST_SQUARE,
        loss=sum(losses) / max(num_tokens, 1),
        num_tokens=num_tokens,
        grad_norm=math.sqrt(total) if total >= 0 else total,
        group_norms={n: math.sqrt(s) if s >= 0 else s for n, s in groups.items()},
        metrics=metrics,
        keys=f"{sum(report.keys for report in reports) % (1 << 64):016x}",
        num_samples=sum(report.num_samples for report in reports),
        all_tokens=sum(report.all_tokens for report in reports),
        offenders=_offenders(reports),
        bad_samples=[row for report in reports for row in report.bad_samples],
        flops=sum(report.flops for report in reports),
        stop=next((f"{r.stop} at rank {n}" for n, r in enumerate(reports) if r.stop), ""),
        own=[report.own for report in reports],
    )


def _offenders(reports: Sequence[Report]) -> dict[int, list[int]]:
    by_loss = {
        rank: [n for n, loss in enumerate(report.losses) if not math.isfinite(loss)]
        for rank, report in enumerate(reports)
    }
    by_loss = {rank: numbers for rank, numbers in by_loss.items() if numbers}
    if by_loss:
        return by_loss
    # Gradients are averaged over ranks, so who holds the bad piece need not have caused it.
    return {
        rank: []
        for rank, report in enumerate(reports)
        if not sum(report.squares.values()) < _LARGEST_SQUARE
    }
