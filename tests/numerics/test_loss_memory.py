"""The loss at 152,064 ids: the same numbers as with whole logits, at a seventh of the memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.b06_loss import GOAL, LONG, POSITIONS, slope

ROOT = Path(__file__).resolve().parents[2]
# Of the 32,768 positions: some eight tiles of 4,096 x 4,096 at once, in fp32, and twice the
# gradient of a head of 64 columns.
LONG_PEAK_BYTES = 1_000_000_000


def test_slope_is_that_of_a_line() -> None:
    assert slope([7 * n + 1000 for n in POSITIONS]) == pytest.approx(7.0)


@pytest.mark.slow
def test_memory_per_position_and_at_32768_positions() -> None:
    """In a process of its own, for a peak is the process's."""
    command = [sys.executable, "-m", "benchmarks.b06_loss", "--long", "--pairs", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    # 1 is a goal missed, perhaps one of time, which is no matter of this test.
    assert done.returncode in (0, 1), done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["memory of a position"]["ratio"] >= GOAL
    assert rows[f"peak at {LONG} positions"]["ours"] * 1e6 < LONG_PEAK_BYTES
