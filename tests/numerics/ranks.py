"""Starts a worker module of the tests on several real CPU ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(module: str, *arguments: str, ranks: int = 2, timeout_s: float) -> str:
    """Run `tests.numerics.MODULE` under torchrun and return what it printed; fail if it does."""
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", "-m", f"tests.numerics.{module}", *arguments]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            # torchrun ends its ranks on SIGTERM; on SIGKILL they would live on.
            process.terminate()
            output, _ = process.communicate()
            pytest.fail(f"hung after {timeout_s} s:\n{output[-3000:]}")
    assert process.returncode == 0, output[-3000:]
    return output
