"""Real media written for tests: clips with given frame times and a sound that starts when told."""

from __future__ import annotations

import io
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile

VIDEO_CLOCK = 90_000


def tone(seconds: float, rate_hz: int, frequency_hz: float = 440.0) -> np.ndarray:
    """float32 [S] with a loud click in its middle, to find the time again."""
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    wave = 0.05 * np.sin(2 * np.pi * frequency_hz * time)
    middle = len(wave) // 2
    wave[middle : middle + max(1, rate_hz // 400)] += 0.8
    return wave.astype(np.float32)


def wav(wave: np.ndarray, rate_hz: int = 16_000, *, container: str = "WAV") -> bytes:
    """Bytes of a sound file."""
    out = io.BytesIO()
    subtype = "PCM_16" if container in ("WAV", "FLAC") else None
    soundfile.write(out, wave, rate_hz, format=container, subtype=subtype)
    return out.getvalue()


def clip(
    frame_times_s: list[float],
    *,
    sound: np.ndarray | None = None,
    rate_hz: int = 16_000,
    sound_start_s: float = 0.0,
    container: str = "mp4",
    video_codec: str = "libx264",
    audio_codec: str = "aac",
    size: tuple[int, int] = (48, 64),
    rotation: int = 0,
    faststart: bool = False,
    hole_s: tuple[float, float] = (0.0, 0.0),
    codec_options: dict[str, str] | None = None,
    moving: bool = False,
) -> bytes:
    """Bytes of a clip; frame i is grey 20 * i with a bright left quarter.

    Sound inside `hole_s` is never written; what follows keeps its time. `faststart` puts the index
    first, for which the muxer must read its own file again. With `moving`, noise moves a pixel a
    frame, so that no two frames are alike.
    """
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    with tempfile.NamedTemporaryFile() as out:
        options = {"movflags": "faststart"} if faststart else {}
        with av.open(out.name, "w", format=container, options=options) as file:
            # MPEG-4 part 2 has no finer clock than 16 bits.
            clock = Fraction(1, 30_000 if video_codec == "mpeg4" else VIDEO_CLOCK)
            video = file.add_stream(video_codec, rate=30, options=codec_options or {})
            video.height, video.width, video.pix_fmt = *size, "yuv420p"
            video.codec_context.time_base = clock
            if rotation:
                video.set_display_rotation(rotation)
            if sound is not None:
                audio = file.add_stream(audio_codec, rate=rate_hz)
                audio.layout = "mono"
            for number, seconds in enumerate(frame_times_s):
                pixels = np.full((*size, 3), number * 20 % 220, np.uint8)
                pixels[:, : size[1] // 4] = 250
                if moving:
                    pixels = np.roll(noise, number, axis=1)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = round(seconds / clock), clock
                file.mux(video.encode(frame))
            file.mux(video.encode(None))
            if sound is not None:
                step = audio.codec_context.frame_size or 1_024
                for start in range(0, len(sound), step):
                    if hole_s[0] <= start / rate_hz < hole_s[1]:
                        continue
                    values, kind = sound[None, start : start + step], "fltp"
                    if audio_codec == "pcm_s16le":
                        values, kind = (values * 32_767).astype(np.int16), "s16"
                    part = av.AudioFrame.from_ndarray(values, format=kind, layout="mono")
                    part.sample_rate, part.time_base = rate_hz, Fraction(1, rate_hz)
                    part.pts = start + round(sound_start_s * rate_hz)
                    file.mux(audio.encode(part))
                file.mux(audio.encode(None))
        return Path(out.name).read_bytes()


def every(fps: float, count: int) -> list[float]:
    """Regular frame times from 0."""
    return [i / fps for i in range(count)]
