"""G5: both towers, forward and backward, against the ceiling and transformers' own.

7B's widths, 8 of 32 layers each; 16 pictures of 1,024 x 768 and 32 sounds of 30 s. FLOPs are
6 * parameters * patches, or frames after the convolutions; attention inside windows is not counted.
The worker's offsets and indices go along on our side; the peer makes its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import chunk_and_pad_features

from benchmarks import gpu
from benchmarks.report import Row, compare
from omni_train.data.collate import audio_kwargs, vision_kwargs

LEAST_RATE, OVER_PEER = 0.45, 1.5
Work = Callable[[], Tensor]


def vision(place: gpu.Place, ours, peer, spec) -> tuple[Work, Work, float]:
    """Return both sides' pass over the pictures, and its FLOPs."""
    count, high, wide = place.pick((16, 54, 72), (2, 4, 4))
    grid = torch.tensor([[1, high, wide]] * count)
    kwargs = {
        name: value.to(place.device) if isinstance(value, Tensor) else value
        for name, value in vision_kwargs(grid, spec).items()
    }
    width = 3 * spec.temporal_patch_size * spec.patch_size**2
    patches = torch.randn(count * high * wide, width, device=place.device, dtype=place.dtype)
    there = grid.to(place.device)
    mine, theirs = ours.thinker.model.visual, peer.model.visual
    return (
        lambda: mine(patches, grid_thw=there, **kwargs).pooler_output,
        lambda: theirs(patches, grid_thw=there).pooler_output,
        6.0 * gpu.parameters(mine.blocks) * len(patches),
    )


def audio(place: gpu.Place, ours, peer, spec) -> tuple[Work, Work, float]:
    """The same of the sounds."""
    count, frames = place.pick((32, 3000), (2, 220))
    lengths = torch.tensor([frames] * count)
    mel = torch.randn(spec.num_mel_bins, frames * count)
    chunks, chunk_lengths = chunk_and_pad_features(mel, lengths, spec.audio_chunk_frames // 2)
    kwargs = {
        name: value.to(place.device) if isinstance(value, Tensor) else value
        for name, value in audio_kwargs(chunk_lengths, lengths).items()
    }
    there, moved = lengths.to(place.device), chunks.to(place.device, place.dtype)
    flat = mel.to(place.device, place.dtype)
    mine, theirs = ours.thinker.model.audio_tower, peer.model.audio_tower
    return (
        lambda: mine(feature_lens=there, padded_feature=moved, **kwargs).last_hidden_state,
        lambda: theirs(flat, feature_lens=there).last_hidden_state,
        6.0 * gpu.parameters(mine.layers) * count * (frames // 2),
    )


def measure(place: gpu.Place, pairs: int) -> tuple[list[Row], list[str]]:
    """Return the rows."""
    models = gpu.thinkers(place, layers=1, tower_layers=8)
    spec, ceiling = gpu.data_spec(place), gpu.matmul_flops(place)
    rows = []
    for name, make in (("vision", vision), ("audio", audio)):
        mine, theirs, flops = make(place, *models, spec)
        with torch.no_grad():
            first, second = mine().float(), theirs().float()
        gap = float((first - second).abs().max() / second.abs().max())
        assert gap < place.pick(0.1, 1e-4), f"{name}: outputs differ by {gap}"

        def run(work: Work) -> None:
            work().float().square().mean().backward()
            for model in models:
                gpu.clear(model)

        timed = gpu.median_s(place, lambda mine=mine: run(mine), pairs)
        rows.append(
            gpu.rate_row(f"{name}, share of the ceiling", flops, timed, ceiling, LEAST_RATE)
        )
        rows.append(
            compare(
                f"{name}, time, peer's {gpu.peer_attention()}",
                lambda mine=mine: gpu.seconds(place, lambda: run(mine)),
                lambda theirs=theirs: gpu.seconds(place, lambda: run(theirs)),
                goal=OVER_PEER,
                pairs=pairs,
            )
        )
    return rows, []


if __name__ == "__main__":
    gpu.run_main("The towers.", measure)
