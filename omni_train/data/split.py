"""Long recordings and clips cut into parts that fit a pack, each with its own text.

Only where the text says when it was spoken: speech recognition whose record has `segments`, words
or sentences with their times in seconds:

    {"task": "asr", "messages": [...], "segments": [{"start_s": 0.4, "end_s": 1.1, "text": "Hi"}]}

Parts begin and end at whole blocks of two seconds on the medium's own clock, which is where the
audio tower's attention and the interleaving of picture and sound end too, and never inside a
segment. A part of a clip has the frames and the sound of its stretch, at their true times. Anything
else that is over the budget is left out of the plan. Not done here: decoding (stretch.py).
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from omni_train.config.errors import DataError
from omni_train.data.chatml import split_reply
from omni_train.data.measure import measure
from omni_train.data.media import num_samples_16k
from omni_train.data.types import (
    IndexRow,
    MediaInfo,
    MediaKind,
    ModelSpec,
    ProcessingConfig,
    RawSample,
    SoundMismatch,
)
from omni_train.data.video import MICROSECONDS, clip_zero_us, frame_times_us, plan_clip

SPLIT_TASK = "asr"
BLOCK_S = 2
RATE_HZ = 16_000
_BLOCK = BLOCK_S * RATE_HZ
# Written without spaces between segments.
UNSPACED_LANGUAGES = ("zh", "yue", "ja", "th")


class Segment(NamedTuple):
    """Words with the time in which they are spoken, in seconds from the medium's start."""

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a recording or clip with its text.

    Args:
        number: of the part, from 0.
        start, stop: on the medium's clock, in samples at 16 kHz; the last part ends where the
            medium does.
        text: what is said in it.
        num_text_tokens, num_target_tokens: as in an index row, of the dialogue with this text as
            its reply.
    """

    number: int
    start: int
    stop: int
    text: str
    num_text_tokens: int
    num_target_tokens: int


def read_segments(value: object) -> list[Segment]:
    """Return a record's segments.

    Raises:
        DataError: `bad_segments`, with the number of the segment, from 1, and what is wrong.
    """
    if not isinstance(value, list):
        raise DataError("bad_segments", f"segments is {type(value).__name__}, not a list")
    segments: list[Segment] = []
    for number, entry in enumerate(value, 1):
        if not isinstance(entry, Mapping):
            raise DataError("bad_segments", f"segment {number} is no object")
        times = [entry.get("start_s"), entry.get("end_s")]
        # bool is an int in Python.
        if not all(isinstance(t, int | float) and not isinstance(t, bool) for t in times):
            raise DataError("bad_segments", f"segment {number} has the times {times}, no numbers")
        start_s, end_s = float(times[0]), float(times[1])  # type: ignore[arg-type]
        if not (math.isfinite(end_s) and 0 <= start_s <= end_s):
            raise DataError("bad_segments", f"segment {number} lasts from {start_s} to {end_s} s")
        if not isinstance(text := entry.get("text"), str):
            raise DataError("bad_segments", f"segment {number} has the text {text!r:.40}")
        if segments and start_s < segments[-1].start_s:
            raise DataError("bad_segments", f"segment {number} begins before the one before it")
        segments.append(Segment(start_s, end_s, text.strip()))
    return segments


def joint_of(language: object) -> str:
    """Return what stands between segments in a language's texts."""
    return "" if language in UNSPACED_LANGUAGES else " "


def check_reply(segments: Sequence[Segment], reply: str) -> None:
    """Refuse segments whose texts are not the reply, spaces aside (`segments_mismatch`)."""
    said, written = ("".join(text.split()) for text in ("".join(s.text for s in segments), reply))
    if said != written:
        pairs = enumerate(zip(said, written, strict=False))
        same = next((n for n, (a, b) in pairs if a != b), min(len(said), len(written)))
        raise DataError(
            "segments_mismatch",
            f"the segments' texts are not the reply: {said[same : same + 20]!r} there, "
            f"{written[same : same + 20]!r} here; make them equal, or leave the segments out",
        )


def check_times(segments: Sequence[Segment], info: MediaInfo) -> None:
    """Refuse segments that begin after their medium ends (`bad_segments`): other units, say."""
    end_s = _length(info) / RATE_HZ
    if segments and segments[-1].start_s > end_s:
        raise DataError(
            "bad_segments",
            f"a segment begins at {segments[-1].start_s:g} s, {info.member} ends at {end_s:g} s",
        )


def can_split(row: IndexRow) -> bool:
    """Say whether a row is of the kind that may be split; its record decides.

    A recording, or a clip with its sound; a clip given as pictures is not split.
    """
    if row.task != SPLIT_TASK or len(row.media) != 1:
        return False
    info = row.media[0]
    heard = info.has_audio and info.use_audio and not info.parts
    return info.kind is MediaKind.audio or (info.kind is MediaKind.video and heard)


def split_recording(
    record: Mapping[str, Any],
    row: IndexRow,
    budget: int,
    count_tokens: Callable[[Sequence[Mapping[str, Any]]], tuple[int, int]],
    config: ProcessingConfig,
    spec: ModelSpec,
) -> list[Part]:
    """Return parts of at most `budget` tokens that together are the whole recording or clip.

    Args:
        record: the sample's JSON member.
        row: its index row.
        budget: tokens of a part, text and media.
        count_tokens: text tokens of a dialogue, and the supervised ones among them.
        config, spec: as for `measure`.

    Raises:
        DataError: `over_budget`, with what stands in the way.
    """
    segments = _segments_of(record, row)
    _check_mismatch(row, config, spec)
    joint = joint_of(record.get("language"))
    length, ends = _length(row.media[0]), _ends(segments, row.media[0])
    starts = [segment.start_s for segment in segments]
    parts: list[Part] = []
    while not parts or parts[-1].stop < length:
        start = parts[-1].stop if parts else 0
        first = bisect_left(starts, start / RATE_HZ)
        found: Part | None = None
        # The longest that fits, found by halving: longer stretches have more tokens.
        low, high = 0, len(ends)
        while low < high:
            middle = (low + high) // 2
            stop = ends[middle]
            # A segment that begins where the medium ends belongs to the last part.
            last = bisect_left(starts, stop / RATE_HZ) if stop < length else len(starts)
            text = joint.join(segment.text for segment in segments[first:last])
            tried = Part(len(parts), start, stop, text, 0, 0)
            left = budget - _num_media_tokens(row, tried, config, spec)
            # Counting text takes long, and sound alone rules most out.
            counts = count_tokens(_with_reply(record["messages"], text)) if left > 0 else (1, 0)
            if counts[0] <= left:
                found, low = Part(len(parts), start, stop, text, *counts), middle + 1
            else:
                high = middle
        if found is None or not _has_all(row, found):
            wrong = "no cut between segments" if found is None else "only sound or only picture"
            place = f"after {start / RATE_HZ:.0f} s of {row.media[0].member}"
            raise DataError("over_budget", f"{wrong} {place}", key=row.key)
        parts.append(found)
        ends = ends[bisect_right(ends, found.stop) :]
    return parts


def part_row(row: IndexRow, part: Part) -> IndexRow:
    """Return the index row of a part; its members lie where the whole medium's do."""
    info = row.media[0]
    first, last = _samples_of(info, part)
    part_info = dataclasses.replace(
        info,
        first_sample=first,
        num_audio_samples=last - first,
        duration_us=(last - first) * MICROSECONDS // max(info.sample_rate_hz, 1),
    )
    if info.kind is MediaKind.video:
        times = _frames_of(info, part)
        part_info.num_frames = len(times)
        part_info.frame_times_us = times
        part_info.first_frame_us = times[0] if times else info.first_frame_us
        part_info.audio_start_us += first * MICROSECONDS // info.sample_rate_hz
    return dataclasses.replace(
        row,
        key=f"{row.key}-{part.number:04d}",
        media=[part_info],
        num_text_tokens=part.num_text_tokens,
        num_target_tokens=part.num_target_tokens,
    )


def cut(raw: RawSample, part: Part) -> RawSample:
    """Return the sample of a part: its text, its index row, the bytes of the whole medium."""
    record = {**raw.record, "messages": _with_reply(raw.record["messages"], part.text)}
    return RawSample(part_row(raw.row, part), record, raw.media)


def _segments_of(record: Mapping[str, Any], row: IndexRow) -> list[Segment]:
    """Return segments that say where a medium may be cut; else `over_budget` and why not."""
    try:
        segments = read_segments(record.get("segments") or [])
        if not segments:
            raise DataError("over_budget", "longer than a pack and without segments")
        _, reply = split_reply(record["messages"])
        check_reply(segments, reply)
        check_times(segments, row.media[0])
    except DataError as error:
        raise DataError("over_budget", error.detail, key=row.key) from error
    return segments


def _ends(segments: Sequence[Segment], info: MediaInfo) -> list[int]:
    """Return where a part may end: whole blocks that no segment goes on over, and the very end."""
    length = _length(info)
    blocks = np.arange(_BLOCK, length, _BLOCK)
    before = np.searchsorted([segment.start_s for segment in segments], blocks / RATE_HZ)
    lasting = np.maximum.accumulate([0.0, *(segment.end_s for segment in segments)])[before]
    return [*blocks[lasting <= blocks / RATE_HZ].tolist(), length]


def _num_media_tokens(row: IndexRow, part: Part, config: ProcessingConfig, spec: ModelSpec) -> int:
    return int(measure([part_row(row, part)], config, spec).num_tokens[0])


def _check_mismatch(row: IndexRow, config: ProcessingConfig, spec: ModelSpec) -> None:
    """Refuse a clip whose sound and picture the policy cuts or drops; its parts are as they are."""
    info = row.media[0]
    if info.kind is MediaKind.audio or config.av_mismatch is SoundMismatch.keep:
        return
    apart_s = plan_clip(info, config, spec).mismatch_us / MICROSECONDS
    if abs(apart_s) > config.av_mismatch_tolerance_s:
        raise DataError(
            "over_budget",
            f"its sound ends {apart_s:+.3f} s after its picture, and a clip is split only where "
            f"data.processing.av_mismatch={config.av_mismatch.name} leaves it whole",
            key=row.key,
        )


def _has_all(row: IndexRow, part: Part) -> bool:
    """Say whether a part has sound and, of a clip, a picture."""
    info = part_row(row, part).media[0]
    return info.num_audio_samples > 0 and (info.kind is MediaKind.audio or info.num_frames > 0)


def _length(info: MediaInfo) -> int:
    """Return when a medium ends on its own clock, in samples at 16 kHz."""
    if info.kind is MediaKind.audio:
        return int(num_samples_16k(info.num_audio_samples, info.sample_rate_hz))
    return -(-info.duration_us * RATE_HZ // MICROSECONDS)


def _samples_of(info: MediaInfo, part: Part) -> tuple[int, int]:
    """Return the first sample of a part's sound and the one behind its last, at its own rate."""
    rate_hz, wait_us = info.sample_rate_hz, 0
    if info.kind is MediaKind.video:
        wait_us = info.audio_start_us - clip_zero_us(info, with_sound=True)

    def sample_at(place: int) -> int:
        ticks = place * MICROSECONDS - wait_us * RATE_HZ
        return -(-ticks * rate_hz // (RATE_HZ * MICROSECONDS))

    ends = (part.start, part.stop)
    first, last = (min(max(sample_at(end), 0), info.num_audio_samples) for end in ends)
    return first, info.num_audio_samples if part.stop >= _length(info) else last


def _frames_of(info: MediaInfo, part: Part) -> list[int]:
    """Return the times of a part's frames on the container's clock, microseconds."""
    times = frame_times_us(info)
    places = (times - clip_zero_us(info, with_sound=True)) * RATE_HZ
    inside = places >= part.start * MICROSECONDS
    if part.stop < _length(info):
        inside &= places < part.stop * MICROSECONDS
    found: list[int] = times[inside].tolist()
    return found


def _with_reply(messages: Sequence[Mapping[str, Any]], text: str) -> list[Mapping[str, Any]]:
    return [*messages[:-1], {**messages[-1], "content": text}]
