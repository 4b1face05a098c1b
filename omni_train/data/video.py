"""Which frames of a clip are used, how large, and when: times from timestamps, never from indices.

Done here: frame times, choice of frames and of their size, the part of the sound that is used,
times of the temporal patches and of the sound on the clip's own clock. `encode` and `measure` both
read `plan_clip`, so they cannot disagree. Not done here: decoding (clip.py), position ids
(models/tmrope.py).

Letters: F decoded frames of a clip, N chosen ones, t temporal patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from omni_train.data.image import smart_resize_many
from omni_train.data.types import (
    FrameRate,
    MediaInfo,
    ModelSpec,
    ProcessingConfig,
    SoundMismatch,
)

MICROSECONDS = 1_000_000
# Matroska rounds times to milliseconds, so a frame may lie that much before its true time.
TIME_GUARD_US = 1_000
# A clip is taken whole if its mean rate is at most this much above the wanted one.
RATE_TOLERANCE = 1.01

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ClipPlan:
    """What is used of a clip.

    Args:
        frames: numbers [N] of the frames, rising; N is a whole number of temporal patches, but
            for a clip that has fewer frames than one patch.
        height, width: pixels of a frame after resizing.
        num_audio_samples: samples of the sound that are used, at its own rate; 0 for none.
        mismatch_us: by how much sound and picture end apart, positive where the sound is longer;
            0 without sound.
        dropped: the policy leaves the whole clip out.
    """

    frames: list[int]
    height: int
    width: int
    num_audio_samples: int
    mismatch_us: int
    dropped: bool


def plan_clip(info: MediaInfo, config: ProcessingConfig, spec: ModelSpec) -> ClipPlan:
    """Return what is used of a clip. Pure: depends on nothing but its arguments."""
    times = frame_times_us(info)
    num_samples = info.num_audio_samples if info.has_audio and info.use_audio else 0
    mismatch_us = 0
    # A part of a clip was cut on purpose: the policy was asked about the whole.
    if num_samples and info.first_sample is None:
        picture_end_us = _picture_end_us(times, info)
        sound_us = num_samples * MICROSECONDS // info.sample_rate_hz
        mismatch_us = info.audio_start_us + sound_us - picture_end_us
    far_apart = abs(mismatch_us) > config.av_mismatch_tolerance_s * MICROSECONDS
    if far_apart and config.av_mismatch is SoundMismatch.trim:
        if mismatch_us > 0:
            kept_us = max(picture_end_us - info.audio_start_us, 0)
            num_samples = min(num_samples, kept_us * info.sample_rate_hz // MICROSECONDS)
        else:
            # The first frame stays: a clip without any picture is no clip.
            inside = times < picture_end_us + mismatch_us
            times = times[: max(int(inside.sum()), 1)]
    frames, height, width = _frames_and_size(times, info, config, spec)
    return ClipPlan(
        frames=frames,
        height=height,
        width=width,
        num_audio_samples=num_samples,
        mismatch_us=mismatch_us,
        dropped=far_apart and config.av_mismatch is SoundMismatch.drop,
    )


def _frames_and_size(
    times: Int64Array, info: MediaInfo, config: ProcessingConfig, spec: ModelSpec
) -> tuple[list[int], int, int]:
    """Return the frames, and the height and width to which they are resized."""
    deep, factor = spec.temporal_patch_size, spec.patch_size * spec.merge_size

    def size(max_pixels: int) -> tuple[int, int, int]:
        """Height and width of a frame in pixels, and its tokens after the merge."""
        low = min(config.video_min_pixels, max_pixels)
        heights, widths = smart_resize_many(
            np.array([max(info.height, 1)]),
            np.array([max(info.width, 1)]),
            factor=factor,
            min_pixels=low,
            max_pixels=max_pixels,
        )
        height, width = int(heights[0]), int(widths[0])
        return height, width, (height // factor) * (width // factor)

    most = max(config.video_max_frames // deep * deep, deep)
    height, width, tokens = size(config.video_max_pixels)
    if config.video_rate is FrameRate.budget:
        fitting = config.video_max_tokens // tokens * deep
        slowest = len(_at_rate(times, config.video_min_fps))
        wanted = min(slowest, most)
        wanted += -wanted % deep
        if fitting < wanted:
            patches = wanted // deep
            pixels = config.video_max_tokens // patches * factor**2
            height, width, tokens = size(max(pixels, config.video_min_pixels))
            fitting = min(config.video_max_tokens // tokens * deep, wanted)
        most = max(min(most, fitting), deep)
    chosen = _at_rate(times, config.video_fps)
    if len(chosen) > most:
        chosen = _in_slots(times, most)
    return _whole_patches(chosen, len(times), deep).tolist(), height, width


def frame_times_us(info: MediaInfo) -> Int64Array:
    """Return int64 [F]: presentation time of each frame on the container's clock, microseconds."""
    if info.frame_times_us:
        return np.asarray(info.frame_times_us, dtype=np.int64)
    if info.num_frames <= 1 or info.fps <= 0:
        return np.full(info.num_frames, info.first_frame_us, dtype=np.int64)
    return regular_times_us(info.num_frames, info.fps) + info.first_frame_us


def regular_times_us(num_frames: int, fps: float) -> Int64Array:
    """Return int64 [F]: i / fps in whole microseconds, from 0."""
    return np.rint(np.arange(num_frames) * (MICROSECONDS / fps)).astype(np.int64)


def _at_rate(times: Int64Array, fps: float) -> Int64Array:
    """Return the first frame of each slot of 1 / fps; all frames of a clip that is not faster."""
    span_us = int(times[-1] - times[0]) if len(times) else 0
    if (len(times) - 1) * MICROSECONDS <= span_us * fps * RATE_TOLERANCE:
        return np.arange(len(times))
    slots = np.floor((times - times[0] + TIME_GUARD_US) * (fps / MICROSECONDS))
    return np.flatnonzero(np.diff(slots, prepend=-1.0))


def _in_slots(times: Int64Array, count: int) -> Int64Array:
    """Return at most `count` frames: the first of each of so many equal slots of the clip's time.

    A clip at a steady rate gives exactly `count`.
    """
    whole_us = int(times[-1] - times[0]) + max(_step_us(times), TIME_GUARD_US + 1)
    slots = (times - times[0] + TIME_GUARD_US) * count // whole_us
    return np.flatnonzero(np.diff(np.minimum(slots, count - 1), prepend=-1))


def _whole_patches(chosen: Int64Array, num_frames: int, deep: int) -> Int64Array:
    """Return the choice with whole temporal patches, by adding the latest unused frames.

    Where there are none, the encoder repeats the last frame: leaving frames out would lose what a
    slow clip shows at its end, which the reply may speak of.
    """
    if missing := -len(chosen) % deep:
        unused = np.setdiff1d(np.arange(num_frames), chosen)
        if len(unused) >= missing:
            return np.union1d(chosen, unused[-missing:])
    return chosen


def _picture_end_us(times: Int64Array, info: MediaInfo) -> int:
    """Return when the last frame goes, on the container's clock."""
    step_us = _step_us(times) or (round(MICROSECONDS / info.fps) if info.fps else 0)
    return (int(times[-1]) if len(times) else info.first_frame_us) + step_us


def _step_us(times: Int64Array) -> int:
    """Return the mean time between frames: how long the last one is taken to stay."""
    return int(times[-1] - times[0]) // (len(times) - 1) if len(times) > 1 else 0


def clip_zero_us(info: MediaInfo, *, with_sound: bool) -> int:
    """Return the container time that is the clip's zero: the first frame or the first sound."""
    return min(info.first_frame_us, info.audio_start_us) if with_sound else info.first_frame_us


def audio_offset_us(info: MediaInfo) -> int:
    """Return when the sound starts after the clip's zero, microseconds."""
    return info.audio_start_us - clip_zero_us(info, with_sound=True)


def patch_times_us(
    info: MediaInfo, frames: list[int], *, temporal_patch_size: int, with_sound: bool
) -> Int64Array:
    """Return int64 [t]: time of each temporal patch's first frame after the clip's zero."""
    firsts = frames[::temporal_patch_size]
    return frame_times_us(info)[firsts] - clip_zero_us(info, with_sound=with_sound)
