"""What a global step costs at least, whatever the packing and the assignment.

Simple bound, for vision, sound and LLM apart, then added up:

    max(sum over the samples / N, the costliest single sample)        N ranks

Tight bound: also that a pack holds no more than its budget, and that the largest sample raises one
of the M micro-steps and not all. Say which of the largest pictures, sounds and documents lie in the
same micro-step (five ways); those micro-steps are g = 1, 2, .., all others together are g = 0. Let
W[g, k] be the cost of part k there, s[g, k] what the largest samples force on it (none on g = 0),
c[i, k] the cost of sample i over N, t[i] its tokens over N budgets and m[g] the micro-steps of g.
Then W >= s, W >= the sum of c over the samples there, m >= the sum of t over them, so that for any
prices 0 <= p[g, k] <= 1 (p[0, k] = 1) and q[g] >= 0

    sum of W >= sum of (1 - p) s - sum of q m + sum over i of min over g (p[g] . c[i] + q[g] t[i])

since each sample lies in one g. The least over the five ways holds for every plan. Prices only make
the bound better or worse, never wrong; they are sought by ascent on a part of the samples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]
FloatArray = NDArray[np.float64]

# Micro-steps, 1 and up, of the largest vision, sound and LLM sample.
_WAYS = ((1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1), (1, 2, 3))
_ASCENT_SAMPLES = 1000
_ASCENT_STEPS = 100
_RATES = (0.5, 0.3, 0.2, 0.1)


def simple_bound(costs: FloatArray, num_ranks: int) -> float:
    """Return the simple bound of samples with `costs`, float64 [R, 3]."""
    return float(np.maximum(costs.sum(axis=0) / num_ranks, costs.max(axis=0)).sum())


def tight_bound(
    tokens: Int64Array, costs: FloatArray, *, num_ranks: int, num_micro: int, pack_tokens: int
) -> float:
    """Return the tight bound; never below the simple one.

    Args:
        tokens: int64 [R], of the samples of a global step.
        costs: float64 [R, 3], vision, sound, LLM.
        num_ranks, num_micro: packs of a micro-step, micro-steps.
        pack_tokens: tokens a pack may hold.
    """
    parts = costs / num_ranks
    share = tokens / (num_ranks * pack_tokens)
    largest = costs[costs.argmax(axis=0)]
    found = []
    for way in _WAYS:
        num_forced = max(way)
        if num_forced > num_micro:
            continue
        forced = np.zeros((num_forced + 1, 3))
        for group, sample in zip(way, largest, strict=True):
            forced[group] = np.maximum(forced[group], sample)
        size = np.array([num_micro - num_forced, *[1] * num_forced], dtype=np.float64)
        if num_micro == num_forced:
            forced, size = forced[1:], size[1:]
        some = slice(None, None, max(1, len(share) // _ASCENT_SAMPLES))
        scale = share.sum() / share[some].sum()
        prices, rents = _ascend(parts[some] * scale, share[some] * scale, forced, size)
        found.append(_value(parts, share, forced, size, prices, rents)[0])
    return max(min(found), simple_bound(costs, num_ranks))


def _value(
    parts: FloatArray,
    share: FloatArray,
    forced: FloatArray,
    size: FloatArray,
    prices: FloatArray,
    rents: FloatArray,
) -> tuple[float, Int64Array]:
    """Return the bound at these prices [G, 3] and rents [G], and the group of each sample."""
    each = parts @ prices.T + share[:, None] * rents
    group = each.argmin(axis=1)
    paid = each[np.arange(len(each)), group].sum()
    return float(((1 - prices) * forced).sum() - rents @ size + paid), group


def _ascend(
    parts: FloatArray, share: FloatArray, forced: FloatArray, size: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return the best prices and rents found by AdaGrad ascent, at one rate after the other."""
    free = forced.any(axis=1)
    prices, rents = np.ones_like(forced), np.zeros(len(size))
    unit = forced.max(axis=0).sum()
    best = (-np.inf, prices, rents)
    for rate in _RATES:
        squares = np.zeros((len(size), 4))
        prices, rents = best[1], best[2]
        for _ in range(_ASCENT_STEPS):
            value, group = _value(parts, share, forced, size, prices, rents)
            best = max(best, (value, prices, rents), key=lambda found: found[0])
            sums = np.stack([np.bincount(group, part, len(size)) for part in parts.T], axis=1)
            slopes = np.column_stack([sums - forced, np.bincount(group, share, len(size)) - size])
            squares += slopes**2
            step = rate * slopes / np.sqrt(squares + 1e-30)
            prices = np.where(free[:, None], np.clip(prices + step[:, :3], 0, 1), 1.0)
            rents = np.maximum(rents + step[:, 3] * unit, 0)
    return best[1], best[2]
