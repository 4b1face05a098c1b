"""Long recordings cut into parts that fit a pack, each with its own text.

Only where the text says when it was spoken: speech recognition whose record has `segments`, words
or sentences with their times:

    {"task": "asr", "messages": [...], "segments": [{"start_s": 0.4, "end_s": 1.1, "text": "Hi"}]}

Parts begin and end at whole blocks of two seconds, which is where the audio tower's attention ends
too, and never inside a segment. Anything else that is over the budget is left out of the plan.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import soundfile

from omni_train.config.errors import DataError
from omni_train.data.media import decode_audio, num_samples_16k
from omni_train.data.types import IndexRow, MediaInfo, MediaKind, RawSample
from omni_train.speech.mel import num_audio_tokens, num_mel_frames

SPLIT_TASK = "asr"
BLOCK_S = 2
RATE_HZ = 16_000
# Written without spaces between segments.
UNSPACED_LANGUAGES = ("zh", "yue", "ja", "th")
# A part's span has a bos and an eos.
_BRACKETS = 2


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a recording with its text.

    Args:
        number: of the part, from 0.
        start, stop: samples at 16 kHz.
        text: what is said in it.
        num_text_tokens: as in an index row, of the dialogue with this text as its reply.
    """

    number: int
    start: int
    stop: int
    text: str
    num_text_tokens: int


def can_split(row: IndexRow) -> bool:
    """Say whether a row is of the kind that may be split; its record decides."""
    return row.task == SPLIT_TASK and [m.kind for m in row.media] == [MediaKind.audio]


def split_recording(
    record: Mapping[str, Any],
    row: IndexRow,
    budget: int,
    count_tokens: Callable[[Sequence[Mapping[str, Any]]], int],
) -> list[Part]:
    """Return parts of at most `budget` tokens that together are the whole recording.

    Args:
        record: the sample's JSON member.
        row: its index row.
        budget: tokens of a part, text and sound.
        count_tokens: text tokens of a dialogue.

    Raises:
        DataError: `over_budget`, with what stands in the way.
    """
    segments = _segments(record)
    joint = "" if record.get("language") in UNSPACED_LANGUAGES else " "
    reply = record["messages"][-1]["content"]
    if "".join("".join(s[2] for s in segments).split()) != "".join(str(reply).split()):
        raise DataError("over_budget", "the segments' texts are not the reply", key=row.key)
    info = row.media[0]
    length = int(num_samples_16k(info.num_audio_samples, info.sample_rate_hz))
    block = BLOCK_S * RATE_HZ
    cuts = [c for c in range(block, length, block) if not _inside(segments, c / RATE_HZ)]
    parts: list[Part] = []
    start = 0
    while start < length:
        best = None
        for stop in [*(c for c in cuts if c > start), length]:
            sound = int(num_audio_tokens(num_mel_frames(stop - start)))
            if sound + _BRACKETS > budget:
                break
            # A segment whose time lies past the sound's end belongs to the last part.
            end_s = stop / RATE_HZ if stop < length else math.inf
            text = joint.join(s[2] for s in segments if start / RATE_HZ <= s[0] < end_s)
            num_text = count_tokens(_with_reply(record["messages"], text))
            if sound + _BRACKETS + num_text > budget:
                break
            best = Part(len(parts), start, stop, text, num_text)
        if best is None:
            raise DataError(
                "over_budget", f"no cut between segments after {start / RATE_HZ:.0f} s", key=row.key
            )
        parts.append(best)
        start = best.stop
    return parts


def part_row(row: IndexRow, part: Part) -> IndexRow:
    """Return the index row of a part; its members lie where the whole recording's do."""
    size = part.stop - part.start
    info = dataclasses.replace(
        row.media[0],
        num_audio_samples=size,
        sample_rate_hz=RATE_HZ,
        num_channels=1,
        duration_us=size * 1_000_000 // RATE_HZ,
    )
    return dataclasses.replace(
        row,
        key=f"{row.key}-{part.number:04d}",
        media=[info],
        num_text_tokens=part.num_text_tokens,
    )


def cut(raw: RawSample, part: Part) -> RawSample:
    """Return the sample of a part: its stretch of the sound, its text, its index row."""
    info: MediaInfo = raw.row.media[0]
    wave = decode_audio(raw.media[info.member], info)[part.start : part.stop]
    out = io.BytesIO()
    soundfile.write(out, wave.numpy(), RATE_HZ, format="WAV", subtype="FLOAT")
    record = {**raw.record, "messages": _with_reply(raw.record["messages"], part.text)}
    return RawSample(part_row(raw.row, part), record, {info.member: out.getvalue()})


def _with_reply(messages: Sequence[Mapping[str, Any]], text: str) -> list[Mapping[str, Any]]:
    return [*messages[:-1], {**messages[-1], "content": text}]


def _inside(segments: Sequence[tuple[float, float, str]], time_s: float) -> bool:
    return any(start < time_s < end for start, end, _ in segments)


def _segments(record: Mapping[str, Any]) -> list[tuple[float, float, str]]:
    """Return (start, end, text) in rising order of the record's segments."""
    found = record.get("segments")
    try:
        segments = [
            (float(entry["start_s"]), float(entry["end_s"]), str(entry["text"]).strip())
            for entry in found or []
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError("over_budget", f"segments cannot be read: {error!r}") from error
    rising = all(a[0] <= b[0] for a, b in pairwise(segments))
    if not segments or not rising or any(end < start for start, end, _ in segments):
        raise DataError("over_budget", "longer than a pack and without segments in rising order")
    turns = record.get("messages")
    if not isinstance(turns, list) or not isinstance(turns[-1].get("content"), str):
        raise DataError("over_budget", "only a reply of plain text can be split")
    return segments
