"""TMRoPE: time-aligned three-axis position ids of one document, and the interleaving of video with
its sound (RECIPE.md section 4).

Done here: positions from spans, in integers, on the CPU, for one document at a time; every clip has
its own times and its own sound. Not done here: finding spans in ids, packing, the rotary embedding.

Letters: T tokens of the document, t temporal patches of a clip, V = t * height * width its video
tokens, A its audio tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MICROSECONDS = 1_000_000
# Times arrive rounded to whole microseconds, and so may lie just below an exact multiple of an id.
ROUNDING_GUARD_US = 1

Int64Array = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class TextSpan:
    """Ids of text, media bos/eos excluded."""

    num_tokens: int


@dataclass(frozen=True, slots=True)
class AudioSpan:
    """`<audio_bos>`, `num_tokens` placeholders of 40 ms, `<audio_eos>`."""

    num_tokens: int


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """`<vision_bos>`, height x width placeholders (grid after the merge), `<vision_eos>`."""

    height: int
    width: int


@dataclass(frozen=True, slots=True)
class VideoSpan:
    """`<vision_bos>`, V placeholders, `<vision_eos>`: a clip whose sound is absent or left out.

    Args:
        patch_times_us: int64 [t], not falling, time of each temporal patch after the clip's zero.
        height, width: grid after the merge.
    """

    patch_times_us: Int64Array
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class SoundVideoSpan:
    """`<vision_bos><audio_bos>`, V + A interleaved placeholders, `<audio_eos><vision_eos>`.

    Args:
        patch_times_us: int64 [t], not falling, time of each temporal patch after the clip's zero.
        height, width: grid after the merge.
        num_audio_tokens: A, of 40 ms each.
        audio_start_us: time of the first sample after the clip's zero.
    """

    patch_times_us: Int64Array
    height: int
    width: int
    num_audio_tokens: int
    audio_start_us: int = 0


Span = TextSpan | AudioSpan | ImageSpan | VideoSpan | SoundVideoSpan


@dataclass(frozen=True, slots=True)
class RopePositions:
    """Positions of one document.

    Args:
        position_ids: int64 [3, T], rows time, height, width.
        is_audio: one entry per span: bool [V + A] telling which of its placeholders are sound, for
            a `SoundVideoSpan`; None for every other span.
    """

    position_ids: Int64Array
    is_audio: list[BoolArray | None]


def span_length(span: Span) -> int:
    """Return the number of tokens of a span, its bos and eos included."""
    match span:
        case TextSpan():
            return span.num_tokens
        case AudioSpan():
            return span.num_tokens + 2
        case ImageSpan():
            return span.height * span.width + 2
        case VideoSpan():
            return len(span.patch_times_us) * span.height * span.width + 2
        case SoundVideoSpan():
            num_video = len(span.patch_times_us) * span.height * span.width
            return num_video + span.num_audio_tokens + 4


def time_ids(times_us: Int64Array, *, positions_per_second: int) -> Int64Array:
    """Return floor(time * positions_per_second) of times in microseconds, in integers."""
    return (times_us + ROUNDING_GUARD_US) * positions_per_second // MICROSECONDS


def rope_positions(
    spans: list[Span], *, positions_per_second: int, seconds_per_chunk: int
) -> RopePositions:
    """Return the TMRoPE ids of a document.

    Each span starts at (true maximum of all ids so far) + 1 on all axes. Within a clip with sound,
    video and audio tokens share one clock and are cut where the time id passes multiples of
    `positions_per_second * seconds_per_chunk`; each block holds its video tokens, then its audio
    tokens.
    """
    total = sum(span_length(span) for span in spans)
    out = np.empty((3, total), dtype=np.int64)
    orders: list[BoolArray | None] = []
    column, first_id = 0, 0
    for span in spans:
        end = column + span_length(span)
        order: BoolArray | None = None
        match span:
            case TextSpan() | AudioSpan():
                out[:, column:end] = np.arange(first_id, first_id + end - column)
                first_id += end - column
            case ImageSpan():
                times = np.zeros(1, dtype=np.int64)
                first_id = _fill_vision(out[:, column:end], times, span, first_id)
            case VideoSpan():
                times = time_ids(span.patch_times_us, positions_per_second=positions_per_second)
                first_id = _fill_vision(out[:, column:end], times, span, first_id)
            case SoundVideoSpan():
                times = time_ids(span.patch_times_us, positions_per_second=positions_per_second)
                start = time_ids(
                    np.array([span.audio_start_us], dtype=np.int64),
                    positions_per_second=positions_per_second,
                )
                sound = start + np.arange(span.num_audio_tokens, dtype=np.int64)
                order, first_id = _fill_sound_video(
                    out[:, column:end],
                    times,
                    sound,
                    span,
                    first_id,
                    chunk=positions_per_second * seconds_per_chunk,
                )
        orders.append(order)
        column = end
    return RopePositions(out, orders)


def _fill_vision(
    out: Int64Array, times: Int64Array, span: ImageSpan | VideoSpan, first_id: int
) -> int:
    """Fill [3, V + 2] with bos, grid, eos; return the id after eos."""
    base = first_id + 1
    out[:, 0] = first_id
    grid = (len(times), span.height, span.width)
    out[0, 1:-1].reshape(grid)[...] = (base + times)[:, None, None]
    out[1, 1:-1].reshape(grid)[...] = np.arange(base, base + span.height)[:, None]
    out[2, 1:-1].reshape(grid)[...] = np.arange(base, base + span.width)
    eos = base + max(int(times.max(initial=0)), span.height - 1, span.width - 1) + 1
    out[:, -1] = eos
    return eos + 1


def _fill_sound_video(
    out: Int64Array,
    times: Int64Array,
    sound: Int64Array,
    span: SoundVideoSpan,
    first_id: int,
    *,
    chunk: int,
) -> tuple[BoolArray, int]:
    """Fill [3, V + A + 4]; return bool [V + A] (is sound) and the id after the two eos."""
    base = first_id + 1
    frame = span.height * span.width
    # A patch comes after all earlier patches and after the sound of earlier blocks; a sound token
    # after all earlier sound and after the patches of its own and earlier blocks.
    sound_before = np.searchsorted(sound, times // chunk * chunk)
    patches_before = np.searchsorted(times, (sound // chunk + 1) * chunk)
    video_at = (np.arange(len(times)) * frame + sound_before)[:, None] + np.arange(frame)
    sound_at = np.arange(len(sound)) + patches_before * frame

    inner = out[:, 2:-2]
    inner[0, video_at] = (base + times)[:, None]
    inner[1, video_at] = np.repeat(np.arange(base, base + span.height), span.width)
    inner[2, video_at] = np.tile(np.arange(base, base + span.width), span.height)
    inner[:, sound_at] = base + sound
    is_audio = np.zeros(inner.shape[1], dtype=np.bool_)
    is_audio[sound_at] = True

    last = max(
        int(times.max(initial=0)), int(sound.max(initial=0)), span.height - 1, span.width - 1
    )
    eos = base + last + 1
    out[:, :2] = first_id
    out[:, -2:] = eos
    return is_audio, eos + 1
