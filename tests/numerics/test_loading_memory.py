"""Under ZeRO-3 no rank holds the whole model while it is loaded: measured, on 400 MB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launch.local import child_environment
from launch.stages import REPO
from omni_train.models.build import build_thinker
from omni_train.models.config import ModelConfig, TinySizes
from tests.numerics.samples import small_tokenizer

WIDTH, LAYERS = 1024, 8
# Half of it is what a rank keeps; one module at a time comes on top.
MOST = 0.7


@pytest.mark.slow
def test_each_rank_grows_by_less_than_the_model(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    sizes = TinySizes(text_width=WIDTH, text_layers=LAYERS)
    config = ModelConfig(tokenizer=str(tmp_path / "tokenizer"), tiny=sizes)
    model = build_thinker(config, tokenizer, seed=0, dtype=torch.float32)
    (tmp_path / "weights").mkdir()
    save_file(dict(model.named_parameters()), tmp_path / "weights" / "model.safetensors")
    worker = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--nnodes=1"]
    worker += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    worker += ["-m", "tests.numerics.loading_worker", str(tmp_path), str(tmp_path / "weights")]
    worker += [str(tmp_path / "tokenizer"), str(WIDTH), str(LAYERS)]
    done = subprocess.run(
        worker,
        cwd=REPO,
        env=child_environment(ranks=2),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert found["model"] >= 400e6
        assert found["held"] < 0.55 * found["model"]
        share = found["growth"] / found["model"]
        print(f"rank {rank}: {share:.3f} of {found['model'] / 1e6:.0f} MB")
        # Less than its own half would mean that the measurement is wrong.
        assert 0.45 < share < MOST, found
