"""Thinker and Talker sharded over two gloo ranks give the loss and gradients of a plain model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 240


def test_two_sharded_ranks_equal_a_plain_model(tmp_path: Path) -> None:
    """With the Thinker frozen and joint; a rank without speech or media keeps in step."""
    result = tmp_path / "result"
    env = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.numerics.talker_zero3_worker", str(result)]
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            # torchrun ends its ranks on SIGTERM; on SIGKILL they would live on.
            process.terminate()
            output, _ = process.communicate()
            pytest.fail(f"hung after {TIMEOUT_S} s:\n{output[-3000:]}")
    assert process.returncode == 0, output[-3000:]
    for rank in range(2):
        measured = json.loads(result.with_suffix(f".{rank}").read_text())
        for joint, summary in measured.items():
            assert summary["loss_error"] < 1e-4, summary
            assert summary["grad_error"] < 1e-5, summary
            assert summary["largest_grad"] > 1.0
            thinker = any(name.startswith("thinker.") for name in summary["trained"])
            assert thinker == (joint == "True")
