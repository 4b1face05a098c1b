"""Which frames of a clip are used, and when: all times from timestamps, never from indices.

Done here: frame times, choice of frames, times of the temporal patches and of the sound on the
clip's own clock. Not done here: decoding (media.py), position ids (models/tmrope.py).

Letters: F decoded frames of a clip, N chosen ones, t temporal patches.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from omni_train.data.types import MediaInfo, ProcessingConfig

MICROSECONDS = 1_000_000
# Matroska rounds times to milliseconds, so a frame may lie that much before its true time.
TIME_GUARD_US = 1_000
# A clip is taken whole if its mean rate is at most this much above the wanted one.
RATE_TOLERANCE = 1.01


def frame_times_us(info: MediaInfo) -> NDArray[np.int64]:
    """Return int64 [F]: presentation time of each frame on the container's clock, microseconds."""
    if info.frame_times_us:
        return np.asarray(info.frame_times_us, dtype=np.int64)
    if info.num_frames <= 1 or info.fps <= 0:
        return np.full(info.num_frames, info.first_frame_us, dtype=np.int64)
    return regular_times_us(info.num_frames, info.fps) + info.first_frame_us


def regular_times_us(num_frames: int, fps: float) -> NDArray[np.int64]:
    """Return int64 [F]: i / fps in whole microseconds, from 0."""
    return np.rint(np.arange(num_frames) * (MICROSECONDS / fps)).astype(np.int64)


def select_frames(info: MediaInfo, config: ProcessingConfig) -> list[int]:
    """Return the indices [N] of the frames to decode, rising.

    Time is cut into slots of 1 / video_fps from the first frame on, and the first frame of each
    slot is taken. A clip that is not faster than that keeps all frames. More than
    `video_max_frames` are thinned evenly.
    """
    times = frame_times_us(info)
    chosen = np.arange(len(times))
    span_us = int(times[-1] - times[0]) if len(times) else 0
    if (len(times) - 1) * MICROSECONDS > span_us * config.video_fps * RATE_TOLERANCE:
        slots = np.floor((times - times[0] + TIME_GUARD_US) * (config.video_fps / MICROSECONDS))
        chosen = np.flatnonzero(np.diff(slots, prepend=-1.0))
    if len(chosen) > config.video_max_frames:
        picks = np.arange(config.video_max_frames) * len(chosen) // config.video_max_frames
        chosen = chosen[picks]
    return [int(index) for index in chosen]


def clip_zero_us(info: MediaInfo, *, with_sound: bool) -> int:
    """Return the container time that is the clip's zero: the first frame or the first sound."""
    return min(info.first_frame_us, info.audio_start_us) if with_sound else info.first_frame_us


def audio_offset_us(info: MediaInfo) -> int:
    """Return when the sound starts after the clip's zero, microseconds."""
    return info.audio_start_us - clip_zero_us(info, with_sound=True)


def patch_times_us(
    info: MediaInfo, frames: list[int], *, temporal_patch_size: int, with_sound: bool
) -> NDArray[np.int64]:
    """Return int64 [t]: time of each temporal patch's first frame after the clip's zero."""
    firsts = frames[::temporal_patch_size]
    return frame_times_us(info)[firsts] - clip_zero_us(info, with_sound=with_sound)
