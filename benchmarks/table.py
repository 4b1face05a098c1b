"""The README's table out of the JSON of `python -m benchmarks --out`, never by hand.

    python -m benchmarks.table benchmarks/results.json README.md           writes the block
    python -m benchmarks.table benchmarks/results.json README.md --check   ends with 1 if it differs

The block lies between the lines BEGIN and END, which are there already.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.suite import BENCHMARKS

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
_HEAD = ("| row | measured | ours | peer | ratio (range) | goal | met |", "|" + "---|" * 7)


def table(record: dict[str, Any]) -> str:
    """Return the Markdown table of all lines, then what could not be taken, versions and load."""
    lines = list(_HEAD)
    for line in record["rows"]:
        met = {True: "yes", False: "**no**", None: ""}[line["pass"]]
        goal = _number(line["goal"]) if line["goal"] else ""
        ratio = f"{_number(line['ratio'])} ({_number(line['low'])} to {_number(line['high'])})"
        what = f"{BENCHMARKS[line['row']].what}: {line['name']}"
        sides = " | ".join(_value(line[side], line["unit"]) for side in ("ours", "peer"))
        lines.append(f"| {line['row']} | {what} | {sides} | {ratio} | {goal} | {met} |")
    found = record["benchmarks"]
    lines += ["", *_missed(record["rows"])]
    lines += [f"{row} not taken: {f['not_taken']}." for row, f in found.items() if "not_taken" in f]
    loads = [load for f in found.values() for load in f["load"]] or [0.0]
    versions = {name: v for f in found.values() for name, v in f["versions"].items()}
    lines.append(
        f"Taken in {record['seconds'] / 60:.0f} minutes on {record['cores']} cores, which "
        f"{min(loads):.0f} to {max(loads):.0f} processes wanted. Medians of pairs that took turns; "
        "the ratio says how many times better ours is, of rates and of times alike."
    )
    lines.append(", ".join(f"{name} {v}" for name, v in sorted(versions.items())) + ".")
    return "\n".join(lines)


def _missed(rows: list[dict[str, Any]]) -> list[str]:
    """What misses its goal, by how much and why; lines with one cause stand together."""
    by_cause: dict[tuple[str, str], list[str]] = {}
    for line in rows:
        if line["pass"] is False:
            # A figure more than in the table, for some miss by a hair.
            share = f"{line['name']}: {line['ratio']:.4g} of {line['goal']:.4g}"
            by_cause.setdefault((line["row"], line["why"]), []).append(share)
    lines = [
        f"- {row}, {'; '.join(names)}. {why or 'The cause is not known'}."
        for (row, why), names in by_cause.items()
    ]
    return ["Goals that are missed:", "", *lines, ""] if lines else []


def _value(value: float, unit: str) -> str:
    # A mean of ratios has no sides.
    return f"{_number(value)} {unit}".rstrip() if value else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def replaced(text: str, block: str) -> str:
    """Return `text` with `block` between the marks.

    Raises:
        ValueError: the marks are not there, each once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the text needs one line {BEGIN} and after it one line {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Write or check the block."""
    parser = argparse.ArgumentParser(description="The table of a JSON in a Markdown file.")
    parser.add_argument("results", type=Path)
    parser.add_argument("markdown", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would differ")
    args = parser.parse_args()
    record = json.loads(args.results.read_text(encoding="ascii"))
    text = args.markdown.read_text(encoding="utf-8")
    new = replaced(text, table(record))
    if args.check:
        if new != text:
            print(f"{args.markdown} has not the table of {args.results}", file=sys.stderr)
        return int(new != text)
    args.markdown.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
