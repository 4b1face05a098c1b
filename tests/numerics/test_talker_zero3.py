"""Thinker and Talker sharded over two gloo ranks give the loss and gradients of a plain model."""

from __future__ import annotations

import json
from pathlib import Path

from tests.numerics.ranks import run_ranks

TIMEOUT_S = 240


def test_two_sharded_ranks_equal_a_plain_model(tmp_path: Path) -> None:
    """With the Thinker frozen and joint; a rank without speech or media keeps in step."""
    result = tmp_path / "result"
    run_ranks("talker_zero3_worker", str(result), timeout_s=TIMEOUT_S)
    for rank in range(2):
        measured = json.loads(result.with_suffix(f".{rank}").read_text())
        for joint, summary in measured.items():
            assert summary["loss_error"] < 1e-4, summary
            assert summary["grad_error"] < 1e-5, summary
            assert summary["largest_grad"] > 1.0
            thinker = any(name.startswith("thinker.") for name in summary["trained"])
            assert thinker == (joint == "True")
