"""Choice of frames and times, from timestamps."""

import numpy as np
import pytest

from omni_train.data.types import MediaInfo, MediaKind, ProcessingConfig
from omni_train.data.video import (
    audio_offset_us,
    clip_zero_us,
    frame_times_us,
    patch_times_us,
    select_frames,
)


def regular(fps, count, **facts):
    return MediaInfo(MediaKind.video, "0.mp4", num_frames=count, fps=fps, **facts)


def at(times_s, **facts):
    times = [round(t * 1e6) for t in times_s]
    return MediaInfo(
        MediaKind.video,
        "0.mp4",
        num_frames=len(times),
        frame_times_us=times,
        first_frame_us=times[0],
        **facts,
    )


def test_regular_times_follow_from_the_rate():
    info = regular(30.0, 4, first_frame_us=500_000)
    assert frame_times_us(info).tolist() == [500_000, 533_333, 566_667, 600_000]
    assert frame_times_us(at([0.1, 0.5])).tolist() == [100_000, 500_000]
    assert frame_times_us(regular(0.0, 1, first_frame_us=7)).tolist() == [7]


@pytest.mark.parametrize(
    ("fps", "count", "expected"),
    [
        (30.0, 60, [0, 15, 30, 45]),
        (24.0, 48, [0, 12, 24, 36]),
        (25.0, 50, [0, 13, 25, 38]),
        (30_000 / 1_001, 60, [0, 15, 30, 45]),
        (4.0, 8, [0, 2, 4, 6]),
        (2.5, 5, [0, 2, 3, 4]),
        (2.0, 5, [0, 1, 2, 3, 4]),
        (1.0, 4, [0, 1, 2, 3]),
        (0.2, 3, [0, 1, 2]),
        (2.0, 1, [0]),
    ],
)
def test_two_frames_a_second(fps, count, expected):
    assert select_frames(regular(fps, count), ProcessingConfig(video_fps=2.0)) == expected


def test_millisecond_times_of_matroska_lose_no_frame():
    config = ProcessingConfig(video_fps=3.0)
    assert select_frames(at([0, 0.333, 0.667, 1.0, 1.333]), config) == [0, 1, 2, 3, 4]
    fast = at([round(i / 30, 3) for i in range(60)])
    assert select_frames(fast, config) == [0, 10, 20, 30, 40, 50]


def test_irregular_clip_is_cut_by_time_not_by_index():
    times = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 3.0, 3.1, 3.2, 3.6, 3.7, 4.0]
    chosen = select_frames(at(times), ProcessingConfig(video_fps=2.0))
    assert chosen == [0, 5, 8, 11, 13]


def test_slow_clip_with_jitter_keeps_all_frames():
    times = [0, 0.49, 1.01, 1.5, 1.99, 2.5]
    assert select_frames(at(times), ProcessingConfig(video_fps=2.0)) == list(range(6))


def test_too_many_frames_are_thinned_evenly():
    config = ProcessingConfig(video_fps=2.0, video_max_frames=10)
    chosen = select_frames(regular(2.0, 37), config)
    assert len(chosen) == 10
    assert chosen[0] == 0
    assert set(np.diff(chosen)) == {3, 4}
    assert len(select_frames(regular(2.0, 10), config)) == 10


def test_zero_is_the_first_of_picture_and_sound():
    info = at([0.5, 1.0, 1.5, 2.0, 2.5], has_audio=True, audio_start_us=200_000)
    frames = [0, 1, 2, 3, 4]
    assert clip_zero_us(info, with_sound=True) == 200_000
    assert clip_zero_us(info, with_sound=False) == 500_000
    assert audio_offset_us(info) == 0
    with_sound = patch_times_us(info, frames, temporal_patch_size=2, with_sound=True)
    assert with_sound.tolist() == [300_000, 1_300_000, 2_300_000]
    silent = patch_times_us(info, frames, temporal_patch_size=2, with_sound=False)
    assert silent.tolist() == [0, 1_000_000, 2_000_000]
    late = at([0.5, 1.0], has_audio=True, audio_start_us=900_000)
    assert audio_offset_us(late) == 400_000
