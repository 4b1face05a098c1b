"""`omni-train bench`: the table of ratios against peers; benchmarks/ is run, never imported."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence

from launch.stages import REPO
from omni_train.engine.exit_codes import ExitCode

Add = Callable[..., argparse.ArgumentParser]


def add_bench(add: Add) -> None:
    """Declare the command; its options are those of `python -m benchmarks`."""
    bench = add(
        "bench",
        "Measure against peers: rows B1 to B12 on a CPU, G1 to G7 on one GPU.",
        "omni-train bench                  B1 to B12, some 20 minutes on two cores",
        "omni-train bench B1 B5 --json",
        "omni-train bench G1 G3 --out gpu.json",
    )
    bench.add_argument("rows", nargs="*", metavar="ROW", help="such as B1; all of B without any")
    bench.add_argument("--json", action="store_true", help="print JSON instead of a table")
    bench.add_argument("--out", help="write the JSON here too")
    bench.add_argument("--pairs", type=int, help="timed pairs a line, at least")
    bench.add_argument("--torchvision", metavar="DIR", help="directory with one, for B3's peer")


def command(args: argparse.Namespace) -> list[str]:
    """Return the command that measures."""
    words: Sequence[str] = [sys.executable, "-m", "benchmarks", *args.rows]
    flags = ["--json"] if args.json else []
    for name in ("out", "pairs", "torchvision"):
        if (value := getattr(args, name)) is not None:
            flags += [f"--{name}", str(value)]
    return [*words, *flags]


def run_bench(args: argparse.Namespace) -> int:
    """Run the rows and return the exit status."""
    if not (REPO / "benchmarks" / "__main__.py").exists():
        print("omni-train: benchmarks/ is part of a checkout, not of the package", file=sys.stderr)
        return int(ExitCode.missing_input)
    return subprocess.run(command(args), cwd=REPO, check=False).returncode
