"""Damage to tars, each drawn from a random generator; the index stays what it was before."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable

Members = list[tuple[str, bytes]]
_BLOCK = 512


def members_of(data: bytes) -> Members:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar if info.isreg()]


def pack(members: Members) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def cut(data: bytes, rng: random.Random) -> bytes:
    """The file ends early, at times between two blocks."""
    place = rng.randrange(len(data))
    return data[: place if rng.random() < 0.5 else place // _BLOCK * _BLOCK]


def flip_header(data: bytes, rng: random.Random) -> bytes:
    """One bit of one member's header."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        info = rng.choice(tar.getmembers())
    # Only the fields: the header's last bytes are padding that nobody reads.
    return _flip(data, info.offset + rng.randrange(345), rng)


def flip_payload(data: bytes, rng: random.Random) -> bytes:
    """One bit of one member's bytes."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        info = rng.choice([info for info in tar.getmembers() if info.size])
    return _flip(data, info.offset_data + rng.randrange(info.size), rng)


def lose_member(data: bytes, rng: random.Random) -> bytes:
    """One member is not there; all that follows has moved."""
    members = members_of(data)
    del members[rng.randrange(len(members))]
    return pack(members)


def double_member(data: bytes, rng: random.Random) -> bytes:
    """One member comes again, somewhere else and with other bytes."""
    members = members_of(data)
    name, content = rng.choice(members)
    members.insert(rng.randrange(len(members) + 1), (name, content[::-1]))
    return pack(members)


def split_sample(data: bytes, rng: random.Random) -> bytes:
    """One member lies apart from the rest of its sample."""
    members = members_of(data)
    member = members.pop(rng.randrange(len(members)))
    members.insert(rng.randrange(len(members) + 1), member)
    return pack(members)


def zeros(data: bytes, rng: random.Random) -> bytes:
    """A hole of zeros, as a file system leaves it after a crash."""
    start = rng.randrange(len(data))
    size = min(rng.randrange(1, 8 * _BLOCK), len(data) - start)
    return data[:start] + bytes(size) + data[start + size :]


def _flip(data: bytes, place: int, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


DAMAGE: list[Callable[[bytes, random.Random], bytes]] = [
    cut,
    flip_header,
    flip_payload,
    lose_member,
    double_member,
    split_sample,
    zeros,
]
