"""Reading on and seeking give the same frames, and neither decodes a group of pictures twice."""

import io
from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from omni_train.config.errors import DataError
from omni_train.data import clip as clip_module
from omni_train.data.clip import _runs, probe_clip
from omni_train.data.media import decode_video as decode_frames
from tests.unit.data.clips import clip, every, tone

COUNT = 60
X264 = {"preset": "veryfast", "sc_threshold": "0"}
# Codec, container, options, largest group of pictures.
FILES = {
    "h264-1": ("libx264", "mp4", {**X264, "g": "1"}, 1),
    "h264-12": ("libx264", "mp4", {**X264, "g": "12", "bf": "0"}, 12),
    "h264-12-b": ("libx264", "mp4", {**X264, "g": "12", "bf": "3", "b-pyramid": "normal"}, 12),
    "h264-12-open": ("libx264", "mp4", {**X264, "g": "12", "bf": "3", "x264-params": "open-gop=1"},
                     12),
    "h264-12-refresh": ("libx264", "mp4", {**X264, "g": "12", "intra-refresh": "1"}, 60),
    "h264-250": ("libx264", "mp4", {**X264, "g": "250", "bf": "3"}, 60),
    "h264-12-mkv": ("libx264", "matroska", {**X264, "g": "12", "bf": "3"}, 12),
    "mpeg4-12-b": ("mpeg4", "mp4", {"g": "12", "bf": "2"}, 12),
    "mpeg4-12-mkv": ("mpeg4", "matroska", {"g": "12"}, 12),
    "vp9-12": ("libvpx-vp9", "webm", {"g": "12", "deadline": "realtime", "cpu-used": "8"}, 12),
    "vp8-12": ("libvpx", "webm", {"g": "12", "deadline": "realtime", "cpu-used": "8"}, 12),
}  # fmt: skip
VARIABLE = np.cumsum(np.tile([0.02, 0.05, 0.11, 0.04], COUNT // 4)).tolist()


def all_frames(data):
    """Every frame by the plainest use of PyAV, uint8 [F, 3, H, W]."""
    with av.open(io.BytesIO(data)) as container:
        pixels = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


@pytest.fixture
def decoded(monkeypatch):
    """Counts the frames that come out of the decoder."""
    count = []
    plain = clip_module._time_us
    monkeypatch.setattr(
        clip_module,
        "_time_us",
        lambda frame, what: count.append(what) or plain(frame, what),
    )
    return count


@pytest.mark.parametrize("times", [every(10.0, COUNT), VARIABLE], ids=["regular", "variable"])
@pytest.mark.parametrize("name", FILES)
def test_any_choice_of_frames_is_exact(name, times, decoded):
    codec, container, options, group = FILES[name]
    first = 0.4 if name == "h264-12-b" else 0.0
    data = clip([first + t for t in times], sound=tone(2.0, 48_000), rate_hz=48_000,
                sound_start_s=0.3, container=container, video_codec=codec,
                audio_codec="libopus", codec_options=options, moving=True)  # fmt: skip
    info = probe_clip(data, "0.mp4")
    assert info.num_frames == COUNT
    if name != "h264-12-refresh":
        assert info.keyframe_interval == group
    expected = all_frames(data)
    rng = np.random.default_rng(1)
    choices = [list(range(0, COUNT, step)) for step in (1, 2, 5, 12, 13, 25)]
    choices += [sorted(rng.choice(COUNT, n, replace=False).tolist()) for n in (1, 2, 3, 7, 30)]
    choices += [[0, 47], [11, 23, 35, 47, 59], [10, 22, 34, 46, 58], [12, 24, 36, 48], [59]]
    for indices in choices:
        decoded.clear()
        frames = decode_frames(data, indices, info)
        assert torch.equal(frames, expected[indices]), indices
        if name == "h264-12-refresh":
            continue
        # These are found by decoding time, so that the search may go back by another group.
        reach = group * 3 if name in ("h264-12-open", "mpeg4-12-b") else group
        # Reading on decodes up to the last one; a gap that holds a key frame costs one group.
        bound = sum(
            min(indices[last - 1] + 1, indices[last - 1] - indices[first] + reach)
            for first, last in _runs(indices, group)
        )
        assert len(decoded) <= bound + 4, indices  # some come out early, in another order


def test_seeking_is_chosen_by_the_spacing_of_key_frames():
    assert _runs([0, 15, 30], 15) == [(0, 1), (1, 2), (2, 3)]
    assert _runs([0, 15, 30], 16) == [(0, 3)]
    assert _runs([0, 15, 30], 250) == [(0, 3)]
    assert _runs([0, 1, 2, 50, 51], 12) == [(0, 3), (3, 5)]
    assert _runs([0, 1, 2], 1) == [(0, 3)]
    assert _runs([0, 2, 4], 1) == [(0, 1), (1, 2), (2, 3)]


def test_short_groups_are_skipped_and_long_ones_read_once(decoded):
    times = every(30.0, 240)
    for group, most in ((8, 8 * 8), (30, 8), (240, 211)):
        data = clip(times, codec_options={**X264, "g": str(group)}, moving=True)
        info = probe_clip(data, "0.mp4")
        decoded.clear()
        decode_frames(data, list(range(0, 240, 30)), info)
        assert len(decoded) <= most + 8


def test_wrong_key_frame_spacing_in_the_index_costs_time_only():
    data = clip(every(10.0, COUNT), codec_options={**X264, "g": "250"}, moving=True)
    info = replace(probe_clip(data, "0.mp4"), keyframe_interval=5)
    indices = [0, 9, 30, 41, 59]
    assert torch.equal(decode_frames(data, indices, info), all_frames(data)[indices])


def test_times_that_the_file_does_not_have():
    data = clip(every(10.0, COUNT), codec_options={**X264, "g": "5"})
    info = probe_clip(data, "0.mp4")
    for moved in (40_000, -40_000, 10):
        with pytest.raises(DataError) as caught:
            decode_frames(data, [0, 20, 40], replace(info, first_frame_us=moved))
        assert caught.value.reason == "stale_index"
    with pytest.raises(DataError) as caught:
        decode_frames(data, [0, 20, 75], replace(info, num_frames=80))
    assert caught.value.reason == "truncated"
