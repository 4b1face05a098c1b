"""Runs as text: the table, one run in full, and what differs between two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from launch.runs import RunRow

_COLOURS = {
    "done": "green",
    "running": "cyan",
    "preempted": "yellow",
    "failed": "red",
    "died": "red",
}
_ANY_WIDTH = 10_000


def print_list(rows: list[RunRow], root: Path) -> None:
    """Print a line for each run."""
    out = Console(highlight=False)
    if not rows:
        out.print(f"no run below {root}")
        return
    # Names stay whole: what is cut in two cannot be copied.
    for dropped in ((), ("ranks",), ("ranks", "tok/s"), ("ranks", "tok/s", "idle")):
        table = _table(rows, root, dropped)
        width = _width(table, out)
        if width <= out.width:
            break
    out.width = max(out.width, width)
    out.print(table)
    for row in rows:
        said = [row.reason, f"job {row.job}" if row.job and row.status != "done" else ""]
        if any(said):
            out.print(Text(f"{row.path}: {'; '.join(filter(None, said))}"), soft_wrap=True)


def _table(rows: list[RunRow], root: Path, dropped: tuple[str, ...]) -> Table:
    table = Table(show_edge=False, pad_edge=False, box=None, header_style="bold")
    for name in ("run", "status"):
        table.add_column(name, no_wrap=True)
    for name in ("step", "loss", "tok/s", "ranks", "idle"):
        if name not in dropped:
            table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        place = Path(row.path)
        name = str(place.relative_to(root)) if place != root else str(place)
        code = f" {row.exit_code}" if row.exit_code else ""
        steps = str(row.step or "") if row.max_steps is None else f"{row.step}/{row.max_steps}"
        cells = {
            "step": steps,
            "loss": "" if row.loss is None else f"{row.loss:.4g}",
            "tok/s": "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}",
            "ranks": "" if row.ranks is None else str(row.ranks),
            "idle": "" if row.changed is None else ago(row.changed),
        }
        table.add_row(
            Text(name),
            Text(f"{row.status}{code}", style=_COLOURS.get(row.status, "")),
            *(text for name, text in cells.items() if name not in dropped),
        )
    return table


def _width(table: Table, out: Console) -> int:
    """Columns that a table takes where nothing of it is folded."""
    return Measurement.get(out, out.options.update(width=_ANY_WIDTH), table).maximum


def print_run(values: dict[str, Any]) -> None:
    """Print one run in full."""
    out = Console(highlight=False)
    table = Table(show_header=False, show_edge=False, pad_edge=False, box=None)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    steps = f"{values['step']} of {values['max_steps']}" if values["max_steps"] else values["step"]
    lines = {
        "run": values["path"],
        "stage": values["stage"],
        "status": values["status"],
        "exit code": values["exit_code"],
        "reason": values["reason"],
        "steps": steps if values["events"] else "",
        "loss": "" if values["loss"] is None else f"{values['loss']:.4g}",
        "tokens/s": "" if values["tokens_per_s"] is None else f"{values['tokens_per_s']:,.0f}",
        "ranks": values["ranks"],
        "time": f"{values['seconds']:,.0f} s" if values["events"] else "",
        "job": values["job"],
        "last event": "" if values["changed"] is None else f"{ago(values['changed'])} ago",
        "checkpoints": ", ".join(values["checkpoints"]),
        "incomplete": ", ".join(values["incomplete"]),
        "events": _counts(values["events"]),
        "ledger": _counts(values["ledger"])
        or ("no sample was left out" if values["events"] else ""),
        "versions": ", ".join(f"{name} {number}" for name, number in values["versions"].items()),
    }
    for name, value in lines.items():
        if value not in (None, ""):
            table.add_row(name, Text(str(value)))
    out.print(table)


def print_differences(found: dict[str, dict[str, tuple[Any, Any]]], names: tuple[str, str]) -> None:
    """Print what differs, part by part."""
    out = Console(highlight=False)
    for part, keys in found.items():
        if not keys:
            out.print(f"{part}: the same")
            continue
        table = Table(show_edge=False, pad_edge=False, box=None, header_style="bold")
        for heading in (part, *names):
            table.add_column(heading, overflow="fold")
        for key, (one, two) in keys.items():
            table.add_row(Text(key), Text(_value(one)), Text(_value(two)))
        if _width(table, out) <= out.width:
            out.print(table)
            continue
        # Below one another, so that no value is cut.
        out.print(Text(part, style="bold"))
        for key, values in keys.items():
            out.print(Text(f"  {key}"), soft_wrap=True)
            for name, value in zip(names, values, strict=True):
                out.print(Text(f"    {_value(value)}    ({name})"), soft_wrap=True)


def _value(value: Any) -> str:
    return "(absent)" if value is None else str(value)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def ago(seconds: float) -> str:
    """Return a length of time in its largest unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
