"""G4: how often a step makes the host wait for the device, and how busy the device is.

One mixed pack: a picture, ten seconds of sound and a clip with sound, through both towers and 8
language layers of 7B's widths, forward and backward. Waits are the warnings of
`torch.cuda.set_sync_debug_mode`; busy is the time in which a kernel runs, of the time between the
ends of two steps, by torch.profiler. The peer is transformers' Thinker on the clip alone, for its
flag of sound in videos is one for a batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import gpu, media
from benchmarks.b03_encode import CONFIG, TEXTS, TOKENIZER, raw_sample
from benchmarks.report import Row
from omni_train.data.collate import collate
from omni_train.data.encode import encode
from omni_train.data.image import normalize_patches
from omni_train.data.types import Batch, EncodedSample, ModelSpec
from omni_train.objectives.next_token import next_token

LEAST_BUSY = 0.95
assert TEXTS == gpu.TEXTS, "the tiny model's ids are those of the same tokenizer"


def samples(place: gpu.Place, spec: ModelSpec) -> list[EncodedSample]:
    """Return a picture, a sound and a clip with sound, as the model takes them."""
    seconds, height, width = place.pick((20.0, 360, 640), (2.0, 56, 84))
    raws = [
        raw_sample("image", "0.jpg", media.jpeg(*place.pick((768, 1024), (84, 84)))),
        raw_sample("audio", "0.wav", media.wav(place.pick(10.0, 1.0))),
        raw_sample("video", "0.mkv", media.clip(seconds, height=height, width=width)),
    ]
    return [encode(raw, TOKENIZER, CONFIG, spec) for raw in raws]


def peer_inputs(place: gpu.Place, sample: EncodedSample) -> dict[str, Any]:
    """Return what transformers' Thinker takes of a clip with sound."""
    ids = sample.input_ids[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": sample.labels[None],
        "pixel_values_videos": normalize_patches(sample.patches, place.dtype),
        "video_grid_thw": sample.grid_thw,
        "video_second_per_grid": torch.ones(len(sample.grid_thw)),
        "input_features": sample.mel[None].to(place.dtype),
        "feature_attention_mask": torch.ones(1, sample.mel.shape[1], dtype=torch.long),
    }
    moved = {name: value.to(place.device) for name, value in inputs.items()}
    return {**moved, "use_audio_in_video": True}


def waits(place: gpu.Place, work: Callable[[], object]) -> int:
    """Return how often a call makes the host wait; 0 on a CPU, which waits for nothing."""
    if place.tiny:
        work()
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


def busy(place: gpu.Place, work: Callable[[], object], steps: int) -> float:
    """Return the share of the time in which a kernel runs, 0..1; 1 on a CPU."""
    if place.tiny:
        work()
        return 1.0
    from torch.profiler import ProfilerActivity, profile

    def several() -> None:
        for _ in range(steps):
            work()

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        wall = gpu.seconds(place, several)
    kernels = sum(event.self_device_time_total for event in profiler.key_averages())
    return kernels / 1e6 / wall


def measure(place: gpu.Place, pairs: int) -> tuple[list[Row], list[str]]:
    """Return the rows."""
    ours, peer = gpu.thinkers(place, layers=8, tower_layers=8)
    ours.spec = gpu.data_spec(place)
    made = samples(place, ours.spec)
    batch: Batch = collate(made, ours.spec).to(place.device)
    inputs = peer_inputs(place, made[-1])

    def step() -> None:
        next_token(ours, batch).loss.backward()
        gpu.clear(ours)

    def peer_step() -> None:
        peer(**inputs).loss.backward()
        gpu.clear(peer)

    counts, shares = [], []
    for run in (step, peer_step):
        run()
        counts.append(waits(place, run))
        shares.append(busy(place, run, pairs))
    # 1 for 0, so that a ratio of counts exists: none is 1, one is a half.
    none = 1 / (1 + counts[0])
    theirs = (1 + counts[1]) / (1 + counts[0])
    share = shares[0] / LEAST_BUSY
    rows = [
        Row("waits in a step, at most 0", counts[0], 0, "", none, none, none, 1.0),
        Row("waits in a step, peer", counts[0], counts[1], "", theirs, theirs, theirs, 0.0),
        Row("device busy", shares[0], LEAST_BUSY, "", share, share, share, 1.0),
        Row("device busy, peer", *shares, "", *([shares[0] / max(shares[1], 1e-9)] * 3), 0.0),
    ]
    return rows, [f"{batch.num_tokens} tokens; the peer's clip alone {made[-1].num_tokens}"]


if __name__ == "__main__":
    gpu.run_main("Host waits and busy share of a step.", measure)
