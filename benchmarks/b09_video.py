"""B9: two frames a second out of a clip, against PyAV's two ways, with the same decoder.

Clips of H.264 at 30 fps without sound being read, with a key frame every 15 or 250 frames, at 360p
and 720p. PyAV reads on from frame to frame, or seeks to the key frame before every wanted frame;
which of the two is better depends on the clip, so both stand beside each other, and ours is held to
the better one. One thread each. Pixels are compared first.
"""

from __future__ import annotations

import io
import sys

import av
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import media
from benchmarks.report import compare, parser, show
from omni_train.data.clip import decode_frames
from omni_train.data.media import probe
from omni_train.data.video import frame_times_us

FPS, WANTED_FPS = 30, 2
PRESET = "veryfast"
# Width and seconds by height: enough for a second group of pictures at the long distance.
SIZES = {360: (640, 12.0), 720: (1280, 9.0)}
# The same decoder on both sides; a twentieth is this machine's noise.
GOAL = 0.95

Frames = list[NDArray[np.uint8]]


def reading_on(data: bytes, wanted: list[int]) -> Frames:
    """Decode up to the last wanted frame, keep those that are wanted."""
    found: Frames = []
    with av.open(io.BytesIO(data)) as container:
        video = container.streams.video[0]
        video.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(video)):
            if number == wanted[len(found)]:
                found.append(frame.to_ndarray(format="rgb24"))
                if len(found) == len(wanted):
                    break
    return found


def seeking(data: bytes, times_us: list[int]) -> Frames:
    """Seek to the key frame before each wanted frame, decode from there."""
    found: Frames = []
    with av.open(io.BytesIO(data)) as container:
        video = container.streams.video[0]
        video.codec_context.thread_count = 1
        base = video.time_base
        assert base is not None
        for time_us in times_us:
            ticks = round(time_us / 1e6 / base)
            container.seek(ticks, stream=video)
            for frame in container.decode(video):
                assert frame.pts is not None
                if frame.pts >= ticks:
                    found.append(frame.to_ndarray(format="rgb24"))
                    break
    return found


def main() -> int:
    """Run the table."""
    args = parser("Frames of a clip, against PyAV's two ways.").parse_args()
    torch.set_num_threads(1)
    rows = []
    for height, (width, seconds) in SIZES.items():
        for gop in (15, 250):
            data = media.clip(seconds, height=height, width=width, gop=gop, preset=PRESET)
            info = probe(data, "0.mkv")
            wanted = list(range(0, info.num_frames, FPS // WANTED_FPS))
            times = [int(time) for time in frame_times_us(info)[wanted]]
            sides = (
                [frame[0].permute(1, 2, 0).numpy() for frame in decode_frames(data, wanted, info)],
                reading_on(data, wanted),
                seeking(data, times),
            )
            for other in sides[1:]:
                assert np.array_equal(np.stack(sides[0]), np.stack(other)), "other pixels"
            name = f"{height}p, key frame every {gop}"
            both = [
                compare(
                    f"{name}, peer {label}",
                    lambda data=data, wanted=wanted, info=info: list(
                        decode_frames(data, wanted, info)
                    ),
                    run,
                    goal=GOAL,
                    pairs=args.pairs,
                )
                for label, run in (
                    ("reading on", lambda data=data, wanted=wanted: reading_on(data, wanted)),
                    ("seeking", lambda data=data, times=times: seeking(data, times)),
                )
            ]
            rows += both
    notes = ["decord and OpenCV are not among this project's packages and were not measured"]
    return show(rows, ("av", "torch", "numpy"), notes, as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
