"""`python -m benchmarks [ROW ...]`, or `omni-train bench`: the table of all rows, or of some.

B1 to B12 where none is named. Exit status 0 where every goal is met, 1 where one is missed, 66
where a row could not be taken here, 2 for a row that does not exist.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.report import HEAD, Row, line_of
from benchmarks.suite import BENCHMARKS, joined, run, status_of


def main() -> int:
    """Run the rows that are asked for."""
    listed = "\n".join(
        f"  {row:4} {entry.what}, against {entry.peer}" for row, entry in BENCHMARKS.items()
    )
    parser = argparse.ArgumentParser(
        prog="benchmarks",
        description="Ratios against peers.",
        epilog=f"rows:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="such as B1; all of B without any")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--out", type=Path, help="write the JSON here too; rows that were not asked for stay in it"
    )
    parser.add_argument("--pairs", type=int, help="timed pairs a line, at least; 5 by default")
    parser.add_argument(
        "--torchvision", type=Path, help="directory with one, for B3; see benchmarks/b03_encode.py"
    )
    args = parser.parse_args()
    rows = args.rows or [row for row in BENCHMARKS if row.startswith("B")]
    if unknown := [row for row in rows if row not in BENCHMARKS]:
        parser.error(f"there is no row {', '.join(unknown)}; one of {', '.join(BENCHMARKS)}")
    record, kept = run([]), run([])
    if args.out and args.out.exists():
        kept = json.loads(args.out.read_text(encoding="ascii"))
    for row in rows:
        record = joined(record, run([row], pairs=args.pairs, torchvision=args.torchvision))
        if args.out:
            # After each row, so that a failure costs none of those before it.
            whole = json.dumps(joined(kept, record), indent=1)
            args.out.write_text(whole + "\n", encoding="ascii")
    if args.json:
        sys.stdout.write(json.dumps(record, indent=1) + "\n")
        return status_of(record)
    print(HEAD)
    for row in rows:
        found = record["benchmarks"][row]
        print(f"-- {row} {BENCHMARKS[row].what}, against {BENCHMARKS[row].peer}")
        for line in record["rows"]:
            if line["row"] == row:
                given = {key: value for key, value in line.items() if key not in ("row", "pass")}
                print(line_of(Row(**given)))
                if line["pass"] is False and line["why"]:
                    print(f"  {line['why']}")
        if "not_taken" in found:
            print(f"not taken: {found['not_taken']}")
        for note in found["notes"]:
            print(f"note: {note}")
        print(", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    print(f"{record['seconds']:.0f} s on {record['cores']} cores")
    return status_of(record)


if __name__ == "__main__":
    sys.exit(main())
