"""Ranks that share packs get the loss and the gradients of a plain model on the whole packs.

Real gloo ranks under ZeRO-3, every kind of media, spans that a cut between ranks goes through.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from omni_train.config.errors import ConfigError
from omni_train.models.sequence_parallel import check_sequence_parallel, refuse_sequence_parallel
from tests.numerics.ranks import run_ranks

TIMEOUT_S = 240


def measured(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """Run the ranks and return what each measured, by pack."""
    result = folder / "result"
    run_ranks("sequence_worker", str(result), ranks=ranks, timeout_s=TIMEOUT_S)
    return [json.loads(result.with_suffix(f".{rank}").read_text()) for rank in range(ranks)]


# Four ranks: more than the two key and value heads, so each of these is on two ranks.
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_shared_packs_equal_a_plain_model(tmp_path: Path, ranks: int) -> None:
    reports = measured(tmp_path, ranks)
    for report in reports:
        for name, pack in report.items():
            assert pack["loss_error"] < 1e-4, (name, pack)
            assert pack["grad_error"] < 1e-4, (name, pack)
            assert pack["targets"][0] == pack["targets"][1], (name, pack)
            assert pack["largest_grad"] > 1.0 or name == "no sample", (name, pack)
    crossed = {name for name, pack in reports[0].items() if pack["crosses"]}
    assert crossed >= {"image", "audio", "all", "one clip"}
    # The pack `all` again, with layers that run twice.
    assert set(reports[0]) >= {"selective", "full"}


def test_sizes_that_fit_the_heads() -> None:
    """Those of the 7B and the 3B, and what is said of others."""
    for heads, kv, good in ((28, 4, (1, 2, 4, 28)), (16, 2, (1, 2, 4, 8, 16))):
        for size in range(1, 33):
            sizes = {"world_size": 32 * size, "num_heads": heads, "num_key_value_heads": kv}
            if size in good:
                check_sequence_parallel(size, **sizes)
            else:
                with pytest.raises(ConfigError, match=r"use one of \[1, 2, 4"):
                    check_sequence_parallel(size, **sizes)
    with pytest.raises(ConfigError, match="divisor of the number of ranks"):
        check_sequence_parallel(2, world_size=3, num_heads=28, num_key_value_heads=4)


def test_a_stage_without_shared_packs_refuses_the_setting() -> None:
    refuse_sequence_parallel(1, stage="a Talker stage")
    with pytest.raises(ConfigError, match=r"deepspeed\.sequence_parallel"):
        refuse_sequence_parallel(2, stage="a Talker stage")
