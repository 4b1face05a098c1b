"""Long packs: attention whose memory grows with the tokens and not their square; 32k tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from omni_train.data.visibility import NO_PARENT, Segments
from omni_train.models.attention import segment_attention
from omni_train.tracking.events import read_steps
from tests.numerics.ranks import run_ranks

TIMEOUT_S = 560
HEADS, KEY_HEADS, HEAD_SIZE = 2, 1, 16


def status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def attention_peak(segments: Segments) -> int:
    """Peak of resident memory of attention forward and backward, over what is there before."""
    total = segments.num_tokens
    query, key, value = (
        torch.randn(1, heads, total, HEAD_SIZE, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is there now
    before = status_bytes("VmRSS")
    out, _ = segment_attention(torch.nn.Module(), query, key, value, None, segments=segments)
    out.sum().backward()
    return status_bytes("VmHWM") - before


@pytest.mark.parametrize(
    ("segments", "tokens"),
    [
        (Segments([4096]), 4096),
        (Segments([2048, 1024, 1024], [NO_PARENT, 0, 0]), 4096),
        pytest.param(Segments([32_768]), 32_768, marks=pytest.mark.slow),
        pytest.param(Segments([16_384, 16_384], [NO_PARENT, 0]), 32_768, marks=pytest.mark.slow),
    ],
    ids=["document", "shared prompt", "document of 32k", "prompt and answer of 16k"],
)
def test_attention_never_builds_tokens_by_tokens(segments: Segments, tokens: int) -> None:
    """Not even one matrix of one byte for each pair and one head."""
    attention_peak(Segments([64]))  # what a first call loads is no part of it
    # Inputs, outputs and gradients are 200 KiB for 100 tokens at most; some is the allocator's.
    assert attention_peak(segments) < min(tokens**2, 2000 * tokens + 8_000_000)


@pytest.mark.slow
def test_two_ranks_train_on_one_pack_of_32768_tokens(tmp_path: Path) -> None:
    run_ranks("long_worker", str(tmp_path / "run"), timeout_s=TIMEOUT_S)
    steps = read_steps(tmp_path / "run" / "events.jsonl")
    plain = json.loads((tmp_path / "run" / "plain.json").read_text())
    print([(step["loss"], step["peak_rss_mib"], step["seconds"]) for step in steps])
    assert [step["tokens"] for step in steps] == [32_768] * 3
    assert steps[0]["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    losses = [step["loss"] for step in steps]
    assert losses[2] < losses[1] < losses[0] - 0.1
