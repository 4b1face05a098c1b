"""How many tokens each source gives to each window: weights, repeat limits, a curriculum.

A window takes a fixed number of tokens. Where each source stands at any window is a formula, not a
history: time is cut into phases within which every source gives the same number of tokens to every
window. A phase ends where the curriculum has other weights or where a source has been repeated as
often as it may; the window in which that happens is a phase of its own.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Phase:
    """Windows that are alike.

    Args:
        window: the first of them.
        start: tokens that each source has given before.
        quota: tokens that each source gives to each of them; all 0 where every source has ended.
    """

    window: int
    start: tuple[int, ...]
    quota: tuple[int, ...]


class Mixture:
    """Positions of all sources at any window.

    Args:
        limits: tokens after which each source ends; None where it may be repeated without end.
        weights: (first window, weight of each source), by rising window, the first at window 0.
        window_tokens: tokens of a window.
    """

    def __init__(
        self,
        limits: Sequence[int | None],
        weights: Sequence[tuple[int, Sequence[float]]],
        window_tokens: int,
    ) -> None:
        self._limits, self._weights = limits, weights
        self.window_tokens = window_tokens
        self.phases = self._make_phases()

    def spans(self, window: int) -> list[tuple[int, int]]:
        """Token positions (start, stop) of each source's part of a window."""
        place = bisect.bisect_right(self.phases, window, key=lambda p: p.window) - 1
        phase = self.phases[place]
        done = window - phase.window
        return [
            (start + done * quota, start + (done + 1) * quota)
            for start, quota in zip(phase.start, phase.quota, strict=True)
        ]

    @property
    def end_window(self) -> int | None:
        """The first window that gets nothing because every source has ended; None if endless."""
        return None if any(self.phases[-1].quota) else self.phases[-1].window

    def ended(self, window: int) -> list[int]:
        """Numbers of the sources that have given all they may before a window."""
        return [
            number
            for number, (limit, (start, _)) in enumerate(
                zip(self._limits, self.spans(window), strict=True)
            )
            if limit is not None and start >= limit
        ]

    def _make_phases(self) -> list[Phase]:
        start = [0] * len(self._limits)
        window = 0
        phases: list[Phase] = []
        while True:
            left = [
                None if limit is None else limit - done
                for limit, done in zip(self._limits, start, strict=True)
            ]
            weights = next(w for first, w in reversed(self._weights) if first <= window)
            change = next((first for first, _ in self._weights if first > window), None)
            quota = _fill(weights, left, self.window_tokens)
            phases.append(Phase(window, tuple(start), tuple(quota)))
            # How many windows can be alike: up to the next weights, or until a source runs short.
            ends = [] if change is None else [change - window]
            ends += [n // q for n, q in zip(left, quota, strict=True) if n is not None and q]
            if not ends:
                return phases
            length = min(ends)
            start = [done + length * q for done, q in zip(start, quota, strict=True)]
            window += length


def _fill(weights: Sequence[float], left: Sequence[int | None], tokens: int) -> list[int]:
    """Return tokens of each source: by weight, at most what is left, the rest to the others."""
    quota = [0] * len(weights)
    open_to = [i for i, weight in enumerate(weights) if weight > 0 and left[i] != 0]
    while open_to:
        spare = tokens - sum(quota)
        total = sum(weights[i] for i in open_to)
        share = {i: max(1, round(spare * weights[i] / total)) for i in open_to}
        short = {i: n for i in open_to if (n := left[i]) is not None and n <= share[i]}
        for i, wanted in (short or share).items():
            quota[i] = wanted
        open_to = [i for i in open_to if i not in short] if short else []
    return quota


def weights_by_window(
    names: Sequence[str],
    base: Mapping[str, float],
    curriculum: Sequence[tuple[int, Mapping[str, float]]],
    steps_per_window: int,
) -> list[tuple[int, list[float]]]:
    """Return (first window, weight of each source) of a curriculum by step.

    A change takes effect with the first window that begins at its step or later.
    """
    found = [(0, [base[name] for name in names])]
    for step, weights in sorted(curriculum, key=lambda entry: entry[0]):
        window = -(-step // steps_per_window)
        entry = (window, [weights.get(name, 0.0) for name in names])
        if found[-1][0] == window:
            found.pop()
        found.append(entry)
    return found
