"""Clips by PyAV: what they hold, their frames and their sound, with times from timestamps.

Done here: mp4 and matroska/webm from bytes, an allow-list of codecs checked before decoding, caps.
Sound keeps the clock: encoder priming is not counted, holes between packets become silence.
Not done here: choosing frames (video.py), resampling (media.py).

Letters: N frames, H and W pixels as displayed, S samples at the clip's own rate.
"""

from __future__ import annotations

import bisect
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from torch import Tensor

from omni_train.config.errors import DataError
from omni_train.data.container import clip_container
from omni_train.data.image import by_pixel, resize
from omni_train.data.types import MediaInfo, MediaKind
from omni_train.data.video import (
    MICROSECONDS,
    frame_times_us,
    regular_times_us,
)

MAX_CLIP_S = 3_600
MAX_CLIP_FRAMES = 60 * MAX_CLIP_S
MAX_FRAME_PIXELS = 4_096 * 2_304
MIN_RATE_HZ, MAX_RATE_HZ, MAX_CHANNELS = 4_000, 192_000, 16

VIDEO_CODECS = ("h264", "hevc", "av1", "vp8", "vp9", "mpeg4")
AUDIO_CODECS = ("aac", "mp3", "opus", "vorbis", "flac", "pcm_s16le", "pcm_s16be", "pcm_f32le")
# Names of decoders, for what FFmpeg opens by itself to learn a stream's parameters.
_DECODERS = (*VIDEO_CODECS, *AUDIO_CODECS, "mp3float", "libdav1d", "libopus", "libvorbis")
_OPTIONS = {
    "format_whitelist": "mov,mp4,matroska,webm",
    "codec_whitelist": ",".join(_DECODERS),
    "protocol_whitelist": "none",
}
# Packets of these may hold frames that are never shown, so packets are not counted against frames.
_HIDDEN_FRAMES = ("vp8", "vp9", "av1")
# Sound that starts this much late is a hole; less is a container's rounding.
HOLE_US = 20_000
# Frames by which any codec here shows a picture later than it is decoded.
MAX_REORDER = 16


@dataclass(slots=True)
class _Sound:
    """Sound of a clip as it is decoded: mono parts, and the time of the first sample."""

    keep: bool
    start_us: int = 0
    num_samples: int = 0
    rate_hz: int = 0
    num_channels: int = 0
    parts: list[NDArray[np.float32]] = field(default_factory=list)

    def add(self, frame: AudioFrame) -> None:
        """Append one decoded frame, filling a hole before it with silence."""
        if frame.samples == 0:
            return
        time_us = _time_us(frame, "sound")
        if not self.rate_hz:
            self.start_us, self.rate_hz = time_us, frame.sample_rate
            self.num_channels = frame.layout.nb_channels
            check_sound_format(self.rate_hz, self.num_channels)
        if (frame.sample_rate, frame.layout.nb_channels) != (self.rate_hz, self.num_channels):
            raise DataError("bad_header", "sample rate or channels of the sound change midway")
        hole_us = time_us - self.end_us
        if hole_us >= HOLE_US:
            self._append(
                np.zeros(self._checked(hole_us * self.rate_hz // MICROSECONDS), np.float32)
            )
        self._checked(frame.samples)
        self._append(_mono(frame) if self.keep else np.empty(frame.samples, np.float32))

    @property
    def end_us(self) -> int:
        """Time up to which there is sound, on the container's clock."""
        return self.start_us + self.num_samples * MICROSECONDS // max(self.rate_hz, 1)

    def _checked(self, more: int) -> int:
        if self.num_samples + more > MAX_CLIP_S * self.rate_hz:
            raise DataError("too_long", f"the sound of a clip is longer than {MAX_CLIP_S} s")
        return more

    def _append(self, part: NDArray[np.float32]) -> None:
        self.num_samples += len(part)
        if self.keep:
            self.parts.append(part)


@dataclass(slots=True)
class _Picture:
    """What is learnt of a clip's frames while they are decoded."""

    times_us: list[int] = field(default_factory=list)
    keyframes: list[int] = field(default_factory=list)
    width: int = 0
    height: int = 0

    def add(self, frame: VideoFrame) -> None:
        """Note one decoded frame."""
        time_us = _time_us(frame, "picture")
        if self.times_us and time_us < self.times_us[-1]:
            raise DataError("bad_timestamps", f"frame {len(self.times_us)} comes before the last")
        if len(self.times_us) >= MAX_CLIP_FRAMES:
            raise DataError("too_long", f"a clip has more than {MAX_CLIP_FRAMES} frames")
        if frame.key_frame:
            self.keyframes.append(len(self.times_us))
        sides = (frame.height, frame.width)
        width, height = sides if frame.rotation % 180 else sides[::-1]
        if self.times_us and (width, height) != (self.width, self.height):
            raise DataError("bad_header", "the size of the picture changes midway")
        check_frame_size(width, height)
        self.width, self.height = width, height
        self.times_us.append(time_us)


def check_sound_format(rate_hz: int, num_channels: int) -> None:
    """Refuse sample rates and channel counts that no real recording has (`bad_header`)."""
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ or not 1 <= num_channels <= MAX_CHANNELS:
        raise DataError("bad_header", f"sound declares {rate_hz} Hz and {num_channels} channels")


def check_frame_size(width: int, height: int) -> None:
    """Refuse frames without pixels or with too many (`bad_header`, `too_large`)."""
    if width < 1 or height < 1:
        raise DataError("bad_header", f"a frame declares {width}x{height} pixels")
    if width * height > MAX_FRAME_PIXELS:
        raise DataError("too_large", f"{width}x{height} is over {MAX_FRAME_PIXELS} pixels a frame")


def probe_clip(data: bytes, member: str) -> MediaInfo:
    """Decode a clip once and return all facts about it but its place in the shard.

    Raises:
        DataError: `bad_container`, `bad_codec`, `truncated`, `corrupt`, `bad_header`, `too_long`,
            `too_large`, `no_video`, `no_timestamps`, `bad_timestamps`.
    """
    picture, sound = _Picture(), _Sound(keep=False)
    with _opened(data) as container:
        expected: list[Packet] = []
        packets = {stream.index: 0 for stream in container.streams}
        streams = _streams(container)
        for packet in container.demux(*streams):
            if packet.size:
                packets[packet.stream_index] += 1
            if packet.stream.type == "video" and packet.size and not packet.is_discard:
                expected.append(packet)
            for frame in packet.decode():
                if isinstance(frame, VideoFrame):
                    _check_intact(frame)
                    picture.add(frame)
                elif isinstance(frame, AudioFrame):
                    sound.add(frame)
        _check_counts(streams, packets)
        codec = streams[0].codec_context.codec.canonical_name
        rate = container.streams.video[0].average_rate
    if not picture.times_us:
        raise DataError("truncated", "a clip without a single decodable frame")
    if codec not in _HIDDEN_FRAMES and len(picture.times_us) < len(expected):
        raise DataError(
            "truncated", f"{len(picture.times_us)} frames decoded of {len(expected)} in the file"
        )
    return _describe(member, picture, sound, rate)


def decode_clip_sound(
    data: bytes, *, seek_us: int | None = None, until_us: int = 2**62
) -> tuple[NDArray[np.float32], int, int]:
    """Return a clip's sound, float32 [S] mono, its rate in Hz (0 if none) and its start, us.

    It begins at a frame at or before `seek_us`, whose first ones may be wrong, and ends after
    `until_us`, both on the container's clock.
    """
    sound = _Sound(keep=True)
    with _opened(data) as container:
        _streams(container)
        if container.streams.audio:
            audio = container.streams.audio[0]
            if seek_us is not None and audio.time_base:
                container.seek(int(seek_us / MICROSECONDS / audio.time_base), stream=audio)
            for packet in container.demux(audio):
                for frame in packet.decode():
                    if isinstance(frame, AudioFrame):
                        sound.add(frame)
                if sound.end_us >= until_us:
                    break
    parts = sound.parts or [np.zeros(0, np.float32)]
    return np.concatenate(parts), sound.rate_hz, sound.start_us


def decode_frames(
    data: bytes, indices: list[int], info: MediaInfo, *, size: tuple[int, int] | None = None
) -> Iterator[Tensor]:
    """Yield the chosen frames, each uint8 [1, 3, H, W], resized to `size` (height, width) if given.

    A long clip is never in memory at its full size.

    Args:
        data: the clip.
        indices: rising numbers of decoded frames.
        info: what probing found; each frame's time must still be the one noted there.
        size: target height and width.

    Raises:
        DataError: `truncated` where the clip ends too early, `stale_index` where a time differs.
    """
    times = frame_times_us(info)
    with _opened(data) as container:
        _streams(container)
        for first, last in _runs(indices, info.keyframe_interval):
            wanted = [int(times[number]) for number in indices[first:last]]
            found: list[Tensor] = []
            # A part of a clip counts its frames from its own start.
            if first > 0 or info.first_sample or indices[0] >= info.keyframe_interval:
                before_us = int(times[max(indices[first] - MAX_REORDER, 0)])
                found = _after_seeking(container, wanted, before_us, size)
            yield from found or _frames_at(container, wanted, size)


def _runs(indices: list[int], keyframe_interval: int) -> list[tuple[int, int]]:
    """Cut chosen frames where seeking pays: slices (first, last) of `indices`.

    A gap of at least the largest key-frame interval holds a key frame, so that seeking over it
    never decodes a frame twice and decodes at most as many as reading on. In a smaller gap there
    may be none, and reading on decodes each group of pictures once.
    """
    near = max(keyframe_interval, 2)
    cuts = [n for n in range(1, len(indices)) if indices[n] - indices[n - 1] >= near]
    return list(zip([0, *cuts], [*cuts, len(indices)], strict=True))


def _after_seeking(
    container: InputContainer, times_us: list[int], before_us: int, size: tuple[int, int] | None
) -> list[Tensor]:
    """Return the frames at rising times, decoded from the key frame before the first.

    mp4 is searched by decoding time: a key frame that is shown later than the wanted frame may be
    found, and then the search goes on from `before_us`. Empty where that does not help either: the
    container is then back at its start.
    """
    video = _video(container)
    base = video.time_base
    for time_us in (times_us[0], before_us):
        ticks = (2 * time_us * base.denominator + MICROSECONDS * base.numerator) // (
            2 * MICROSECONDS * base.numerator
        )
        try:
            container.seek(ticks, stream=video)
            return list(_frames_at(container, times_us, size))
        except (DataError, av.FFmpegError):
            continue
    start = video.index_entries[0].timestamp if len(video.index_entries) else 0
    container.seek(start, stream=video)
    return []


def _frames_at(
    container: InputContainer, times_us: list[int], size: tuple[int, int] | None
) -> Iterator[Tensor]:
    """Yield the frames at rising times, reading on from where the container is.

    Raises:
        DataError: `truncated` where the clip ends too early, `stale_index` where a time is passed,
            `corrupt` for a frame made from damaged data.
    """
    video, reformatter = _video(container), VideoReformatter()
    base, found = video.time_base, 0
    skipping: bool | None = None  # not known: the decoder may come from an earlier run of frames
    for packet in container.demux(video):
        time_us = None if packet.pts is None else _ticks_to_us(packet.pts, base)
        # A frame that no other frame is made from is not decoded, unless it is wanted.
        spare = time_us is not None and not _near(time_us, times_us)
        if spare is not skipping:
            video.codec_context.skip_frame = "NONREF" if spare else "DEFAULT"
            skipping = spare
        for frame in packet.decode():
            passed = _time_us(frame, "picture") - times_us[found]
            if passed > 1:
                raise DataError("stale_index", f"no frame at {times_us[found]} us, as indexed")
            if passed >= -1:
                _check_intact(frame)
                pixels = _pixels(frame, reformatter)
                yield resize(pixels, *size) if size else pixels
                found += 1
                if found == len(times_us):
                    return
    raise DataError("truncated", f"{found} of {len(times_us)} chosen frames decoded")


def _video(container: InputContainer) -> av.video.VideoStream:
    return container.streams.video[0]


def _near(time_us: int, times_us: list[int]) -> bool:
    """Tell whether a time is one of the rising times, but for rounding."""
    place = bisect.bisect_left(times_us, time_us - 1)
    return place < len(times_us) and times_us[place] <= time_us + 1


def describe_pictures(
    member: str, times_us: NDArray[np.int64], fps: float, *, size: tuple[int, int]
) -> MediaInfo:
    """Return the facts of a silent clip given as pictures.

    Args:
        member: the first picture.
        times_us: time of each picture.
        fps: their rate, 0 where only the times are known.
        size: width and height.
    """
    picture = _Picture(times_us.tolist(), list(range(len(times_us))), *size)
    return _describe(member, picture, _Sound(keep=False), Fraction(fps) if fps else None)


@contextmanager
def _opened(data: bytes) -> Iterator[InputContainer]:
    """Open a clip from bytes under the allow-lists; FFmpeg's errors become DataErrors."""
    name = clip_container(data)
    try:
        with av.open(
            io.BytesIO(data), "r", format=name, options=_OPTIONS, metadata_errors="replace"
        ) as container:
            yield container
    except av.FFmpegError as error:
        raise DataError("corrupt", f"the decoder says: {error.strerror}") from error


def _streams(container: InputContainer) -> list[av.video.VideoStream | av.audio.AudioStream]:
    """Return the first video and audio stream, after checking what they declare."""
    if not container.streams.video:
        raise DataError("no_video", "a clip without a video stream")
    if container.duration and container.duration > MAX_CLIP_S * MICROSECONDS:
        raise DataError("too_long", f"a clip declares more than {MAX_CLIP_S} s")
    video = container.streams.video[0]
    _check_codec(video.codec_context, VIDEO_CODECS)
    check_frame_size(video.codec_context.width, video.codec_context.height)
    chosen: list[av.video.VideoStream | av.audio.AudioStream] = [video]
    if container.streams.audio:
        audio = container.streams.audio[0]
        _check_codec(audio.codec_context, AUDIO_CODECS)
        chosen.append(audio)
    for stream in chosen:
        stream.codec_context.thread_count = 1  # a worker is one thread; more only fight over cores
    return chosen


def _check_codec(context: av.CodecContext | None, allowed: tuple[str, ...]) -> None:
    # FFmpeg's own list does not stop PyAV's decoders, so the name is checked here.
    name = context.codec.canonical_name if context is not None else "unknown"
    if name not in allowed:
        raise DataError("bad_codec", f"{name} is not among {', '.join(allowed)}")


def _check_counts(
    streams: list[av.video.VideoStream | av.audio.AudioStream], packets: dict[int, int]
) -> None:
    """Compare packets with what the header declares, where it does (mp4)."""
    for stream in streams:
        if stream.frames and packets[stream.index] < stream.frames:
            raise DataError(
                "truncated",
                f"{stream.type} declares {stream.frames} packets, has {packets[stream.index]}",
            )


def _check_intact(frame: VideoFrame) -> None:
    if frame.is_corrupt:
        raise DataError("corrupt", "a frame was decoded from damaged data")


def _describe(
    member: str, picture: _Picture, sound: _Sound, declared_rate: Fraction | None
) -> MediaInfo:
    """Put together what decoding found."""
    times = np.asarray(picture.times_us, dtype=np.int64)
    fps, regular = _measure_fps(times, declared_rate)
    step_us = round(MICROSECONDS / fps) if fps else 0
    starts, ends = [int(times[0])], [int(times[-1]) + step_us]
    if sound.num_samples:
        starts.append(sound.start_us)
        ends.append(sound.start_us + sound.num_samples * MICROSECONDS // sound.rate_hz)
    gaps = np.diff([*picture.keyframes, len(times)], prepend=0)
    return MediaInfo(
        kind=MediaKind.video,
        member=member,
        width=picture.width,
        height=picture.height,
        num_frames=len(times),
        frame_times_us=[] if regular else picture.times_us,
        first_frame_us=int(times[0]),
        fps=fps,
        keyframe_interval=int(gaps.max()),
        has_audio=sound.num_samples > 0,
        audio_start_us=sound.start_us,
        num_audio_samples=sound.num_samples,
        sample_rate_hz=sound.rate_hz,
        num_channels=sound.num_channels,
        duration_us=max(ends) - min(starts),
    )


def _measure_fps(times: NDArray[np.int64], declared: Fraction | None) -> tuple[float, bool]:
    """Return the rate, and whether it alone gives back every timestamp to the microsecond."""
    span_us = int(times[-1] - times[0])
    if len(times) < 2 or span_us == 0:
        return float(declared or 0), len(times) < 2
    measured = Fraction((len(times) - 1) * MICROSECONDS, span_us)
    for rate in (declared, measured.limit_denominator(1001), measured):
        if rate and np.array_equal(regular_times_us(len(times), float(rate)), times - times[0]):
            return float(rate), True
    return float(measured), False


def _time_us(frame: VideoFrame | AudioFrame, what: str) -> int:
    """Return a frame's presentation time, rounded to microseconds in integers."""
    base = frame.time_base
    if frame.pts is None or base is None:
        raise DataError("no_timestamps", f"a frame of the {what} carries no time")
    return _ticks_to_us(frame.pts, base)


def _ticks_to_us(ticks: int, base: Fraction) -> int:
    return (2 * ticks * MICROSECONDS * base.numerator + base.denominator) // (2 * base.denominator)


def _pixels(frame: VideoFrame, reformatter: VideoReformatter) -> Tensor:
    """Return uint8 [1, 3, H, W], turned as it is to be displayed."""
    # One thread, as for decoding: FFmpeg would start one a core for every frame.
    pixels: NDArray[Any] = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    if turns := round(frame.rotation / 90) % 4:
        pixels = np.ascontiguousarray(np.rot90(pixels, turns))
    return by_pixel(pixels)


def _mono(frame: AudioFrame) -> NDArray[np.float32]:
    """Return float32 [S], the mean of the channels; integers scaled to -1..1."""
    values: NDArray[Any] = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, frame.layout.nb_channels).T
    if values.dtype.kind == "u":
        scaled = (values.astype(np.float32) - 128.0) / 128.0
    elif values.dtype.kind == "i":
        scaled = values.astype(np.float32) / 2.0 ** (8 * values.dtype.itemsize - 1)
    else:
        scaled = values.astype(np.float32)
    # One channel is its own mean; asking for it takes longer than decoding the frame.
    mono: NDArray[np.float32] = scaled[0] if len(scaled) == 1 else scaled.mean(axis=0)
    return mono
