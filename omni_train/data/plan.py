"""Which samples share a pack, which packs make a global step, and who runs what when.

    window of samples -> packs (level, best fit) -> global steps -> micro-steps x ranks

Pure functions of their arguments: no media is touched, nothing is read. What is in a pack and in a
global step never depends on the world size; only `assign` does.

Under ZeRO-3 all ranks gather weights in lockstep, so a micro-step takes as long as its slowest
vision, audio and LLM part (`lockstep_cost`). With as many ranks as packs no assignment can help;
packs must be alike when they are made. So samples are dealt largest first, a round of samples of
similar size at a time, and within a round the sample with the most vision goes to the pack with
the least; sound likewise; text levels the tokens. What then finds no room is placed by best fit.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from omni_train.data.measure import Costs
from omni_train.data.types import PackSpec, SampleRef

# Share of a pack's budget from which on a sample has it to itself: no other rank should wait for
# what would be added to the longest sequence of the step.
GIANT_SHARE = 0.95
# How full packs are meant to be; what the rounds cannot place at this level goes by best fit. Room
# is what lets packs be level: 0.985 to 0.995 change the lockstep cost by 1 % at most.
_MEANT_FULL = 0.99
# Part of the packs that get a sample in one round: the emptier ones, so that tokens stay level. A
# quarter does as well in twice the time, all packs at once cost 2 % more on 64 ranks.
_ROUND_SHARE = 0.5
# A sample below this share of the budget moves no pack far, so that all packs get one in a round.
_SMALL_SHARE = 1 / 64
# Up to so many micro-steps thresholds are tried too, at so many quantiles; with more, sorting is as
# good and takes a fraction of the time.
_MAX_PEELED = 4
_CUTS = 7

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """The global steps of one window.

    Args:
        steps: packs of each global step, before they are dealt to ranks.
        over_budget: samples with more tokens than a pack holds; they are never cut.
    """

    steps: list[list[PackSpec]]
    over_budget: list[SampleRef]


def join_costs(costs: Sequence[Costs]) -> Costs:
    """Return the rows of several measurements, one after the other."""
    return Costs(
        num_tokens=np.concatenate([c.num_tokens for c in costs]),
        vision_cost=np.concatenate([c.vision_cost for c in costs]),
        audio_cost=np.concatenate([c.audio_cost for c in costs]),
        llm_cost=np.concatenate([c.llm_cost for c in costs]),
    )


def token_slice(
    totals: Sequence[int],
    start: int,
    stop: int,
    *,
    seed: Sequence[int],
    shuffle_shards: int,
    tokens_of: Callable[[int], IntArray],
) -> tuple[IntArray, IntArray]:
    """Samples that begin at tokens `start..stop` of a source's endless stream, any slice at once.

    Each epoch visits every sample once: shards in a random order, samples shuffled within groups
    of `shuffle_shards` shards, so that memory is bounded by a group and not by the source.

    Args:
        totals: tokens of each shard; where one is an estimate, its samples are stretched over it.
        start, stop: token positions, counted over epochs.
        seed: integers that name the run and the source.
        shuffle_shards: shards in a group.
        tokens_of: int64 tokens of each sample of a shard, 0 for a sample that is not used.

    Returns:
        int64 shard [n] and row [n].
    """
    total = sum(totals)
    shards: list[IntArray] = [np.empty(0, np.int64)]
    rows: list[IntArray] = [np.empty(0, np.int64)]
    for epoch in range(start // total, (stop - 1) // total + 1 if stop > start else 0):
        low, high = start - epoch * total, stop - epoch * total
        order = np.random.default_rng([*seed, epoch]).permutation(len(totals)).tolist()
        position = 0
        for first in range(0, len(order), shuffle_shards):
            group = order[first : first + shuffle_shards]
            size = sum(totals[shard] for shard in group)
            if size and position < high and position + size > low:
                rng = np.random.default_rng([*seed, epoch, first + 1])
                shard, row, begins = _shuffled_group(group, size, rng, tokens_of)
                inside = slice(*np.searchsorted(begins, (low - position, high - position)))
                shards.append(shard[inside])
                rows.append(row[inside])
            position += size
    return np.concatenate(shards), np.concatenate(rows)


def _shuffled_group(
    group: Sequence[int], size: int, rng: np.random.Generator, tokens_of: Callable[[int], IntArray]
) -> tuple[IntArray, IntArray, IntArray]:
    """Used samples of some shards in random order: shard, row, token at which each begins."""
    tokens = [tokens_of(shard) for shard in group]
    shard = np.repeat(np.array(group, np.int64), [len(t) for t in tokens])
    row = np.concatenate([np.arange(len(t), dtype=np.int64) for t in tokens])
    length = np.concatenate(tokens)
    mixed = rng.permutation(len(length))
    mixed = mixed[length[mixed] > 0]
    ends = np.cumsum(length[mixed])
    begins = ends - length[mixed]
    if len(ends) and ends[-1] != size:
        begins = (begins * (size / ends[-1])).astype(np.int64)
    return shard[mixed], row[mixed], begins


def pack_level(costs: Costs, budget: int) -> IntArray:
    """Return int64 [R]: the pack of each sample; full, and level in vision, sound and tokens.

    Args:
        costs: of samples of which none has more than `budget` tokens.
        budget: tokens a pack may hold.
    """
    tokens = costs.num_tokens
    pack = np.full(len(tokens), -1, dtype=np.int64)
    giants = np.flatnonzero(tokens >= GIANT_SHARE * budget)
    pack[giants] = np.arange(len(giants))
    rest = np.flatnonzero(tokens < GIANT_SHARE * budget)
    count = -(-int(tokens[rest].sum()) // int(budget * _MEANT_FULL))
    room = np.full(count, budget, dtype=np.int64)
    parts = np.stack([costs.vision_cost, costs.audio_cost])
    load = np.zeros((2, count))
    order = rest[_stable_order(budget - tokens[rest])]
    num_large = int((tokens[order] >= budget * _SMALL_SHARE).sum())
    half = max(1, round(count * _ROUND_SHARE))
    # Cut where the rounds end: by half as many samples as packs, then by as many.
    cuts = [*range(half, num_large, half), *range(max(num_large, 1), len(order), max(count, 1))]
    for chunk in np.split(order, cuts):
        packs = _stable_order(budget - room)[: len(chunk)]
        chunk, packs = _match(chunk, packs, parts, load)
        fits = tokens[chunk] <= room[packs]
        chunk, packs = chunk[fits], packs[fits]
        pack[chunk] = packs + len(giants)
        room[packs] -= tokens[chunk]
        load[:, packs] += parts[:, chunk]
    left = order[pack[order] < 0]
    if len(left):
        pack[left] = _best_fit(tokens[left], room.tolist(), budget) + len(giants)
    return pack


def _stable_order(values: IntArray) -> IntArray:
    """Return the stable rising order of integers from 0; 16 bits are sorted by digit, fast."""
    return np.argsort(values.astype(np.min_scalar_type(int(values.max(initial=0)))), kind="stable")


def _match(
    chunk: IntArray, packs: IntArray, parts: FloatArray, load: FloatArray
) -> tuple[IntArray, IntArray]:
    """Pair a round's samples with as many packs: most vision to least, most sound to least."""
    vision, audio = parts[:, chunk]
    heard = np.flatnonzero((vision <= 0) & (audio > 0))
    samples, places = [], []
    for size, members, level in (
        (vision, np.flatnonzero(vision > 0), load[0]),
        (audio, heard, load[1]),
    ):
        samples.append(chunk[members[np.argsort(-size[members], kind="stable")]])
        order = np.argsort(level[packs], kind="stable")
        places.append(packs[order[: len(members)]])
        # Text takes what is left, the longest where most room is.
        packs = packs[np.sort(order[len(members) :])]
    samples.append(chunk[(vision <= 0) & (audio <= 0)])
    return np.concatenate(samples), np.concatenate([*places, packs])


def _best_fit(tokens: IntArray, room: list[int], budget: int) -> IntArray:
    """Return int64 [n]: each sample, longest first, goes where it leaves the least room.

    Args:
        tokens: int64 [n], longest first.
        room: tokens left in the packs that there are; more are opened as needed.
        budget: tokens that a new pack holds.
    """
    free = sorted((left, pack) for pack, left in enumerate(room) if left > 0)
    count = len(room)
    packs = []
    for need in tokens.tolist():
        place = bisect.bisect_left(free, (need, -1))
        if place == len(free):
            left, pack = budget, count
            count += 1
        else:
            left, pack = free.pop(place)
        packs.append(pack)
        bisect.insort(free, (left - need, pack))
    return np.array(packs, dtype=np.int64)


def plan_window(
    samples: Sequence[SampleRef],
    costs: Costs,
    *,
    pack_tokens: int,
    packs_per_step: int,
    seed: Sequence[int],
) -> WindowPlan:
    """Pack a window of samples and deal the packs out to global steps.

    Steps of a window differ by at most one pack, so no sample waits for another window, and each
    has its share of the costly and of the cheap packs.

    Args:
        samples: the window, in stream order.
        costs: measured costs of the same samples.
        pack_tokens: token budget of a pack.
        packs_per_step: largest number of packs in a global step.
        seed: integers that name the run and the window.
    """
    over = [samples[i] for i in np.flatnonzero(costs.num_tokens > pack_tokens).tolist()]
    if over:
        fits = np.flatnonzero(costs.num_tokens <= pack_tokens)
        samples = [samples[i] for i in fits.tolist()]
        costs = Costs(
            num_tokens=costs.num_tokens[fits],
            vision_cost=costs.vision_cost[fits],
            audio_cost=costs.audio_cost[fits],
            llm_cost=costs.llm_cost[fits],
        )
    if not samples:
        return WindowPlan([], over)
    packs = _pack_specs(samples, costs, pack_level(costs, pack_tokens))
    num_steps = -(-len(packs) // packs_per_step)
    rng = np.random.default_rng([*seed, 7])
    cost = np.array([-(p.vision_cost + p.audio_cost + p.llm_cost) for p in packs])
    order = np.argsort(cost, kind="stable")
    # One pack of each stratum to each step.
    step = np.concatenate([rng.permutation(num_steps) for _ in range(-(-len(packs) // num_steps))])
    steps: list[list[PackSpec]] = [[] for _ in range(num_steps)]
    for pack, number in zip(order.tolist(), step.tolist(), strict=False):
        steps[number].append(packs[pack])
    return WindowPlan(steps, over)


def _pack_specs(samples: Sequence[SampleRef], costs: Costs, pack: IntArray) -> list[PackSpec]:
    count = int(pack.max()) + 1
    # Within a pack samples keep the order of the stream, which is random.
    members = _stable_order(pack).tolist()
    bounds = np.cumsum(np.bincount(pack, minlength=count)).tolist()
    parts = (costs.num_tokens, costs.vision_cost, costs.audio_cost, costs.llm_cost)
    sums = [np.bincount(pack, weights=values, minlength=count).tolist() for values in parts]
    sources = np.fromiter(map(itemgetter(0), samples), dtype=np.int64, count=len(samples))
    width = int(sources.max()) + 1
    shares = np.bincount(pack * width + sources, costs.num_tokens, count * width)
    by_source = shares.astype(np.int64).reshape(count, width).tolist()
    ordered = list(map(samples.__getitem__, members))
    packs, first = [], 0
    for last, of_sources, num_tokens, vision, audio, llm in zip(
        bounds, by_source, *sums, strict=True
    ):
        if last > first:
            refs = tuple(ordered[first:last])
            packs.append(PackSpec(refs, int(num_tokens), vision, audio, llm, tuple(of_sources)))
        first = last
    return packs


def assign(packs: Sequence[PackSpec], num_ranks: int) -> list[list[PackSpec]]:
    """Deal the packs of a global step to micro-steps and ranks.

    Packs that are alike run at the same time. Several orders are tried and the cheapest by
    `lockstep_cost` is kept.

    Returns:
        Packs by micro-step, then by rank; every micro-step has one pack per rank, empty ones
        where the packs do not divide.
    """
    padded = [*packs, *[PackSpec()] * (-len(packs) % num_ranks)]
    num_micro = len(padded) // num_ranks
    if num_micro == 1:
        return [padded]
    costs = np.array([(p.vision_cost, p.audio_cost, p.llm_cost) for p in padded])
    orders = _sorted_orders(costs, num_micro)
    if num_micro <= _MAX_PEELED:
        orders.append(_peeled_order(costs, num_ranks))
    grouped = costs[np.array(orders)].reshape(len(orders), num_micro, num_ranks, 3)
    best = orders[int(grouped.max(axis=2).sum(axis=(1, 2)).argmin())].tolist()
    return [[padded[i] for i in best[n : n + num_ranks]] for n in range(0, len(best), num_ranks)]


def _sorted_orders(costs: FloatArray, num_micro: int) -> list[IntArray]:
    """Orders by the sum, and by one part in coarse levels, within a level by the next."""
    ranks = np.argsort(np.argsort(costs, axis=0, kind="stable"), axis=0, kind="stable")
    orders = [np.argsort(costs.sum(axis=1), kind="stable")]
    for levels in sorted({min(4, num_micro), min(8, num_micro)}):
        coarse = ranks * levels // len(costs)
        for first, second, third in permutations(range(3)):
            orders.append(np.lexsort((costs[:, third], coarse[:, second], coarse[:, first])))
    return orders


def _peeled_order(costs: FloatArray, num_ranks: int) -> IntArray:
    """Fill one micro-step after the other so that what is left has the smallest maxima.

    Three thresholds, one per part, are chosen from quantiles such that no more packs exceed one of
    them than a micro-step holds; those packs, whichever part is large, go together.
    """
    left = np.arange(len(costs))
    order: list[IntArray] = []
    while len(left) > num_ranks:
        here = costs[left]
        cuts = np.linspace(0, num_ranks, _CUTS).astype(np.int64)
        bound = -np.sort(-here, axis=0)[cuts]
        over = here[:, None, :] > bound[None]
        either = over[:, :, None, 0] | over[:, None, :, 1]
        counts = np.stack(
            [(either | over[:, cut, 2][:, None, None]).sum(axis=0) for cut in range(_CUTS)], axis=2
        )
        total = bound[:, None, None, 0] + bound[None, :, None, 1] + bound[None, None, :, 2]
        v, a, m = np.unravel_index(
            np.where(counts <= num_ranks, total, np.inf).argmin(), total.shape
        )
        chosen = over[:, v, 0] | over[:, a, 1] | over[:, m, 2]
        # Room that is left goes to the packs nearest below the thresholds.
        limit = np.array([bound[v, 0], bound[a, 1], bound[m, 2]])
        near = (here / np.maximum(limit, 1e-9)).max(axis=1) + chosen * len(here)
        by_cost = np.argsort(-near, kind="stable")
        order.append(left[by_cost[:num_ranks]])
        left = np.sort(left[by_cost[num_ranks:]])
    return np.concatenate([*order, left])


def lockstep_cost(micro_steps: Sequence[Sequence[PackSpec]]) -> float:
    """Sum over micro-steps of the slowest vision, the slowest audio and the slowest LLM part."""
    return sum(
        max(p.vision_cost for p in packs)
        + max(p.audio_cost for p in packs)
        + max(p.llm_cost for p in packs)
        for packs in micro_steps
    )
