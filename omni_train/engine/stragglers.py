"""How long each rank works on a step, without waiting for the others, and who is slower than them.

Rank 0 keeps the figures of the last steps. A rank whose own work takes a multiple of the ranks'
median in most of them is reported once, with the part of the step in which it loses the time, and
again when it was as fast as the others in between. Uneven packs even out over several steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median, median_low
from typing import Any

from omni_train.engine.run import Run, log

_STEPS = 8
# Less than that a step is noise of the machine, whatever the ratio.
_LEAST_S = 0.1


def spread(own: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return minimum, median and maximum of the ranks' own seconds, and the slowest rank.

    Args:
        own: seconds by part of the step, of ranks 0, 1, ...
    """
    totals = [sum(parts.values()) for parts in own]
    figures = {"min": min(totals), "median": median(totals), "max": max(totals)}
    return {
        **{name: round(value, 6) for name, value in figures.items()},
        "slowest": totals.index(max(totals)),
    }


class StragglerWatch:
    """Applies the rule on rank 0.

    Args:
        ratio: how many times the ranks' median is slow; 0 switches the rule off.
        run: whose events are written.
    """

    def __init__(self, ratio: float, run: Run) -> None:
        self._ratio, self._run = ratio, run
        self._recent: deque[Sequence[dict[str, float]]] = deque(maxlen=_STEPS)
        self._named: set[int] = set()

    def see(self, own: Sequence[dict[str, float]]) -> None:
        """Take note of a step; write a `straggler` event for a rank that has become slow."""
        if not self._run.is_main or not self._ratio or len(own) == 1:
            return
        self._recent.append(own)
        if len(self._recent) < _STEPS:
            return
        ranks = range(len(own))
        usual = [median(sum(step[rank].values()) for step in self._recent) for rank in ranks]
        # Of two ranks the quicker one is the measure.
        middle = median_low(usual)
        slow = {r for r in ranks if usual[r] > max(self._ratio * middle, middle + _LEAST_S)}
        for rank in sorted(slow - self._named):
            self._report(rank, usual[rank], middle)
        self._named = slow

    def _report(self, rank: int, seconds: float, middle: float) -> None:
        def usual(part: str, of: int) -> float:
            return median(step[of].get(part, 0.0) for step in self._recent)

        ranks = range(len(self._recent[-1]))
        lost = {
            part: usual(part, rank) - median_low(usual(part, other) for other in ranks)
            for part in self._recent[-1][rank]
        }
        part = max(lost, key=lambda name: lost[name])
        step = self._run.step
        self._run.event(
            "straggler",
            step=step,
            rank=rank,
            part=part,
            seconds=round(seconds, 6),
            median=round(middle, 6),
        )
        text = "step %d: rank %d is slow: %.3g s of its own a step, in %s, where others take %.3g s"
        log.warning(text, step, rank, seconds, part, middle)
