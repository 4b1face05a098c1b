"""Which rows of an index are used: limits on what was measured when the index was made.

Done here: the decisions, from an index as columns without an object per row, and counting them.
Not done here: measuring the scores (data_pipelines/filters.py), leaving rows out (source.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from omni_train.config.errors import ConfigError, DataError
from omni_train.data.types import MediaKind

# Scores of an index row, by name:
#   clipping_share         share of the sound's samples that lie at full scale
#   silence_share          share of the sound's 20 ms windows below -50 dB of full scale
#   words_per_second       words of the replies per second of sound
#   repeated_ngram_share   share of the replies' 4-grams that came before in the same sample
#   av_mismatch_s          seconds by which sound and picture of a clip start or end apart
QUALITY = (
    "clipping_share",
    "silence_share",
    "words_per_second",
    "repeated_ngram_share",
    "av_mismatch_s",
)
FILTER_COLUMNS = (
    "key",
    "language",
    "content_hash",
    *(f"quality.{name}" for name in QUALITY),
    "media.list.element.kind",
    "media.list.element.width",
    "media.list.element.height",
    "media.list.element.duration_us",
)
_MICROSECONDS_PER_SECOND = 1_000_000
_SECONDS_PER_HOUR = 3600

Flags = NDArray[np.bool_]


@dataclass(kw_only=True, slots=True)
class FilterConfig:
    """Limits on the samples of a source; None, empty and False leave a limit out.

    A limit concerns the samples that have what it is about: a duration concerns every sound and
    clip, pixels and aspect every picture and clip, and a sample passes with all of them.

    Args:
        min_duration_s, max_duration_s: of each sound and clip.
        min_pixels, max_pixels: width times height.
        max_aspect: the longer side over the shorter.
        languages: those that are kept; a sample without a language is dropped.
        min_words_per_second, max_words_per_second: speech rate.
        max_clipping_share, max_silence_share, max_repeated_ngram_share: 0..1.
        max_av_mismatch_s: how far sound and picture of a clip may start or end apart.
        drop_duplicates: keep the first of samples with the same media and texts.
    """

    min_duration_s: float | None = None
    max_duration_s: float | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_aspect: float | None = None
    languages: list[str] = field(default_factory=list)
    min_words_per_second: float | None = None
    max_words_per_second: float | None = None
    max_clipping_share: float | None = None
    max_silence_share: float | None = None
    max_repeated_ngram_share: float | None = None
    max_av_mismatch_s: float | None = None
    drop_duplicates: bool = False

    def __post_init__(self) -> None:
        for name in ("duration_s", "pixels", "words_per_second"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low is not None and high is not None and low > high:
                raise ConfigError(
                    key=f"filters.min_{name}",
                    value=low,
                    rule=f"more than filters.max_{name}={high}: nothing would be kept",
                    remedy="swap them or widen the range",
                )
        for name in ("clipping_share", "silence_share", "repeated_ngram_share"):
            share = getattr(self, f"max_{name}")
            if share is not None and not 0 <= share <= 1:
                raise ConfigError(
                    key=f"filters.max_{name}",
                    value=share,
                    rule="a share lies between 0 and 1",
                    remedy="give a fraction, not a percentage",
                )
        if self.max_aspect is not None and self.max_aspect < 1:
            raise ConfigError(
                key="filters.max_aspect",
                value=self.max_aspect,
                rule="the longer side over the shorter is at least 1",
                remedy="use 1 or more",
            )


@dataclass(frozen=True, slots=True)
class Counted:
    """Samples, and hours of their sound and clips."""

    samples: int
    hours: float


def decide(
    table: pa.Table, config: FilterConfig, *, seen: set[str] | None = None
) -> NDArray[np.object_]:
    """Return '' for each row that is kept, else the reason why it is not.

    The reasons are the config's names: `min_duration_s`, `languages`, `drop_duplicates` and so on;
    of several, the first in the order of the config.

    Args:
        table: an index, or several, with `FILTER_COLUMNS` at least.
        config: limits.
        seen: content hashes of what was kept before, in other shards; this call adds its own.

    Raises:
        DataError: `not_measured` where a limit needs a score and the index has none.
    """
    _check_measured(table, config)
    reasons = np.full(table.num_rows, "", dtype=np.object_)
    for name, dropped in _limits(table, config):
        reasons[dropped & (reasons == "")] = name
    if config.drop_duplicates:
        seen = set() if seen is None else seen
        kept = np.flatnonzero(reasons == "")
        hashes = table.column("content_hash").take(kept).to_pylist()
        for row, found in zip(kept.tolist(), hashes, strict=True):
            if found in seen:
                reasons[row] = "drop_duplicates"
            seen.add(found)
    return reasons


def count(table: pa.Table, decisions: NDArray[np.object_]) -> dict[str, Counted]:
    """Return how many samples and hours each reason has; '' counts what is kept."""
    owner, media = _media(table)
    microseconds = np.bincount(
        owner, weights=media.field("duration_us").to_numpy(), minlength=table.num_rows
    )
    scale = _MICROSECONDS_PER_SECOND * _SECONDS_PER_HOUR
    same = {reason: decisions == reason for reason in sorted(set(decisions.tolist()))}
    return {
        reason: Counted(int(rows.sum()), float(microseconds[rows].sum()) / scale)
        for reason, rows in same.items()
    }


def _media(table: pa.Table) -> tuple[NDArray[np.int64], pa.StructArray]:
    """Return the media of all rows, and which row each belongs to."""
    media = table.column("media").combine_chunks()
    counts = pc.list_value_length(media).to_numpy()
    return np.repeat(np.arange(table.num_rows), counts), media.flatten()


def _limits(table: pa.Table, config: FilterConfig) -> Iterable[tuple[str, Flags]]:
    """Yield (name of the limit, which rows break it), for each limit that is set."""
    owner, media = _media(table)
    timed = pc.not_equal(media.field("kind"), MediaKind.image.name).to_numpy(zero_copy_only=False)
    seen = pc.not_equal(media.field("kind"), MediaKind.audio.name).to_numpy(zero_copy_only=False)
    width = media.field("width").to_numpy().astype(np.int64)
    height = media.field("height").to_numpy().astype(np.int64)
    seconds = media.field("duration_us").to_numpy() / _MICROSECONDS_PER_SECOND
    pixels = width * height
    aspect = np.maximum(width, height) / np.maximum(np.minimum(width, height), 1)

    def any_medium(broken: Flags) -> Flags:
        return np.bincount(owner[broken], minlength=table.num_rows).astype(np.bool_)

    if config.min_duration_s is not None:
        yield "min_duration_s", any_medium(timed & (seconds < config.min_duration_s))
    if config.max_duration_s is not None:
        yield "max_duration_s", any_medium(timed & (seconds > config.max_duration_s))
    if config.min_pixels is not None:
        yield "min_pixels", any_medium(seen & (pixels < config.min_pixels))
    if config.max_pixels is not None:
        yield "max_pixels", any_medium(seen & (pixels > config.max_pixels))
    if config.max_aspect is not None:
        yield "max_aspect", any_medium(seen & (aspect > config.max_aspect))
    if config.languages:
        kept = pc.is_in(table.column("language"), pa.array(config.languages, pa.string()))
        yield "languages", ~kept.to_numpy()
    quality = table.column("quality").combine_chunks()
    for name in QUALITY:
        low, high = getattr(config, f"min_{name}", None), getattr(config, f"max_{name}")
        # A missing score is NaN, and nothing compares with NaN.
        scores = pc.fill_null(quality.field(name), np.nan).to_numpy(zero_copy_only=False)
        if low is not None:
            yield f"min_{name}", scores < low
        if high is not None:
            yield f"max_{name}", scores > high


def _check_measured(table: pa.Table, config: FilterConfig) -> None:
    limits = [getattr(config, f"{end}_{name}", None) for name in QUALITY for end in ("min", "max")]
    if not config.drop_duplicates and all(limit is None for limit in limits):
        return
    bare = pc.equal(table.column("content_hash"), "").to_numpy()
    if bare.any():
        raise DataError(
            "not_measured",
            "the index has no quality scores; make it again with `omni-train data index`",
            key=table.column("key")[int(bare.argmax())].as_py(),
        )
