"""Words with their times, in the layouts that they come in, as `segments` of a record.

    [{"start_s": 0.4, "end_s": 1.1, "text": "Hi"}, ...]   our own
    {"segments": [{"start": 0.4, "end": 1.1, ...}]}       Whisper's; seconds too
    {"start": [0.4, ...], "end": [1.1, ...], "text": [...]}   columns of a dataset
    .srt, .vtt                                            subtitles

All else that an entry holds stays in it. Times that are no numbers of seconds, run backwards or
have no text are refused with the number of the entry or line.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from omni_train.config.errors import DataError
from omni_train.data.split import read_segments

SUBTITLES = (".srt", ".vtt")
_TIME = r"(?:(\d+):)?([0-5]\d):([0-5]\d)[.,](\d{3})"
_TIMES = re.compile(rf"{_TIME}[ \t]+-->[ \t]+{_TIME}(?:[ \t].*)?")
# Styles, voices and inner times; a `<` in a text that is none of these stays.
_MARK = re.compile(r"</?(?:[bicsuv]|font|lang|rt|ruby)(?:[ .][^<>]*)?>|<[\d:.]+>|\{\\[^{}]*\}")
_NO_CUE = ("NOTE", "STYLE", "REGION")


def as_segments(value: Any) -> list[dict[str, Any]]:
    """Return segments with our names.

    Raises:
        DataError: `bad_segments`.
    """
    entries = _rows_of(value) if isinstance(value, dict) else value
    if isinstance(entries, list):
        entries = [_renamed(entry) for entry in entries]
    read_segments(entries)
    found: list[dict[str, Any]] = entries
    return found


def read_subtitles(path: Path) -> list[dict[str, Any]]:
    """Return the cues of a subtitle file as segments.

    Raises:
        DataError: `bad_subtitles` with the line, `bad_segments`.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError("bad_subtitles", f"{path.name} is not UTF-8: {error}") from error
    web = path.suffix.lower() == ".vtt"
    blocks = _blocks(lines)
    if web:
        if not blocks or not re.match(r"WEBVTT(?:[ \t]|$)", blocks[0][1][0]):
            raise DataError("bad_subtitles", f"{path.name} does not begin with WEBVTT")
        blocks = [block for block in blocks[1:] if not block[1][0].startswith(_NO_CUE)]
    segments = []
    for line, block in blocks:
        # A cue may have a name, or a number, before its times.
        named = int("-->" not in block[0])
        match = _TIMES.fullmatch(block[named]) if len(block) > named else None
        if match is None:
            where = f"line {line + named} of {path.name}"
            raise DataError("bad_subtitles", f"{where}: no times such as 00:01:02,500 --> ...")
        text = " ".join(part for row in block[named + 1 :] if (part := _plain(row, web)))
        start, end = _seconds(match.groups()[:4]), _seconds(match.groups()[4:])
        if text:
            segments.append({"start_s": start, "end_s": end, "text": text})
    return as_segments(segments)


def _renamed(entry: Any) -> Any:
    """Whisper's `start` and `end` under our names, unless those are there."""
    if not isinstance(entry, dict):
        return entry
    names = {"start": "start_s", "end": "end_s"}
    return {
        names[name] if name in names and names[name] not in entry else name: value
        for name, value in entry.items()
    }


def _rows_of(columns: dict[str, Any]) -> list[dict[str, Any]]:
    lengths = {len(v) if isinstance(v, list) else -1 for v in columns.values()}
    if len(lengths) != 1 or -1 in lengths:
        raise DataError("bad_segments", "segments is neither a list nor columns of one length")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _blocks(lines: list[str]) -> list[tuple[int, list[str]]]:
    """Return (number of the first line, lines) of what blank lines part."""
    blocks: list[tuple[int, list[str]]] = []
    before = ""
    for number, line in enumerate(lines, 1):
        if line.strip():
            if not before:
                blocks.append((number, []))
            blocks[-1][1].append(line.strip())
        before = line.strip()
    return blocks


def _seconds(parts: tuple[str | None, ...]) -> float:
    hours, minutes, seconds, thousandths = (int(part or 0) for part in parts)
    return (hours * 3600 + minutes * 60 + seconds) + thousandths / 1000


def _plain(line: str, web: bool) -> str:
    text = _MARK.sub("", line).strip()
    return html.unescape(text) if web else text
