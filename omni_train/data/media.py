"""Media from bytes: what a member holds (`probe`) and its contents, under caps.

    probe         bytes -> MediaInfo, by decoding everything once (offline, for the index)
    probe_pictures  the same for a clip whose frames are pictures of their own
    decode_picture  bytes -> an RGB picture; `decode_image` gives it as uint8 [1, 3, H, W]
    decode_audio  bytes -> float32 [S], mono, 16 kHz; also of a clip's sound
    decode_video  bytes -> uint8 [N, 3, H, W], chosen frames

Done here: pictures (Pillow), sound files (libsndfile), resampling (soxr). Not done here: clips,
which clip.py opens with PyAV, and features (speech/mel.py, image.py). Nothing is ever opened by
name: all input is bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import PurePosixPath
from typing import TypeVar

import numpy as np
import soundfile
import soxr
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from omni_train.config.errors import DataError
from omni_train.data.chatml import MediaPiece
from omni_train.data.clip import (
    check_sound_format,
    decode_clip_sound,
    decode_frames,
    describe_pictures,
    probe_clip,
)
from omni_train.data.container import check_wav
from omni_train.data.image import resize, to_frame
from omni_train.data.stretch import decode_stretch
from omni_train.data.types import MediaInfo, MediaKind
from omni_train.data.video import MICROSECONDS, regular_times_us
from omni_train.speech.mel import SAMPLE_RATE_HZ

MAX_AUDIO_S = 3_600
MAX_IMAGE_PIXELS = 64_000_000
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
SOUND_FORMATS = ("WAV", "WAVEX", "FLAC", "MP3")
KIND_OF_SUFFIX = {
    ".wav": MediaKind.audio,
    ".flac": MediaKind.audio,
    ".mp3": MediaKind.audio,
    ".jpg": MediaKind.image,
    ".jpeg": MediaKind.image,
    ".png": MediaKind.image,
    ".webp": MediaKind.image,
    ".mp4": MediaKind.video,
    ".mkv": MediaKind.video,
    ".webm": MediaKind.video,
}
_READ_FRAMES = 1 << 16

IntOrArray = TypeVar("IntOrArray", int, NDArray[np.int64])


def probe(data: bytes, member: str) -> MediaInfo:
    """Decode a member once and return all facts about it but its place and hash in the shard.

    Raises:
        DataError: with a reason code, for whatever cannot be used for training.
    """
    suffix = PurePosixPath(member).suffix.lower()
    kind = KIND_OF_SUFFIX.get(suffix)
    if kind is None:
        raise DataError("unknown_media", f"{member} is none of {', '.join(KIND_OF_SUFFIX)}")
    if kind is MediaKind.video:
        return probe_clip(data, member)
    if kind is MediaKind.image:
        width, height = decode_picture(data).size
        return MediaInfo(kind=kind, member=member, width=width, height=height, num_frames=1)
    with _opened_sound(data) as file:
        num_samples = sum(map(len, _mono_blocks(file)))
        return MediaInfo(
            kind=kind,
            member=member,
            has_audio=True,
            num_audio_samples=num_samples,
            sample_rate_hz=file.samplerate,
            num_channels=file.channels,
            duration_us=num_samples * MICROSECONDS // file.samplerate,
        )


def probe_pictures(piece: MediaPiece, media: Mapping[str, bytes]) -> MediaInfo:
    """Decode a clip given as pictures once and return all facts about it but its places.

    Its clock starts at 0, where its sound starts too.

    Args:
        piece: names the pictures, their times and the sound.
        media: bytes by member name.

    Raises:
        DataError: `kind_mismatch`, `bad_header` where the sizes differ, and what `probe` finds.
    """
    infos = [probe(media[name], name) for name in piece.pictures]
    first = infos[0]
    for info in infos:
        if info.kind is not MediaKind.image:
            raise DataError("kind_mismatch", f"{info.member!r} is {info.kind.name}, not a picture")
        if (info.width, info.height) != (first.width, first.height):
            raise DataError("bad_header", f"{info.member!r} has another size than {first.member!r}")
    times = np.rint(np.array(piece.times_s) * MICROSECONDS).astype(np.int64)
    if not piece.times_s:
        times = regular_times_us(len(infos), piece.fps)
    clip = describe_pictures(first.member, times, piece.fps, size=(first.width, first.height))
    if piece.sound:
        sound = probe(media[piece.sound], piece.sound)
        if sound.kind is not MediaKind.audio:
            raise DataError("kind_mismatch", f"{piece.sound!r} is {sound.kind.name}, not sound")
        clip.has_audio = True
        clip.num_audio_samples = sound.num_audio_samples
        clip.sample_rate_hz, clip.num_channels = sound.sample_rate_hz, sound.num_channels
        clip.duration_us = max(clip.duration_us, sound.duration_us)
    return clip


def num_samples_16k(num_audio_samples: IntOrArray, sample_rate_hz: IntOrArray) -> IntOrArray:
    """Return the samples that `decode_audio` gives for so many at another rate: rounded, half up.

    Takes numbers or arrays of numbers.
    """
    doubled = 2 * num_audio_samples * SAMPLE_RATE_HZ + sample_rate_hz
    return doubled // (2 * sample_rate_hz)


def decode_audio(data: bytes, info: MediaInfo) -> Tensor:
    """Return float32 [S], mono at 16 kHz, S = `num_samples_16k` of what the index declares.

    Raises:
        DataError: `truncated` where less or more was decoded than declared, `stale_index` where the
            sample rate is another one, `empty_audio`, `non_finite`, and the container's own.
    """
    if info.first_sample is not None:
        length = num_samples_16k(info.num_audio_samples, info.sample_rate_hz)
        return torch.from_numpy(decode_stretch(data, info, length))
    if info.kind is MediaKind.video and not info.parts:
        wave, rate_hz, _ = decode_clip_sound(data)
        _check_wave(wave)
        return _at_16_khz([wave], rate_hz, info)
    with _opened_sound(data) as file:
        return _at_16_khz(_mono_blocks(file), file.samplerate, info)


def _at_16_khz(blocks: Iterable[NDArray[np.float32]], rate_hz: int, info: MediaInfo) -> Tensor:
    """Return float32 [S] at 16 kHz of a sound that comes in blocks, which are not kept."""
    if rate_hz != info.sample_rate_hz:
        raise DataError("stale_index", f"{rate_hz} Hz decoded, {info.sample_rate_hz} declared")
    # The resampler's own count may be one off; `measure` needs a count that follows from the index.
    wave = np.zeros(num_samples_16k(info.num_audio_samples, rate_hz), np.float32)
    resampler = soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32", quality="HQ")
    num_decoded = num_done = 0
    for block in chain(blocks, [np.zeros(0, np.float32)]):
        num_decoded += len(block)
        if rate_hz != SAMPLE_RATE_HZ:
            block = resampler.resample_chunk(block, last=not len(block))
        fitting = block[: len(wave) - num_done]
        wave[num_done : num_done + len(fitting)] = fitting
        num_done += len(fitting)
    if num_decoded != info.num_audio_samples:
        raise DataError(
            "truncated", f"{num_decoded} samples decoded, {info.num_audio_samples} declared"
        )
    return torch.from_numpy(wave)


def decode_image(data: bytes) -> Tensor:
    """Return uint8 [1, 3, H, W] of a picture; see `decode_picture`."""
    return to_frame(decode_picture(data))


def decode_picture(data: bytes) -> Image.Image:
    """Return a picture in RGB, turned as its EXIF data say.

    Raises:
        DataError: `too_large`, `truncated`, `corrupt`, or `bad_container` for another format.
    """
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as picture:
            if picture.width * picture.height > MAX_IMAGE_PIXELS:
                raise DataError(
                    "too_large",
                    f"{picture.width}x{picture.height} is over {MAX_IMAGE_PIXELS} pixels",
                )
            # In place and only where needed: either call copies a picture that is right already.
            ImageOps.exif_transpose(picture, in_place=True)
            picture.load()
            upright: Image.Image = picture
            if upright.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
                values = np.asarray(upright, dtype=np.int32) >> 8
                upright = Image.fromarray(values.clip(0, 255).astype(np.uint8))
            return upright if upright.mode == "RGB" else upright.convert("RGB")
    except Image.DecompressionBombError as error:
        raise DataError("too_large", str(error)) from error
    except UnidentifiedImageError as error:
        raise DataError("bad_container", f"no picture of {', '.join(IMAGE_FORMATS)}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        reason = "truncated" if "truncated" in str(error) else "corrupt"
        raise DataError(reason, str(error)) from error


def decode_video(
    data: bytes, indices: list[int], info: MediaInfo, *, size: tuple[int, int] | None = None
) -> Tensor:
    """Return the chosen frames, uint8 [N, 3, H, W]; see `clip.decode_frames`."""
    return torch.cat(list(decode_frames(data, indices, info, size=size)))


def decode_pictures(
    pictures: Sequence[bytes], info: MediaInfo, *, size: tuple[int, int]
) -> Iterator[Tensor]:
    """Yield pictures of a clip resized to `size` (height, width), each uint8 [1, 3, H, W].

    Raises:
        DataError: `stale_index` where a picture has another size than the index says.
    """
    for data in pictures:
        pixels = decode_image(data)
        if (pixels.shape[3], pixels.shape[2]) != (info.width, info.height):
            raise DataError("stale_index", f"a picture of the clip at {info.member} changed size")
        yield resize(pixels, *size)


class SoundInOrder(soundfile.SoundFile):
    """A sound file that is read from its start to its end.

    soundfile seeks to where it is after each read if it can, and a seek costs an mp3 the bits that
    its next frames are made from.
    """

    def seekable(self) -> bool:
        """Return False, so that no read is followed by a seek."""
        return False


@contextmanager
def _opened_sound(data: bytes) -> Iterator[soundfile.SoundFile]:
    """Open a sound file after checking what it declares; its errors become DataErrors."""
    check_wav(data)
    try:
        with SoundInOrder(io.BytesIO(data)) as file:
            if file.format not in SOUND_FORMATS:
                raise DataError("bad_container", f"sound is {file.format}, not {SOUND_FORMATS}")
            check_sound_format(file.samplerate, file.channels)
            if file.frames > MAX_AUDIO_S * file.samplerate:
                raise DataError(
                    "too_long",
                    f"{file.frames / file.samplerate:.0f} s declared, {MAX_AUDIO_S} allowed",
                )
            yield file
    except soundfile.LibsndfileError as error:
        raise DataError("corrupt", f"libsndfile says: {error}") from error


def _mono_blocks(file: soundfile.SoundFile) -> Iterator[NDArray[np.float32]]:
    """Yield float32 [_READ_FRAMES or, at the end, fewer]: the mean of the channels."""
    num_samples = 0
    while len(block := file.read(_READ_FRAMES, dtype="float32", always_2d=True)):
        mono: NDArray[np.float32] = block.mean(axis=1, dtype=np.float32)
        _check_wave(mono)
        num_samples += len(mono)
        if num_samples > MAX_AUDIO_S * file.samplerate:
            raise DataError("too_long", f"more than {MAX_AUDIO_S} s of sound")
        yield mono
    if num_samples != file.frames:
        raise DataError("truncated", f"{num_samples} samples decoded, {file.frames} declared")
    if not num_samples:
        raise DataError("empty_audio", "the sound has no samples")


def _check_wave(wave: NDArray[np.float32]) -> None:
    if not len(wave):
        raise DataError("empty_audio", "the sound has no samples")
    if not np.isfinite(wave).all():
        raise DataError("non_finite", "the sound holds NaN or infinity")
