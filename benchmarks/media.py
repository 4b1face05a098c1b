"""Media that the benchmarks read: made in code, always the same, of ordinary size and content."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image

RATE_HZ = 16_000


def picture(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """uint8 [H, W, 3]: soft shapes with a little noise, as photographs have."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / a + seed) * np.cos(y / b) for a, b in rng.uniform(9, 90, (3, 2))]
    pixels = 127 + 100 * np.stack(waves, -1) + rng.normal(0, 4, (height, width, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def jpeg(height: int, width: int, seed: int = 0) -> bytes:
    """Bytes of a picture."""
    out = io.BytesIO()
    Image.fromarray(picture(height, width, seed)).save(out, "JPEG", quality=90)
    return out.getvalue()


def speech(seconds: float, seed: int = 0, rate_hz: int = RATE_HZ) -> NDArray[np.float32]:
    """float32 [S] with the loudness and pitch of talk."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    loud = np.maximum(np.sin(2 * np.pi * 3 * time), 0.02)
    tone = np.sin(2 * np.pi * (140 + 30 * np.sin(time)) * time)
    return (loud * (0.3 * tone + 0.03 * rng.standard_normal(len(time)))).astype(np.float32)


def wav(seconds: float, seed: int = 0) -> bytes:
    """Bytes of a sound file."""
    out = io.BytesIO()
    soundfile.write(out, speech(seconds, seed), RATE_HZ, format="WAV", subtype="PCM_16")
    return out.getvalue()


def clip(
    seconds: float,
    *,
    height: int,
    width: int,
    fps: int = 30,
    gop: int = 250,
    preset: str = "medium",
) -> bytes:
    """Bytes of an H.264 clip with sound that is exactly as long, in Matroska."""
    out = io.BytesIO()
    scene = picture(height, width + round(seconds * fps), 0)
    with av.open(out, "w", format="matroska") as file:
        video: Any = file.add_stream("libx264", rate=fps, options={"g": str(gop), "preset": preset})
        video.height, video.width, video.pix_fmt = height, width, "yuv420p"
        audio: Any = file.add_stream("flac", rate=RATE_HZ)
        audio.layout = "mono"
        for number in range(round(seconds * fps)):
            pixels = np.ascontiguousarray(scene[:, number : number + width])
            file.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(video.encode(None))
        values = (speech(seconds) * 32_767).astype(np.int16)
        step = 4_000
        for start in range(0, len(values), step):
            part = av.AudioFrame.from_ndarray(
                values[None, start : start + step], format="s16", layout="mono"
            )
            part.sample_rate, part.time_base = RATE_HZ, Fraction(1, RATE_HZ)
            part.pts = start
            file.mux(audio.encode(part))
        file.mux(audio.encode(None))
    return out.getvalue()
