"""The cache on disk: bounded at all times, the least recently used goes, damage is a miss."""

from __future__ import annotations

import multiprocessing
import random
from pathlib import Path

import pytest

from omni_train.data.cache import RangeCache


def on_disk(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir() if not p.name.startswith("index"))


def test_what_was_put_is_there_and_the_least_recently_used_goes(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, max_bytes=100)
    for name in "abc":
        cache.put(name, name.encode() * 30)
    assert cache.get("a") == b"a" * 30
    cache.put("d", b"d" * 30)
    assert cache.get("b") is None
    assert [cache.get(name) for name in "acd"] == [n.encode() * 30 for n in "acd"]
    cache.put("a", b"A" * 10)
    assert cache.get("a") == b"A" * 10
    assert cache.num_bytes() == on_disk(tmp_path) == 70
    cache.put("large", b"x" * 101)
    assert cache.get("large") is None
    assert RangeCache(tmp_path, max_bytes=100).get("d") == b"d" * 30


def test_a_smaller_bound_and_leftovers_of_a_killed_process(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, max_bytes=100)
    for name in "abc":
        cache.put(name, name.encode() * 30)
    (tmp_path / "0123.tmp-99").write_bytes(b"half")
    smaller = RangeCache(tmp_path, max_bytes=65)
    assert on_disk(tmp_path) == smaller.num_bytes() == 60
    assert smaller.get("c") == b"c" * 30


def test_files_that_vanish_and_an_index_that_is_none(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, max_bytes=100)
    cache.put("a", b"a" * 30)
    next(p for p in tmp_path.iterdir() if not p.name.startswith("index")).unlink()
    assert cache.get("a") is None
    cache.put("a", b"a" * 30)
    assert cache.get("a") == b"a" * 30
    (tmp_path / "index.sqlite").write_bytes(b"no index" * 1_000)
    cache = RangeCache(tmp_path, max_bytes=100)
    assert cache.get("a") is None
    cache.put("b", b"b")
    assert cache.get("b") == b"b"


def use(folder: Path, seed: int, rounds: int = 150) -> None:
    cache, rng = RangeCache(folder, max_bytes=4_000), random.Random(seed)
    for _ in range(rounds):
        number = rng.randrange(40)
        data = cache.get(str(number))
        assert data is None or data == bytes([number]) * (50 + 10 * number)
        if data is None:
            cache.put(str(number), bytes([number]) * (50 + 10 * number))


@pytest.mark.parametrize("kill", [False, True])
def test_processes_share_it_and_the_bound_always_holds(tmp_path: Path, kill: bool) -> None:
    context = multiprocessing.get_context("fork")
    users = [context.Process(target=use, args=(tmp_path, seed)) for seed in range(3)]
    if kill:
        users[0] = context.Process(target=use, args=(tmp_path, 0, 1_000_000))
    for user in users:
        user.start()
    if kill:
        users[0].join(0.1)
        users[0].kill()
    for user in users:
        user.join(60)
    assert [user.exitcode for user in users] == [-9 if kill else 0, 0, 0]
    cache = RangeCache(tmp_path, max_bytes=4_000)
    assert on_disk(tmp_path) == cache.num_bytes() <= 4_000
