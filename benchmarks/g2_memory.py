"""G2: what a token costs in memory: the slope of the peak from 8,192 to 32,768 tokens.

All 28 layers of 7B with their head, bf16, every layer checkpointed; once with the layers' inputs on
the device and once in host memory. Weights and gradients are in no slope. transformers' own layers
with the same checkpointing and whole logits are the peer; at 32,768 tokens these alone take 20 GB,
so its slope is read from 2,048 to 8,192.
"""

from __future__ import annotations

import torch

from benchmarks import gpu
from benchmarks.g1_layers import pack
from benchmarks.report import Row
from omni_train.engine.recompute import Checkpointing, checkpoint_layers
from omni_train.models.attention import packed_hidden, register_attention

MOST_MB, MOST_OFFLOADED_MB = 0.36, 0.20


def measure(place: gpu.Place, pairs: int) -> tuple[list[Row], list[str]]:
    """Return the rows; a slope of two peaks needs no pairs."""
    model, head = gpu.language_model(place, layers=28)
    width, vocabulary = model.config.hidden_size, model.config.vocab_size

    def slope(sizes: tuple[int, int], *, plain: bool) -> float:
        peaks = []
        for total in sizes:
            positions, segments = pack(place, total, total // 4)
            embeds = torch.zeros(1, total, width, device=place.device, dtype=place.dtype)
            embeds.requires_grad_(True)
            targets = torch.randint(0, vocabulary, (total,), device=place.device)

            def ours(p=positions, s=segments, e=embeds, t=targets) -> None:
                hidden = packed_hidden(model, e, p, s)[0]
                (-head(hidden, t).mean()).backward()

            def peer(p=positions, e=embeds, t=targets) -> None:
                out = model(inputs_embeds=e, position_ids=p, use_cache=False)
                logits = head(out.last_hidden_state[0]).float()
                torch.nn.functional.cross_entropy(logits, t).backward()

            run = peer if plain else ours
            # The first pass makes the gradients of the weights, which stay.
            run()
            peaks.append(gpu.peak_bytes(place, run))
        return max(peaks[1] - peaks[0], 1) / (sizes[1] - sizes[0]) / 1e6

    sizes, peer_sizes = place.pick(((8192, 32_768), (2048, 8192)), ((32, 64), (32, 64)))
    model.set_attn_implementation(register_attention())
    rows = []
    for offload, most in ((False, MOST_MB), (True, MOST_OFFLOADED_MB)):
        checkpoint_layers(model, Checkpointing.full, offload=offload)
        name = "a token, inputs in host memory" if offload else "a token"
        rows.append(gpu.limit_row(name, slope(sizes, plain=False), most, "MB"))
    checkpoint_layers(model, Checkpointing.full, offload=False)
    model.set_attn_implementation(gpu.peer_attention())
    theirs = slope(peer_sizes, plain=True)
    ratio = theirs / rows[0].ours
    rows.append(Row("a token, peer", rows[0].ours, theirs, "MB", ratio, ratio, ratio, 0.0))
    return rows, [f"{model.config.num_hidden_layers} layers, {sizes[0]} to {sizes[1]} tokens"]


if __name__ == "__main__":
    gpu.run_main("Memory of a token.", measure)
