"""ZeRO-3 with a different mix of media on each rank: no hang, and the gradients of a plain model.

Two real gloo ranks; all eight subsets of {image, video, audio} on one against all eight on the
other (RECIPE.md section 4: a rank that skips a tower trains on wrong weights, then hangs).
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.numerics.ranks import run_ranks

TIMEOUT_S = 240


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Run both ranks once and return what each measured, by part."""
    result = tmp_path_factory.mktemp("zero3") / "result"
    run_ranks("zero3_worker", str(result), timeout_s=TIMEOUT_S)
    return [json.loads(result.with_suffix(f".{rank}").read_text()) for rank in range(2)]


def test_every_pair_of_modality_subsets_equals_a_plain_model(
    measured: list[dict[str, Any]],
) -> None:
    for summary in (rank["all"] for rank in measured):
        assert summary["pairs"] == 64
        assert summary["loss_error"] < 1e-4, summary
        assert summary["grad_error"] < 1e-5, summary
        assert summary["largest_grad"] > 1.0
        assert len(summary["trained"]) > 50


def test_frozen_parts_beside_a_trained_tower(measured: list[dict[str, Any]]) -> None:
    for summary in (rank["frozen"] for rank in measured):
        assert summary["pairs"] >= 8
        assert summary["loss_error"] < 1e-4, summary
        assert summary["grad_error"] < 1e-5, summary
        assert all(".audio_tower." in name for name in summary["trained"])


def test_the_sharded_checkpoint_builds_the_same_plain_model(measured: list[dict[str, Any]]) -> None:
    assert all(rank["all"]["reloaded"] for rank in measured)
