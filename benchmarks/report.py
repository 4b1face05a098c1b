"""Paired timing and the table that every benchmark prints.

Both sides are timed in turn, so that a slow minute hits both, and again until the median is known
(`_until_known`): a machine that others share would otherwise give another table each time.

A script ends with 0 where every goal is met, 1 where one is missed, 66 where nothing could be
measured here (a GPU or a peer is missing), and then says what.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version

PAIRS = 5
# Of the 95 % interval of a median, upper over lower end; and the seconds in which to get there.
KNOWN, MOST_S = 1.1, 5.0
MISSED, NOT_TAKEN = 1, 66
NO_TORCHVISION = "the peer needs torchvision; see the head of benchmarks/b03_encode.py"
NO_GPU = "needs one NVIDIA GPU, and torch finds none"


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison, median of the pairs.

    Args:
        name: what is done.
        ours, peer: in `unit`.
        unit: `ms` (less is better) or a rate (more is better).
        ratio: how many times better ours is; median over the pairs.
        low, high: range of that ratio.
        goal: the least ratio that is accepted; 0 where the row is only shown.
        why: what keeps it from its goal, for where it is missed.
    """

    name: str
    ours: float
    peer: float
    unit: str
    ratio: float
    low: float
    high: float
    goal: float
    why: str = ""

    @property
    def passed(self) -> bool:
        """Whether the goal is met."""
        return self.ratio >= self.goal


def compare(
    name: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    goal: float,
    pairs: int = PAIRS,
    items: int = 0,
    before: Callable[[], object] = lambda: None,
    repeats: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    why: str = "",
) -> Row:
    """Time both sides in turn and return the row; each runs once before, untimed.

    Args:
        name: of the row.
        ours, peer: do the same work once.
        goal: least ratio.
        pairs: least timed pairs, of which the median counts.
        items: things handled by one call, to show a rate; 0 shows milliseconds.
        before: called, untimed, before each timing of either side.
        repeats: calls of either side in one timing, for work that is short.
        clock: gives seconds; wall time by default.
        why: see `Row`.
    """

    def both() -> tuple[float, float]:
        before()
        mine = _seconds(ours, repeats, clock)
        before()
        return mine, _seconds(peer, repeats, clock)

    both()
    times: list[tuple[float, float]] = []

    def ratio() -> float:
        times.append(both())
        return times[-1][1] / times[-1][0]

    ratios = _until_known(ratio, pairs)
    mine, theirs = (statistics.median(side) for side in zip(*times, strict=True))
    if items:
        mine, theirs, unit = items / mine, items / theirs, "1/s"
    else:
        mine, theirs, unit = mine * 1e3, theirs * 1e3, "ms"
    spread = (statistics.median(ratios), min(ratios), max(ratios))
    return Row(name, mine, theirs, unit, *spread, goal, why)


def limit(
    name: str,
    work: Callable[[], object],
    *,
    most_ms: float,
    times: int = PAIRS,
    why: str = "",
) -> Row:
    """Time one side against a limit and return the row; it runs once before, untimed.

    Args:
        name: of the row.
        work: is timed.
        most_ms: the limit in milliseconds; the ratio is the limit over the median.
        times: least number of timings.
        why: see `Row`.
    """
    work()
    taken = _until_known(lambda: _seconds(work) * 1e3, times)
    middle = statistics.median(taken)
    low, high = most_ms / max(taken), most_ms / min(taken)
    return Row(name, middle, most_ms, "ms", most_ms / middle, low, high, 1.0, why)


def mean_row(name: str, rows: list[Row], goal: float) -> Row:
    """Return the plain mean of the rows' ratios as a row of its own."""
    ratio, low, high = (
        statistics.mean(getattr(row, field) for row in rows) for field in ("ratio", "low", "high")
    )
    return Row(name, 0.0, 0.0, "", ratio, low, high, goal)


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks share."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", action="store_true", help="print JSON instead of a table")
    made.add_argument("--pairs", type=int, default=PAIRS, help="timed pairs a row, at least")
    return made


def show(rows: list[Row], packages: tuple[str, ...], notes: list[str], *, as_json: bool) -> int:
    """Print rows, notes and versions; return the exit status."""
    versions = {"Python": platform.python_version()} | {name: version(name) for name in packages}
    if as_json:
        record = {"rows": [record_of(row) for row in rows], "notes": notes, "versions": versions}
        sys.stdout.write(json.dumps(record) + "\n")
    else:
        lines = [HEAD, *map(line_of, rows), *(f"note: {note}" for note in notes)]
        lines.append(", ".join(f"{name} {found}" for name, found in versions.items()))
        sys.stdout.write("\n".join(lines) + "\n")
    return 0 if all(row.passed for row in rows) else MISSED


def not_taken(reason: str, *, as_json: bool) -> int:
    """Say why nothing was measured; return the exit status."""
    if as_json:
        record = {"rows": [], "notes": [], "versions": {}, "not_taken": reason}
        sys.stdout.write(json.dumps(record) + "\n")
    else:
        sys.stdout.write(f"not taken: {reason}\n")
    return NOT_TAKEN


HEAD = f"{'row':42} {'ours':>10} {'peer':>10} {'':5} {'ratio':>7} {'range':>15} {'goal':>5}"


def record_of(row: Row) -> dict[str, object]:
    """Return a row as JSON has it; `pass` is null where there is no goal."""
    return {**asdict(row), "pass": row.passed if row.goal else None}


def line_of(row: Row) -> str:
    """Return a row as the terminal shows it."""
    spread = f"{row.low:.2f} - {row.high:.2f}"
    verdict = "" if not row.goal else "pass" if row.passed else "MISSED"
    return (
        f"{row.name:42} {row.ours:10.2f} {row.peer:10.2f} {row.unit:5} {row.ratio:7.2f} "
        f"{spread:>15} {row.goal:5.2f} {verdict}"
    )


def _until_known(take: Callable[[], float], least: int) -> list[float]:
    """Return values, `least` at least, until the 95 % interval of their median is narrow.

    Its ends are order statistics, by the normal approximation of the binomial; of five values they
    are the least and the largest. After `MOST_S` seconds what there is must do.
    """
    found: list[float] = []
    start = time.perf_counter()
    while True:
        found.append(take())
        middle, reach = len(found) / 2, 0.98 * math.sqrt(len(found))
        ordered = sorted(found)
        low = ordered[max(0, math.floor(middle - reach))]
        high = ordered[min(len(found), math.ceil(middle + reach)) - 1]
        enough = high <= KNOWN * low or time.perf_counter() - start > MOST_S
        if len(found) >= least and enough:
            return found


def _seconds(
    work: Callable[[], object], repeats: int = 1, clock: Callable[[], float] = time.perf_counter
) -> float:
    start = clock()
    for _ in range(repeats):
        work()
    return (clock() - start) / repeats
