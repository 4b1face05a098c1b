"""Choice of frames and times, from timestamps."""

from dataclasses import replace

import numpy as np
import pytest

from omni_train.config.errors import ConfigError
from omni_train.data.types import (
    FrameRate,
    MediaInfo,
    MediaKind,
    ProcessingConfig,
    SoundMismatch,
)
from omni_train.data.video import (
    audio_offset_us,
    clip_zero_us,
    frame_times_us,
    patch_times_us,
    plan_clip,
)
from tests.unit.data.samples import SPEC


def select_frames(info, config):
    return plan_clip(info, config, SPEC).frames


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
        (30.0, 75, [0, 15, 30, 45, 60, 74]),
        (4.0, 9, [0, 2, 4, 6, 7, 8]),
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
    assert chosen == [0, 5, 8, 11, 12, 13]  # 12 fills the last patch


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
    odd = ProcessingConfig(video_fps=2.0, video_max_frames=7)
    assert len(select_frames(regular(2.0, 37), odd)) == 6


@pytest.mark.parametrize("deep", [1, 2, 4])
def test_patches_are_never_half_empty(deep):
    spec = replace(SPEC, temporal_patch_size=deep)
    rng = np.random.default_rng(5)
    for count in [*range(1, 30), 100, 1_000]:
        for info in (regular(30.0, count), at(np.sort(rng.uniform(0, count / 5, count)))):
            frames = plan_clip(info, ProcessingConfig(), spec).frames
            assert frames == sorted(set(frames))
            # Only where the clip has no frame to spare is one repeated.
            assert len(frames) % deep == 0 or len(frames) == count or count < deep


def budget(tokens, **more):
    return ProcessingConfig(video_rate=FrameRate.budget, video_max_tokens=tokens, **more)


def tokens_of(plan):
    return len(plan.frames) // 2 * plan.height * plan.width // 28**2


def test_budget_lowers_the_rate_then_the_size():
    facts = {"width": 1_280, "height": 720}
    whole = plan_clip(regular(30.0, 300, **facts), ProcessingConfig(), SPEC)
    assert len(whole.frames) == 20
    area = whole.height * whole.width
    # It fits: nothing changes.
    assert plan_clip(regular(30.0, 300, **facts), budget(tokens_of(whole)), SPEC) == whole
    # Half the budget: half the frames at the same size, spread over the whole clip.
    slower = plan_clip(regular(30.0, 300, **facts), budget(tokens_of(whole) // 2), SPEC)
    assert (slower.height, slower.width) == (whole.height, whole.width)
    assert slower.frames == list(range(0, 300, 30))
    # A tenth: half a frame a second is the least, so frames become smaller.
    smaller = plan_clip(regular(30.0, 300, **facts), budget(tokens_of(whole) // 10), SPEC)
    assert len(smaller.frames) == 6
    assert 128 * 28**2 <= smaller.height * smaller.width < area
    assert tokens_of(smaller) <= tokens_of(whole) // 10
    # Below the smallest frame the rate falls further.
    least = plan_clip(regular(30.0, 300, **facts), budget(300), SPEC)
    assert len(least.frames) == 4
    assert tokens_of(least) <= 300


def test_budget_holds_for_any_clip():
    rng = np.random.default_rng(3)
    for _ in range(300):
        tokens = int(rng.integers(400, 8_000))
        count = int(rng.integers(1, 2_000))
        fps = float(rng.choice([1.0, 5.0, 24.0, 29.97, 60.0]))
        info = regular(fps, count, width=int(rng.integers(50, 2_000)),
                       height=int(rng.integers(50, 2_000)))  # fmt: skip
        if rng.random() < 0.5:
            info = at(np.sort(rng.uniform(0, count / fps, count)),
                      width=info.width, height=info.height)  # fmt: skip
        config = budget(tokens, video_min_fps=float(rng.uniform(0.05, 2.0)))
        plan = plan_clip(info, config, SPEC)
        assert -(-len(plan.frames) // 2) * plan.height * plan.width // 28**2 <= tokens
        assert len(plan.frames) >= min(2, count)
        longest = plan_clip(info, ProcessingConfig(), SPEC)
        assert len(plan.frames) <= len(longest.frames)


def test_settings_that_contradict_each_other():
    with pytest.raises(ConfigError, match="video_max_tokens"):
        ProcessingConfig(video_max_tokens=1_000)
    with pytest.raises(ConfigError, match="video_max_tokens"):
        ProcessingConfig(video_rate=FrameRate.budget)
    with pytest.raises(ConfigError, match="video_fps"):
        budget(1_000, video_fps=0.2)
    with pytest.raises(ConfigError, match="video_fps"):
        ProcessingConfig(video_fps=0.0)
    with pytest.raises(ConfigError, match="tolerance"):
        ProcessingConfig(av_mismatch_tolerance_s=-0.1)


def test_mismatch_is_measured_on_the_common_clock():
    sound = {"has_audio": True, "sample_rate_hz": 8_000}
    late = regular(2.0, 4, **sound, num_audio_samples=16_000, audio_start_us=700_000)
    config = ProcessingConfig(av_mismatch=SoundMismatch.trim, av_mismatch_tolerance_s=0.5)
    plan = plan_clip(late, config, SPEC)  # picture 0 to 2 s, sound 0.7 to 2.7 s
    assert plan.mismatch_us == 700_000
    assert plan.num_audio_samples == 1.3 * 8_000
    assert plan_clip(late, replace(config, av_mismatch_tolerance_s=0.7), SPEC).frames == plan.frames
    kept = plan_clip(late, replace(config, av_mismatch_tolerance_s=0.7), SPEC)
    assert kept.num_audio_samples == 16_000
    dropping = replace(config, av_mismatch=SoundMismatch.drop)
    assert plan_clip(late, dropping, SPEC).dropped
    assert not plan_clip(replace(late, use_audio=False), dropping, SPEC).dropped
    after = replace(late, audio_start_us=2_100_000)
    assert plan_clip(after, config, SPEC).num_audio_samples == 0


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
