"""`omni-train runs tail`: the loss of a run as a curve of characters, live until the run ends."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from launch.runs import existing_run, read_state, status_of
from omni_train.engine.exit_codes import ExitCode
from omni_train.tracking.events import read_new

_ROWS, _LABEL, _LAST_STEPS = 14, 10, 5
_POLL_S = 0.5


def plot(values: list[float], *, width: int, rows: int = _ROWS) -> str:
    """Return a curve: `*` the mean of the steps of a column, `.` their range.

    Args:
        values: one per step; those that are not finite leave a gap.
        width: columns in all, the scale on the left included.
        rows: lines of the curve.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "no training step"
    low, high = min(finite), max(finite)
    span = high - low or 1.0
    columns = min(max(1, width - _LABEL), len(values))
    grid = [[" "] * columns for _ in range(rows)]

    def row_of(value: float) -> int:
        return round((high - value) / span * (rows - 1))

    for column in range(columns):
        first = column * len(values) // columns
        last = max(first + 1, (column + 1) * len(values) // columns)
        here = [value for value in values[first:last] if math.isfinite(value)]
        if here:
            for row in range(row_of(max(here)), row_of(min(here)) + 1):
                grid[row][column] = "."
            grid[row_of(sum(here) / len(here))][column] = "*"
    lines = []
    for number, cells in enumerate(grid):
        scale = high - span * number / (rows - 1)
        label = f"{scale:9.4g}" if number in (0, rows // 2, rows - 1) else ""
        lines.append(f"{label:>{_LABEL - 1}}|{''.join(cells)}".rstrip())
    return "\n".join(lines)


def tail(run: Path, *, once: bool, as_json: bool) -> int:
    """Show a run's curve and last steps, and follow it while it runs.

    Args:
        run: its directory.
        once: show what is there and end.
        as_json: print each `step` event as a line, instead of a picture.
    """
    follower = _Follower(existing_run(run))
    follower.read()
    if as_json:
        return _stream(follower, once=once)
    console = Console(highlight=False)
    if once or not follower.running:
        console.print(follower.picture(console.width))
        return int(ExitCode.done)
    try:
        with Live(follower.picture(console.width), console=console, auto_refresh=False) as live:
            while follower.running:
                time.sleep(_POLL_S)
                follower.read()
                live.update(follower.picture(console.width), refresh=True)
    except KeyboardInterrupt:
        console.print("stopped watching; the run goes on")
    return int(ExitCode.done)


class _Follower:
    """The step events of a run so far; a repeated step, after a resume, counts once."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.steps: dict[int, dict[str, Any]] = {}
        self.new: list[dict[str, Any]] = []
        self._offset = 0

    @property
    def running(self) -> bool:
        """Whether more steps may come."""
        return status_of(self.run, read_state(self.run)) == "running"

    def read(self) -> None:
        """Take in what has been written since."""
        events, self._offset = read_new(self.run / "events.jsonl", self._offset)
        self.new = [event for event in events if event.get("kind") == "step"]
        for event in self.new:
            # What a resumed run repeats replaces what came after its checkpoint.
            step = int(event["step"])
            self.steps = {number: e for number, e in self.steps.items() if number < step}
            self.steps[step] = event

    def picture(self, width: int) -> Group:
        """Return the curve and the last steps."""
        state = read_state(self.run)
        ordered = [self.steps[number] for number in sorted(self.steps)]
        status = status_of(self.run, state)
        head = f"{self.run}  {state.get('stage', '')}  {status}, {len(ordered)} steps"
        lines = [
            f"step {event['step']:>7}  loss {float(event['loss']):.4f}  "
            f"norm {float(event['grad_norm']['total']):.3g}  {event['tokens_per_s']:,.0f} tok/s"
            for event in ordered[-_LAST_STEPS:]
        ]
        curve = plot([float(event["loss"]) for event in ordered], width=min(width, 120))
        reason = str(state.get("reason", ""))
        return Group(
            Text(head, style="bold"),
            Text(curve),
            *(Text(line) for line in lines),
            *([Text(reason, style="red")] if reason else []),
        )


def _stream(follower: _Follower, *, once: bool) -> int:
    while True:
        for event in follower.new:
            print(json.dumps(event), flush=True)
        if once or not follower.running:
            return int(ExitCode.done)
        time.sleep(_POLL_S)
        follower.read()
