"""Which samples share a pack, which packs make a global step, and who runs what when.

    window of samples -> packs (best fit) -> global steps -> micro-steps x ranks

Pure functions of their arguments: no media is touched, nothing is read. What is in a pack and in a
global step never depends on the world size; only `assign` does.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from omni_train.data.measure import Costs
from omni_train.data.types import PackSpec, SampleRef


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """The global steps of one window.

    Args:
        steps: packs of each global step, before they are dealt to ranks.
        over_budget: samples with more tokens than a pack holds; they are never cut.
    """

    steps: list[list[PackSpec]]
    over_budget: list[SampleRef]


def shuffled_slice(
    counts: Sequence[int], start: int, stop: int, *, seed: Sequence[int], shuffle_shards: int
) -> list[tuple[int, int]]:
    """Positions `start..stop` of a source's endless stream as (shard, row), any slice at once.

    Each epoch visits every sample once: shards in a random order, samples shuffled within groups
    of `shuffle_shards` shards, so that memory is bounded by a group and not by the source.

    Args:
        counts: samples in each shard.
        seed: integers that name the run and the source.
    """
    total = sum(counts)
    found: list[tuple[int, int]] = []
    for epoch in range(start // total, (stop - 1) // total + 1 if stop > start else 0):
        low, high = max(start - epoch * total, 0), min(stop - epoch * total, total)
        order = np.random.default_rng([*seed, epoch]).permutation(len(counts)).tolist()
        position = 0
        for first in range(0, len(order), shuffle_shards):
            group = order[first : first + shuffle_shards]
            size = sum(counts[shard] for shard in group)
            if position < high and position + size > low:
                rows = [(shard, row) for shard in group for row in range(counts[shard])]
                mixed = np.random.default_rng([*seed, epoch, first + 1]).permutation(size)
                inside = slice(max(low - position, 0), min(high - position, size))
                found.extend(rows[i] for i in mixed[inside])
            position += size
    return found


def pack_best_fit(num_tokens: NDArray[np.int64], budget: int) -> list[list[int]]:
    """Best-fit decreasing: each sample, longest first, goes where it leaves the least room.

    Args:
        num_tokens: int64 [n], none above `budget`.
        budget: tokens a pack may hold.

    Returns:
        Sample numbers of each pack.
    """
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, pack), ascending
    for sample in np.argsort(-num_tokens, kind="stable").tolist():
        need = int(num_tokens[sample])
        place = bisect.bisect_left(free, (need, -1))
        if place == len(free):
            packs.append([])
            left, pack = budget, len(packs) - 1
        else:
            left, pack = free.pop(place)
        packs[pack].append(sample)
        bisect.insort(free, (left - need, pack))
    return packs


def plan_window(
    samples: Sequence[SampleRef],
    costs: Costs,
    *,
    pack_tokens: int,
    packs_per_step: int,
    seed: Sequence[int],
) -> WindowPlan:
    """Pack a window of samples and deal the packs out to global steps.

    Steps of a window differ by at most one pack, so no sample waits for another window.

    Args:
        samples: the window, in stream order.
        costs: measured costs of the same samples.
        pack_tokens: token budget of a pack.
        packs_per_step: largest number of packs in a global step.
        seed: integers that name the run and the window.
    """
    tokens = costs.num_tokens
    fits = np.flatnonzero(tokens <= pack_tokens)
    over = [samples[i] for i in np.flatnonzero(tokens > pack_tokens).tolist()]
    groups = pack_best_fit(tokens[fits], pack_tokens)
    packs = [_pack_spec(samples, costs, fits[group]) for group in groups]
    if not packs:
        return WindowPlan([], over)
    order = np.random.default_rng([*seed, 7]).permutation(len(packs))
    num_steps = -(-len(packs) // packs_per_step)
    steps = [[packs[i] for i in part] for part in np.array_split(order, num_steps)]
    return WindowPlan(steps, over)


def _pack_spec(samples: Sequence[SampleRef], costs: Costs, members: NDArray[np.int64]) -> PackSpec:
    return PackSpec(
        samples=tuple(samples[i] for i in members.tolist()),
        num_tokens=int(costs.num_tokens[members].sum()),
        vision_cost=float(costs.vision_cost[members].sum()),
        audio_cost=float(costs.audio_cost[members].sum()),
        llm_cost=float(costs.llm_cost[members].sum()),
    )


def assign(packs: Sequence[PackSpec], num_ranks: int) -> list[list[PackSpec]]:
    """Deal the packs of a global step to micro-steps and ranks.

    Under ZeRO-3 all ranks gather weights in lockstep, so a micro-step takes as long as its slowest
    vision, audio and LLM part: packs that are alike run at the same time. Several orders are
    tried and the cheapest by `lockstep_cost` is kept.

    Returns:
        Packs by micro-step, then by rank; every micro-step has one pack per rank, empty ones
        where the packs do not divide.
    """
    padded = [*packs, *[PackSpec()] * (-len(packs) % num_ranks)]
    keys: tuple[Callable[[PackSpec], tuple[float, ...]], ...] = (
        lambda p: (p.llm_cost + p.vision_cost + p.audio_cost, p.num_tokens),
        lambda p: (p.llm_cost, p.vision_cost),
        lambda p: (p.vision_cost, p.audio_cost, p.llm_cost),
        lambda p: (p.audio_cost, p.vision_cost, p.llm_cost),
    )
    tried = []
    for key in keys:
        order = sorted(padded, key=key, reverse=True)
        tried.append([order[i : i + num_ranks] for i in range(0, len(order), num_ranks)])
    return min(tried, key=lockstep_cost)


def lockstep_cost(micro_steps: Sequence[Sequence[PackSpec]]) -> float:
    """Sum over micro-steps of the slowest vision, the slowest audio and the slowest LLM part."""
    return sum(
        max(p.vision_cost for p in packs)
        + max(p.audio_cost for p in packs)
        + max(p.llm_cost for p in packs)
        for packs in micro_steps
    )
