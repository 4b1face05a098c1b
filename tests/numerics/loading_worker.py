"""Loads a model on each rank and says how its anonymous memory grew; see test_loading_memory.py.

torchrun ... loading_worker.py OUT WEIGHTS TOKENIZER WIDTH LAYERS
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

from omni_train.data.tokenizer import load_tokenizer
from omni_train.engine.deepspeed import DeepSpeedConfig, Precision, import_deepspeed
from omni_train.engine.distributed import barrier, get_world, init_distributed
from omni_train.models.build import build_for_training
from omni_train.models.config import ModelConfig, TinySizes


def anonymous_bytes() -> int:
    """Anonymous memory of this process; pages of files are not in it."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
    return 1024 * int(line.split()[1])


class Peak:
    """Samples the memory in a thread."""

    def __init__(self) -> None:
        self.bytes, self._end = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._end.wait(0.002):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *ended: object) -> None:
        self._end.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous_bytes())


def main() -> None:
    out, weights, tokenizer_dir, width, layers = sys.argv[1:]
    world = init_distributed()
    import_deepspeed()
    tokenizer = load_tokenizer(tokenizer_dir)
    config = ModelConfig(
        tokenizer=tokenizer_dir,
        init_from=weights,
        tiny=TinySizes(text_width=int(width), text_layers=int(layers)),
    )
    barrier()
    before = anonymous_bytes()
    with Peak() as peak:
        model = build_for_training(
            config, tokenizer, DeepSpeedConfig(precision=Precision.fp32), seed=0
        )
    numel = sum(int(param.ds_numel) for param in model.parameters())
    held = sum(int(param.ds_tensor.numel()) for param in model.parameters())
    found = {"growth": peak.bytes - before, "model": 4 * numel, "held": 4 * held}
    Path(out, f"rank-{world.rank}.json").write_text(json.dumps(found))
    barrier()
    assert get_world().size == 2


if __name__ == "__main__":
    main()
