"""Bytes of planned samples, read by offset and checked against the index.

A sample's members lie side by side, so one read brings them all. Whatever differs from the index is
read once more, past any cache, before the sample is given up. Nothing is decoded here.
"""

from __future__ import annotations

import json
from pathlib import Path

import xxhash

from omni_train.config.errors import DataError
from omni_train.data.stores import Store
from omni_train.data.types import IndexRow, RawSample

# Members that are no medium may lie between those that are; so many of their bytes are read along.
_MAX_WASTE_BYTES = 1 << 16
_LOCAL = Store()
_hexdigest = xxhash.xxh3_64_hexdigest
# Offset, size and xxh3-64 of a member.
_Place = tuple[int, int, str]


def read_member(
    shard: str | Path, offset: int, size: int, xxh3: str, store: Store | None = None
) -> bytes:
    """Read one member and verify it.

    Args:
        shard: path or URL of the tar file.
        offset, size: place of the member's bytes.
        xxh3: xxh3-64 the index holds, 16 hex digits.
        store: reads them; by default one without a cache.

    Raises:
        DataError: `hash_mismatch`, and what `Store.read_range` finds.
    """
    return _read_verified(store or _LOCAL, shard, [(offset, size, xxh3)])[0]


def fetch(
    shard: str | Path, row: IndexRow, store: Store | None = None, *, codes: bool = False
) -> RawSample:
    """Read the JSON member and all media of one sample.

    Args:
        shard: path or URL of the tar file.
        row: its index row.
        store: reads them; by default one without a cache.
        codes: whether the codes of a spoken reply are read too.

    Raises:
        DataError: with shard and key, where anything is missing or changed: `missing_shard`,
            `truncated`, `hash_mismatch`, `unreachable`, `no_ranges`, `bad_json`.
    """
    names: list[str] = []
    places: list[_Place] = [(row.json_offset, row.json_size, row.json_xxh3)]
    for info in row.media:
        # What `info.places()` says, without an object each: they cost as much as the hashes.
        for place in info.parts or (info,):
            names.append(place.member)
            places.append((place.offset, place.size, place.xxh3))
    if codes and (speech := row.speech) is not None and speech.num_codes:
        names.append(speech.member)
        places.append((speech.offset, speech.size, speech.xxh3))
    try:
        text, *media = _read_verified(store or _LOCAL, shard, places)
        record = json.loads(str(text, "utf-8"))
    except DataError as error:
        raise error.at(shard=_name(shard), key=row.key) from error
    except (ValueError, RecursionError) as error:
        raise DataError("bad_json", str(error), shard=_name(shard), key=row.key) from error
    if not isinstance(record, dict):
        raise DataError("bad_json", "the record is no object", shard=_name(shard), key=row.key)
    return RawSample(row=row, record=record, media=dict(zip(names, media, strict=True)))


def _read_verified(store: Store, shard: str | Path, places: list[_Place]) -> list[bytes]:
    """Read members together where they are neighbours; read them again where a hash differs."""
    start, stop, total = places[0][0], 0, 0
    for offset, size, _ in places:
        start = min(start, offset)  # half the time of min and max
        stop = max(stop, offset + size)
        total += size
    if stop - start > total + _MAX_WASTE_BYTES:
        return [_read_verified(store, shard, [place])[0] for place in places]
    for fresh in (False, True):
        data = store.read_range(shard, start, stop - start, fresh=fresh)
        members: list[bytes] = []
        for offset, size, xxh3 in places:
            member = data[offset - start : offset - start + size]
            if _hexdigest(member) != xxh3:
                break
            members.append(member)
        else:
            return members
    raise DataError("hash_mismatch", f"bytes at offset {offset} are not those of the index")


def _name(shard: str | Path) -> str:
    return str(shard).rpartition("/")[2]
