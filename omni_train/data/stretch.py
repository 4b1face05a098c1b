"""The sound of one part of a long recording or clip, without decoding the whole again.

    wav, flac, mp3   libsndfile's seek, exact to the sample
    mp4              FFmpeg's seek; a frame's time says which sample it begins with
    mkv, webm        decoded from the start, and only up to the part's end: times there are whole
                     milliseconds, which do not tell one sample from its neighbours

What comes is the same stretch of the whole's sound: bit for bit at 16 kHz, within rounding where it
is resampled, since the resampler is given what lies before and after. A decoder that draws noise
(aac) draws it anew after a seek. Not done here: where parts begin (split.py).

Letters: S samples at 16 kHz, N at the medium's own rate.
"""

from __future__ import annotations

import io
import math

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from omni_train.config.errors import DataError
from omni_train.data.clip import decode_clip_sound
from omni_train.data.container import MP4, check_wav, clip_container
from omni_train.data.types import MediaInfo, MediaKind
from omni_train.data.video import MICROSECONDS
from omni_train.speech.mel import SAMPLE_RATE_HZ

# The resampler's filter is shorter: from 0.02 s on, more context changes nothing.
_CONTEXT_S = 0.1
# What a decoder must have heard for a sample to be right: 80 ms (opus), a few frames (aac, mp3).
_PREROLL_US = 500_000

Wave = NDArray[np.float32]


def decode_stretch(data: bytes, info: MediaInfo, num_samples: int) -> Wave:
    """Return float32 [S], mono at 16 kHz, of a part.

    Args:
        data: the whole member.
        info: of the part; `first_sample` and `num_audio_samples` say which samples it has.
        num_samples: S.

    Raises:
        DataError: `truncated` where samples are missing, `stale_index` where the rate is another
            one, `non_finite`, `corrupt`, and what the container's own checks find.
    """
    rate_hz = info.sample_rate_hz
    assert info.first_sample is not None, info.member
    # A whole number of samples at both rates, so that the resampler's grid is that of the whole.
    grid = rate_hz // math.gcd(rate_hz, SAMPLE_RATE_HZ)
    context = 0 if rate_hz == SAMPLE_RATE_HZ else -(-int(_CONTEXT_S * rate_hz) // grid) * grid
    lead = min(context, info.first_sample // grid * grid)
    first, needed = info.first_sample - lead, lead + info.num_audio_samples
    read = _of_clip if info.kind is MediaKind.video else _of_file
    wave = read(data, info, first, first + needed + context)
    if len(wave) < needed:
        raise DataError(
            "truncated", f"samples {first} to {first + needed} are asked for, {len(wave)} came"
        )
    if not np.isfinite(wave).all():
        raise DataError("non_finite", "the sound holds NaN or infinity")
    if rate_hz != SAMPLE_RATE_HZ:
        wave = soxr.resample(wave, rate_hz, SAMPLE_RATE_HZ, quality="HQ")
    wave = wave[lead * SAMPLE_RATE_HZ // rate_hz :][:num_samples]
    # The resampler's own count may be one off at the sound's end.
    padded: Wave = np.pad(wave, (0, num_samples - len(wave))).astype(np.float32, copy=False)
    return padded


def _of_file(data: bytes, info: MediaInfo, first: int, stop: int) -> Wave:
    """Return float32 [N] mono, samples `first` to `stop` of a sound file, or to its end."""
    check_wav(data)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_rate(file.samplerate, info)
            # An mp3 frame is made from bits of those before it.
            before = int(file.format == "MP3") * _PREROLL_US * file.samplerate // MICROSECONDS
            begin = max(first - before, 0)
            file.seek(begin)
            block = file.read(stop - begin, dtype="float32", always_2d=True)[first - begin :]
    except soundfile.LibsndfileError as error:
        raise DataError("corrupt", f"libsndfile says: {error}") from error
    mono: Wave = block.mean(axis=1, dtype=np.float32)
    return mono


def _of_clip(data: bytes, info: MediaInfo, first: int, stop: int) -> Wave:
    """Return float32 [N] mono, samples `first` to `stop` of a clip's sound, or to its end."""
    rate_hz, part = info.sample_rate_hz, info.first_sample or 0
    whole_start_us = info.audio_start_us - part * MICROSECONDS // rate_hz
    seek_us = whole_start_us + first * MICROSECONDS // rate_hz - _PREROLL_US
    # A millisecond more than the samples asked for: times are rounded.
    until_us = whole_start_us + stop * MICROSECONDS // rate_hz + 1_000
    if clip_container(data) == MP4 and seek_us > whole_start_us:
        wave, found_hz, start_us = decode_clip_sound(data, seek_us=seek_us, until_us=until_us)
        _check_rate(found_hz, info)
        begin = round((start_us - whole_start_us) * rate_hz / MICROSECONDS)
        if 0 < begin <= first:
            return wave[first - begin : stop - begin]
    wave, found_hz, _ = decode_clip_sound(data, until_us=until_us)
    _check_rate(found_hz, info)
    return wave[first:stop]


def _check_rate(found_hz: int, info: MediaInfo) -> None:
    if found_hz != info.sample_rate_hz:
        raise DataError("stale_index", f"{found_hz} Hz decoded, {info.sample_rate_hz} declared")
