"""G7: stage 1 end to end: real media through the planned loader, encoders learn, the LLM is frozen.

Pictures and speech in shards, decoded and encoded by the loader's workers while the device trains;
8 language layers and 8 of each tower's, 7B's widths, packs of 8,192 tokens, plain AdamW over the
encoders. Stall is the time that the loop waits for a batch, of the whole; MFU is `thinker_flops`
over seconds and the ceiling of a product of 8192^3, measured here. There is no peer: nobody has
published such a step.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import gpu
from benchmarks.b07_read import TOKENIZER, write_corpus
from benchmarks.report import Row
from omni_train.data.config import DataConfig, SourceConfig
from omni_train.data.loader import PlannedLoader
from omni_train.models.groups import group_of
from omni_train.objectives.next_token import next_token

MOST_STALL, LEAST_MFU = 0.03, 0.35
LEARNS = ("audio_encoder", "audio_projection", "vision_encoder", "vision_merger")


def measure(place: gpu.Place, pairs: int) -> tuple[list[Row], list[str]]:
    """Return the rows."""
    model, _ = gpu.thinkers(place, layers=8, tower_layers=8)
    model.spec = gpu.data_spec(place)
    for name, param in model.named_parameters():
        param.requires_grad_(group_of(name) in LEARNS)
    learning = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5)
    steps, warm_up = 6 * pairs, 3
    workers = place.pick(max((os.cpu_count() or 2) - 2, 1), 0)
    waited = flops = 0.0
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), num_samples=place.pick(4000, 40), num_shards=4)
        config = DataConfig(
            sources={"media": SourceConfig(path=folder)},
            pack_tokens=place.pick(8192, 512),
            global_batch_packs=1,
            num_workers=workers,
        )
        loader = PlannedLoader(
            config,
            tokenizer=TOKENIZER,
            spec=model.spec,
            rank=0,
            world_size=1,
            seed=0,
            ledger=lambda **row: None,
        )
        items = iter(loader.steps())
        begun = 0.0
        for number in range(warm_up + steps):
            if number == warm_up:
                begun, waited, flops = time.perf_counter(), 0.0, 0.0
            start = time.perf_counter()
            batch = next(items).micro_batches[0]
            waited += time.perf_counter() - start

            def step(batch=batch) -> None:
                nonlocal flops
                output = next_token(model, batch.to(place.device))
                (output.loss / max(output.num_tokens, 1)).backward()
                optimizer.step()
                optimizer.zero_grad()
                flops += output.flops

            # The end of the step is waited for, so that the loader's time is not hidden behind it.
            gpu.seconds(place, step)
        whole = time.perf_counter() - begun
        items.close()
    ceiling = gpu.matmul_flops(place)
    mfu = flops / whole / ceiling
    rows = [
        gpu.limit_row("share of waiting for data", waited / whole, MOST_STALL, ""),
        Row("MFU", mfu, LEAST_MFU, "", *([mfu / LEAST_MFU] * 3), 1.0),
    ]
    return rows, [f"{steps} steps of {config.pack_tokens} tokens, {workers} data workers"]


if __name__ == "__main__":
    gpu.run_main("Stage 1 end to end.", measure)
