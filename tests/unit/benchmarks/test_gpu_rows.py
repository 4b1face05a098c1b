"""The GPU rows on a CPU at tiny size: that their code runs, and what they say without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    g1_layers,
    g2_memory,
    g3_loss,
    g4_syncs,
    g5_towers,
    g6_decode,
    g7_stage1,
    gpu,
    report,
)

REPO = Path(__file__).resolve().parents[3]
ROWS = [g1_layers, g2_memory, g3_loss, g4_syncs, g5_towers, g6_decode, g7_stage1]


@pytest.mark.parametrize("module", ROWS, ids=lambda module: module.__name__.rsplit(".", 1)[-1])
def test_the_code_of_a_row_runs(module) -> None:
    place = gpu.Place(torch.device("cpu"), tiny=True)
    rows, _ = module.measure(place, 1)
    assert rows
    assert all(row.ours >= 0 and row.ratio > 0 for row in rows), rows
    assert len({row.name for row in rows}) == len(rows)
    assert any(row.goal for row in rows)


def test_without_a_gpu_a_row_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch", "bench", "G3"],
        cwd=REPO,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == report.NOT_TAKEN
    assert f"not taken: {report.NO_GPU}" in done.stdout
