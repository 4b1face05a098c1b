"""Rows of the index from a webdataset tar, also from one that another tool wrote.

Done here: walking the tar's headers, grouping members into samples, refusing what a reader would
lose or misread without a word, hashing and probing each member. Nothing is ever extracted; one
medium at a time is in memory. Not done here: storing rows (index.py).

    <key>.json      {"messages": [...], "task": ..., "language": ..., "speaker": ..., "source": ...}
    <key>.<member>  media that the messages name by <member>, and the codes of a spoken reply;
                    other members are left alone
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import xxhash

from omni_train.config.errors import DataError
from omni_train.data.chatml import (
    MediaPiece,
    codes_member,
    media_pieces,
    split_reply,
    spoken_member,
)
from omni_train.data.index import KEY_PATTERN
from omni_train.data.media import probe, probe_pictures
from omni_train.data.types import IndexRow, MediaInfo, MemberPlace, SpeechInfo
from omni_train.speech.codec import parse_codes

_KEY = re.compile(KEY_PATTERN)
_BLOCK = 512
_NAME_FIELD = 100
# Which codec made codes is not known here; a worker holds them to the model's codebook.
_ANY_CODEBOOK = 1 << 31


@dataclass(slots=True)
class _Place:
    """Where a member's bytes lie in the tar."""

    offset: int
    size: int


@dataclass(slots=True)
class _Group:
    """Adjacent members of one sample, by member name."""

    prefix: str
    key: str
    members: dict[str, _Place] = field(default_factory=dict)


def index_shard(
    tar_path: str | Path, *, count_text_tokens: Callable[[dict[str, Any]], tuple[int, int]]
) -> list[IndexRow]:
    """Read a tar and return one row per sample, in the order of the tar.

    Args:
        tar_path: an uncompressed tar.
        count_text_tokens: record -> (text tokens, supervised ones among them).

    Raises:
        DataError: with shard and, where it applies, key. `corrupt_tar`, `truncated` for a damaged
            file; `unsafe_name`, `bad_key` for names; `not_adjacent`, `duplicate_key`,
            `duplicate_member` for the order of members; `missing_json`, `corrupt_json`,
            `bad_messages`, `missing_member`, `kind_mismatch`, `bad_codes` for a sample; and what
            `probe` finds.
    """
    path = Path(tar_path)
    rows: list[IndexRow] = []
    try:
        with path.open("rb") as file:
            for group in _groups(file):
                try:
                    rows.append(_index_sample(file, group, count_text_tokens))
                except DataError as error:
                    raise error.at(shard=str(path), key=group.key) from error
    except FileNotFoundError as error:
        raise DataError("missing_shard", f"no tar at {path}") from error
    except DataError as error:
        raise (error if error.shard else error.at(shard=str(path), key=error.key)) from error
    return rows


def _groups(file: BinaryIO) -> list[_Group]:
    """Members grouped into samples; the whole tar's headers are read before any sample is used."""
    groups: dict[str, _Group] = {}
    places: dict[str, str] = {}
    last = ""
    for info in _members(file):
        path = PurePosixPath(info.name)
        key, dot, member = path.name.partition(".")
        if not dot or not member:
            raise DataError("unsafe_name", f"{info.name!r} has no extension to tell its kind")
        if not _KEY.fullmatch(key):
            raise DataError("bad_key", f"{key!r} of {info.name!r}: letters, digits, _ and - only")
        # The directory counts: a/1.json and b/1.json are two samples, which share one key.
        prefix = str(path.parent / key)
        if places.setdefault(key, prefix) != prefix:
            raise DataError("duplicate_key", f"{prefix} and {places[key]} share a key", key=key)
        if prefix != last and prefix in groups:
            raise DataError(
                "not_adjacent", f"{info.name!r} lies apart from the sample's other members", key=key
            )
        last = prefix
        group = groups.setdefault(prefix, _Group(prefix, key))
        if member in group.members:
            raise DataError("duplicate_member", f"{info.name!r} comes twice", key=key)
        group.members[member] = _Place(info.offset_data, info.size)
    return list(groups.values())


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Regular members of a tar that is whole: tarfile alone takes a damaged header for the end."""
    size = file.seek(0, 2)
    file.seek(0)
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                # Members are walked once: without this, tarfile keeps all of them in memory.
                tar.members = []  # type: ignore[attr-defined]
                _check_name(file, info)
                data_end = info.offset_data + (info.size if info.isreg() else 0)
                end = -(-data_end // _BLOCK) * _BLOCK
                if info.isreg():
                    yield info
    except tarfile.TarError as error:
        reason = "truncated" if "unexpected end" in str(error) else "corrupt_tar"
        raise DataError(reason, f"tar unreadable after byte {end} of {size}: {error}") from error
    _check_tail(file, end, size)


def _check_tail(file: BinaryIO, end: int, size: int) -> None:
    """Behind the last member there are two or more blocks of zeros and nothing else."""
    if size - end < 2 * _BLOCK:
        raise DataError("truncated", f"tar ends at byte {size} without its end mark")
    file.seek(end)
    while block := file.read(1 << 16):
        if block.strip(b"\0"):
            raise DataError("corrupt_tar", f"unreadable header after byte {end} of {size}")


def _check_name(file: BinaryIO, info: tarfile.TarInfo) -> None:
    """Refuse names that could leave a directory if anything were ever written by them."""
    if not (info.isreg() or info.isdir()):
        raise DataError("unsafe_name", f"{info.name!r} is a link or a device, not a file")
    if info.sparse is not None:
        raise DataError(
            "unsafe_name", f"{info.name!r} is a sparse file; its bytes are not in order"
        )
    parts = info.name.split("/")
    if info.name.startswith("/") or ".." in parts or "\\" in info.name or "\0" in info.name:
        raise DataError("unsafe_name", f"{info.name!r} is absolute, climbs, or holds \\ or NUL")
    at = file.tell()
    file.seek(info.offset_data - _BLOCK)
    _, _, hidden = file.read(_NAME_FIELD).partition(b"\0")
    file.seek(at)
    if hidden.strip(b"\0"):
        raise DataError("unsafe_name", f"{info.name!r} hides {hidden!r} behind a NUL")


def _index_sample(
    file: BinaryIO,
    group: _Group,
    count_text_tokens: Callable[[dict[str, Any]], tuple[int, int]],
) -> IndexRow:
    if "json" not in group.members:
        names = ", ".join(sorted(group.members))
        raise DataError("missing_json", f"members are {names}; a sample needs <key>.json")
    place = group.members["json"]
    data = _read(file, place)
    record = _parse(data)
    media = [_index_medium(file, group, piece) for piece in media_pieces(record["messages"])]
    num_text_tokens, num_target_tokens = count_text_tokens(record)
    return IndexRow(
        key=group.key,
        json_offset=place.offset,
        json_size=place.size,
        json_xxh3=xxhash.xxh3_64_hexdigest(data),
        media=media,
        num_text_tokens=num_text_tokens,
        num_target_tokens=num_target_tokens,
        task=_text(record, "task"),
        language=_text(record, "language"),
        speaker=_text(record, "speaker"),
        source=_text(record, "source"),
        speech=_index_speech(file, group, record, count_text_tokens),
    )


def _index_speech(
    file: BinaryIO,
    group: _Group,
    record: dict[str, Any],
    count_text_tokens: Callable[[dict[str, Any]], tuple[int, int]],
) -> SpeechInfo | None:
    """Find the codes of a spoken reply; it may have a sound to which they are yet to be added."""
    messages = record["messages"]
    if (named := spoken_member(messages)) is None:
        return None
    _, text = split_reply(messages)
    if not text.strip():
        raise DataError("empty_reply", "the spoken reply has no text")
    # A reply is tokenised apart, so what an empty one lacks is its own.
    silent = {**record, "messages": [*messages[:-1], {"role": "assistant", "content": ""}]}
    count = count_text_tokens(record)[0] - count_text_tokens(silent)[0]
    member = codes_member(named)
    if (place := group.members.get(member)) is None:
        if named not in group.members or named == member:
            raise DataError("missing_member", f"the reply is spoken by {named!r}, not in the tar")
        return SpeechInfo(member, 0, 0, "", 0, count, text)
    data = _read(file, place)
    num_codes = int(parse_codes(data, _ANY_CODEBOOK).numel())
    digest = xxhash.xxh3_64_hexdigest(data)
    return SpeechInfo(member, place.offset, place.size, digest, num_codes, count, text)


def _index_medium(file: BinaryIO, group: _Group, piece: MediaPiece) -> MediaInfo:
    media, places = {}, []
    for member in piece.members:
        place = group.members.get(member)
        if place is None:
            raise DataError("missing_member", f"the messages name {member!r}, which the tar lacks")
        media[member] = _read(file, place)
        digest = xxhash.xxh3_64_hexdigest(media[member])
        places.append(MemberPlace(member, place.offset, place.size, digest))
    info = (
        probe_pictures(piece, media) if piece.pictures else probe(media[piece.member], piece.member)
    )
    if info.kind is not piece.kind:
        raise DataError(
            "kind_mismatch",
            f"{piece.member!r} is {info.kind.name}, the messages say {piece.kind.name}",
        )
    info.offset, info.size, info.xxh3 = places[0].offset, places[0].size, places[0].xxh3
    info.parts = places if piece.pictures else []
    info.use_audio = piece.audio_in_video is not False
    return info


def _read(file: BinaryIO, place: _Place) -> bytes:
    file.seek(place.offset)
    data = file.read(place.size)
    if len(data) != place.size:
        raise DataError("truncated", f"{len(data)} of {place.size} bytes at {place.offset}")
    return data


def _parse(data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except ValueError as error:
        raise DataError("corrupt_json", f"no JSON: {error}") from error
    except RecursionError as error:
        raise DataError("corrupt_json", "JSON nested too deep") from error
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise DataError("bad_messages", "the record has no list of messages")
    return record


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name, "")
    if not isinstance(value, str):
        raise DataError("bad_messages", f"{name} is {value!r}, not a text")
    return value
