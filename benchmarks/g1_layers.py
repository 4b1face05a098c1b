"""G1: the language model's layers and its head on a pack of 8,192 tokens, forward and backward.

7B's widths at a reduced depth (8 of 28 layers; with full AdamW 7.6 billion parameters do not fit
one GPU), documents of 2,048 tokens. FLOPs are 6 * matmul parameters * tokens, and causal attention
per document; nothing that is done again counts. The ceiling is a product of 8192^3, measured here.
Once without and once with full activation checkpointing; then against transformers' own layers with
the same pack and whole logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import gpu
from benchmarks.report import Row, compare
from omni_train.data.visibility import Segments
from omni_train.engine.recompute import Checkpointing, checkpoint_layers
from omni_train.models.attention import packed_hidden, register_attention

GOALS = {Checkpointing.none: 0.70, Checkpointing.full: 0.52}
OVER_PEER = 1.3


def pack(place: gpu.Place, total: int, length: int) -> tuple[Tensor, Segments]:
    """Return positions int64 [4, 1, T] and segments of equal documents."""
    restart = torch.arange(length, device=place.device).repeat(total // length)
    segments = Segments([length] * (total // length))
    return restart.expand(4, 1, -1), segments.to(place.device)


def measure(place: gpu.Place, pairs: int) -> tuple[list[Row], list[str]]:
    """Return the rows."""
    total, length = place.pick((8192, 2048), (64, 32))
    model, head = gpu.language_model(place, layers=8)
    config = model.config
    positions, segments = pack(place, total, length)
    embeds = torch.randn(1, total, config.hidden_size, device=place.device, dtype=place.dtype)
    targets = torch.randint(0, config.vocab_size, (total,), device=place.device)
    width = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    flops = 6.0 * (gpu.parameters(model) + gpu.parameters(head)) * total
    flops += 6.0 * config.num_hidden_layers * width * sum(n**2 for n in segments.lengths)

    def ours() -> None:
        hidden = packed_hidden(model, embeds, positions, segments)[0]
        (-head(hidden, targets).mean()).backward()
        gpu.clear(model)
        gpu.clear(head)

    def peer() -> None:
        out = model(inputs_embeds=embeds, position_ids=positions, use_cache=False)
        logits = head(out.last_hidden_state[0]).float()
        torch.nn.functional.cross_entropy(logits, targets).backward()
        gpu.clear(model)
        gpu.clear(head)

    ceiling = gpu.matmul_flops(place)
    rows = []
    model.set_attn_implementation(register_attention())
    for policy, goal in GOALS.items():
        checkpoint_layers(model, policy, offload=False)
        timed = gpu.median_s(place, ours, pairs)
        title = f"share of the ceiling, checkpointing {policy.name}"
        rows.append(gpu.rate_row(title, flops, timed, ceiling, goal))
    checkpoint_layers(model, Checkpointing.none, offload=False)

    def with_theirs() -> None:
        model.set_attn_implementation(gpu.peer_attention())
        gpu.seconds(place, peer)

    def with_ours() -> None:
        model.set_attn_implementation(register_attention())
        gpu.seconds(place, ours)

    title = f"time, peer's {gpu.peer_attention()}"
    rows.append(compare(title, with_ours, with_theirs, goal=OVER_PEER, pairs=pairs))
    return rows, [f"{config.num_hidden_layers} layers, {total} tokens, documents of {length}"]


if __name__ == "__main__":
    gpu.run_main("Layers and head, against the ceiling and transformers.", measure)
