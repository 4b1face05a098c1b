"""Fits the mel_kmeans codec to the speech of sets of shards, on any number of ranks.

    clips in an order that the seed decides -> dealt to ranks -> frames -> k-means -> codec

The first clips, read by every rank alike, give the starting centroids (k-means++, Arthur and
Vassilvitskii, 2007). Then each rank sums the frames of its clips and the sums are added up over
ranks: in integers, so one rank and many return the same centroids bit for bit.

Letters: N frames of this rank, K codebook, D numbers of a frame (mel_kmeans.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from omni_train.config.errors import ConfigError, DataError, check_fields
from omni_train.data.fetch import fetch
from omni_train.data.media import decode_audio
from omni_train.data.source import ShardSet, manifest_bytes
from omni_train.data.types import IndexRow, MediaInfo, MediaKind
from omni_train.engine.distributed import gather_json, sum_over_ranks
from omni_train.engine.run import Run
from omni_train.speech.mel import SAMPLE_RATE_HZ
from omni_train.speech.mel_kmeans import (
    SQUARED_STEPS,
    MelKMeansCodec,
    MelKMeansConfig,
    nearest,
    stacked_mel,
)

# Frames per code from which the starting centroids are drawn.
_START_FRAMES = 32
_MICROSECONDS = 1_000_000


@dataclass(kw_only=True, slots=True)
class ClipSource:
    """A set of shards whose sound files are speech.

    Args:
        path: directory or URL of the shards.
    """

    path: str


@dataclass(kw_only=True, slots=True)
class CodecFitConfig:
    """How the codebook is fitted.

    Args:
        max_audio_s: speech that is used; it is drawn shard by shard in an order of the seed.
        max_iterations: rounds of k-means; fewer where a round changes nothing.
        max_bad_share: share of unusable clips from which on the run stops.
    """

    max_audio_s: float = 3600.0
    max_iterations: int = 25
    max_bad_share: float = 0.01

    def __post_init__(self) -> None:
        check_fields(
            self,
            "kmeans",
            ("max_audio_s", self.max_audio_s > 0, "must be positive"),
            ("max_iterations", self.max_iterations >= 1, "must be at least 1"),
            ("max_bad_share", 0 <= self.max_bad_share < 1, "is a share from 0 to below 1"),
            remedy="change it",
        )


@dataclass(frozen=True, slots=True)
class Clip:
    """A sound file of a sample and where it lies."""

    source: str
    shard: str
    row: IndexRow
    info: MediaInfo


@dataclass(slots=True)
class Frames:
    """What a rank read.

    Args:
        values: int16 [N, D].
        bad: (source, shard, key, reason) of clips that could not be used.
    """

    values: Tensor
    bad: list[tuple[str, str, str, str]] = field(default_factory=list)


def speech_hashes(sources: dict[str, ClipSource]) -> dict[str, str]:
    """What identifies the speech of a run: the hash of each set's manifest.

    Raises:
        ConfigError: a set has no manifest.
    """
    return {
        name: str(xxhash.xxh3_64_hexdigest(manifest_bytes(source.path, key=f"speech.{name}.path")))
        for name, source in sources.items()
    }


def list_clips(sources: dict[str, ClipSource], *, max_audio_s: float, seed: int) -> list[Clip]:
    """Return clips of at most `max_audio_s` together, the same on every rank.

    Raises:
        DataError: `no_samples` where the sets hold no sound file, and what reading an index finds.
    """
    clips: list[Clip] = []
    total_us = 0
    for clip in _all_clips(sources, np.random.default_rng(seed)):
        total_us += clip.info.duration_us
        if clips and total_us > max_audio_s * _MICROSECONDS:
            break
        clips.append(clip)
    if not clips:
        raise DataError("no_samples", f"no sound file in {sorted(sources)}")
    return clips


def _all_clips(sources: dict[str, ClipSource], rng: np.random.Generator) -> Iterator[Clip]:
    sets = [ShardSet(name, source.path) for name, source in sources.items()]
    shards = [(one, number) for one in sets for number in range(len(one.counts))]
    for place in rng.permutation(len(shards)).tolist():
        one, number = shards[place]
        rows = one.rows(number)
        for row in rng.permutation(len(rows)).tolist():
            for info in rows[row].media:
                if info.kind is MediaKind.audio:
                    yield Clip(one.name, one.path_of(number), rows[row], info)


def read_frames(clips: list[Clip], config: MelKMeansConfig) -> Frames:
    """Read clips and turn them into frames; an unusable one is left out and reported."""
    width = config.frames_per_code * config.num_mel_bins
    parts = [torch.empty(0, width, dtype=torch.int16)]
    frames = Frames(parts[0])
    for clip in clips:
        try:
            raw = fetch(clip.shard, clip.row)
            wave = decode_audio(raw.media[clip.info.member], clip.info)
            parts.append(stacked_mel(wave, SAMPLE_RATE_HZ, config))
        except DataError as error:
            shard = clip.shard.rpartition("/")[2]
            frames.bad.append((clip.source, shard, clip.row.key, error.reason))
    frames.values = torch.cat(parts)
    return frames


def starting_centroids(frames: Tensor, count: int, *, seed: int) -> Tensor:
    """Choose int16 [count, D] of frames int16 [N, D] by k-means++.

    Raises:
        ConfigError: fewer different frames than centroids.
    """
    rng = np.random.default_rng(seed)
    chosen = [frames[int(rng.integers(len(frames)))]]
    distances = nearest(chosen[0][None], frames).distances
    while len(chosen) < count:
        ends = torch.cumsum(distances, 0)
        total = int(ends[-1])
        if total == 0:
            raise ConfigError(
                key="codec.codebook_size",
                value=count,
                rule=f"the first {len(frames)} frames hold only {len(chosen)} different ones",
                remedy="give more speech, or fewer codes",
            )
        drawn = torch.tensor(int(rng.integers(total)))
        chosen.append(frames[int(torch.searchsorted(ends, drawn, right=True))])
        distances = torch.minimum(distances, nearest(chosen[-1][None], frames).distances)
    return torch.stack(chosen)


def fit_codec(
    config: MelKMeansConfig, sources: dict[str, ClipSource], settings: CodecFitConfig, run: Run
) -> MelKMeansCodec:
    """Fit a codebook; all ranks must call and return the same codec.

    One `step` event per round; its loss is the mean squared error of a compressed mel value.

    Raises:
        DataError: `no_samples`, `too_many_bad`.
        ConfigError: the speech has fewer different frames than there are codes.
    """
    clips = list_clips(sources, max_audio_s=settings.max_audio_s, seed=run.config.seed)
    own = read_frames(clips[run.world.rank :: run.world.size], config)
    _report_bad(own, len(clips), settings, run)
    first = read_frames(_first_clips(clips, config), config).values
    if not len(first):
        raise DataError("no_samples", "none of the first clips can be used")
    seed, count = run.config.seed, config.codebook_size
    centroids = starting_centroids(first, count, seed=seed)
    width = centroids.shape[1]
    previous = -1
    for step in range(1, settings.max_iterations + 1):
        found = nearest(centroids, own.values)
        sums = torch.zeros(count, width, dtype=torch.int64)
        sums.index_add_(0, found.codes, own.values.to(torch.int64))
        sizes = torch.bincount(found.codes, minlength=count)
        squared = found.distances.sum()
        for part in (sums, sizes, squared):
            if run.world.size > 1:
                dist.all_reduce(part)
        num_frames, used = int(sizes.sum()), int((sizes > 0).sum())
        loss = int(squared) / (num_frames * width * SQUARED_STEPS)
        run.step = step
        run.event("step", step=step, loss=loss, tokens=num_frames, metrics={"codes_used": used})
        run.say(f"round {step} loss {loss:.6f} {used} of {count} codes used")
        if int(squared) == previous:
            break
        previous = int(squared)
        # A code that nothing chose stays where it is.
        mean = torch.round(sums.to(torch.float64) / sizes.clamp(min=1)[:, None]).to(torch.int16)
        centroids = torch.where(sizes[:, None] > 0, mean, centroids)
    return MelKMeansCodec(config, centroids)


def _first_clips(clips: list[Clip], config: MelKMeansConfig) -> list[Clip]:
    """As many clips as hold `_START_FRAMES` frames per code."""
    wanted_us = _START_FRAMES * config.codebook_size * _MICROSECONDS // config.frame_rate_hz
    ends = np.cumsum([clip.info.duration_us for clip in clips])
    return clips[: int(np.searchsorted(ends, wanted_us)) + 1]


def _report_bad(own: Frames, num_clips: int, settings: CodecFitConfig, run: Run) -> None:
    """Write the ledger and stop on all ranks alike where too much is unusable."""
    bad = [tuple(entry) for of_rank in gather_json(own.bad) for entry in of_rank]
    for source, shard, key, reason in bad:
        run.ledger(source=source, shard=shard, key=key, reason=reason)
    num_frames = sum_over_ranks([len(own.values)])[0]
    run.event("speech", clips=num_clips, bad=len(bad), frames=num_frames)
    if len(bad) > settings.max_bad_share * num_clips:
        raise DataError(
            "too_many_bad",
            f"{len(bad)} of {num_clips} clips are unusable, "
            f"kmeans.max_bad_share={settings.max_bad_share}; see ledger.jsonl",
        )
