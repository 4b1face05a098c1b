"""A thousand damaged shards: each sample arrives as it was written, or the ledger has its key."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import webdataset

from omni_train.config.errors import DataError
from omni_train.data.fetch import fetch
from omni_train.data.index import index_path
from tests.faults.damage import DAMAGE
from tests.faults.shards import Whole, write_set

NUM_SHARDS, NUM_BASES, PER_SHARD = 1_000, 10, 8


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> list[Whole]:
    folder = tmp_path_factory.mktemp("whole")
    return write_set(folder, num_shards=NUM_BASES, per_shard=PER_SHARD)


def damaged(wholes: list[Whole]) -> Iterator[tuple[str, Whole, bytes]]:
    """(kind of damage, the shard before it, its bytes after it)."""
    for number in range(NUM_SHARDS):
        rng = random.Random(number)
        kind, whole = DAMAGE[number % len(DAMAGE)], wholes[rng.randrange(NUM_BASES)]
        yield kind.__name__, whole, kind(whole.data, rng)


def delivered_and_ledger(path: Path, whole: Whole) -> tuple[set[str], dict[str, str]]:
    delivered: set[str] = set()
    ledger: dict[str, str] = {}
    for row in whole.rows:
        try:
            raw = fetch(path, row)
        except DataError as error:
            assert (error.shard, error.key) == (path.name, row.key)  # noqa: PT017  one of many
            ledger[row.key] = error.reason
            continue
        delivered.add(row.key)
        assert set(raw.media) == {name for key, name in whole.members if key == row.key} - {"json"}
        for name, data in raw.media.items():
            assert data == whole.members[row.key, name]
        assert repr(raw.record["messages"][-1]["content"]).startswith("'sample ")
    return delivered, ledger


def lost_by_webdataset(path: Path, whole: Whole) -> int:
    """Samples that plain webdataset leaves out or alters without an exception."""
    seen: dict[str, dict[str, bytes]] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for sample in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False):
                members = {name: data for name, data in sample.items() if name[0] != "_"}
                seen.setdefault(sample["__key__"], members)
    except Exception:  # noqa: BLE001  whatever it raises, it did not lose silently
        return 0  # it said so
    return sum(
        any(seen.get(row.key, {}).get(name) != data for (key, name), data in members)
        for row in whole.rows
        if (members := [item for item in whole.members.items() if item[0][0] == row.key])
    )


def test_nothing_is_lost_and_nothing_is_altered(
    wholes: list[Whole], tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    reasons: Counter[str] = Counter()
    silent: Counter[str] = Counter()
    num_delivered = num_in_ledger = 0
    for number, (kind, whole, data) in enumerate(damaged(wholes)):
        path = tmp_path / f"shard-{number:06d}.tar"
        path.write_bytes(data)
        delivered, ledger = delivered_and_ledger(path, whole)
        assert delivered.isdisjoint(ledger)
        assert delivered | set(ledger) == {row.key for row in whole.rows}, kind
        num_delivered += len(delivered)
        num_in_ledger += len(ledger)
        reasons.update(ledger.values())
        silent[kind] += lost_by_webdataset(path, whole)
        path.unlink()
    assert num_delivered + num_in_ledger == NUM_SHARDS * PER_SHARD
    assert num_delivered > 1_000
    assert set(reasons) == {"truncated", "hash_mismatch"}
    lost = sum(silent.values())
    record_property("lost silently by plain webdataset", lost)
    print(
        f"\n{NUM_SHARDS} damaged shards, {NUM_SHARDS * PER_SHARD} samples: {num_delivered} "
        f"delivered, {num_in_ledger} in the ledger {dict(reasons)}, 0 lost; "
        f"plain webdataset lost or altered {lost} without a word: {dict(silent)}"
    )
    assert lost > 0
    assert silent["flip_header"] > 0


def test_a_shard_that_is_gone(wholes: list[Whole], tmp_path: Path) -> None:
    delivered, ledger = delivered_and_ledger(tmp_path / "none.tar", wholes[0])
    assert not delivered
    assert set(ledger.values()) == {"missing_shard"}


def test_a_damaged_index_row_is_one_samples_error(tmp_path: Path) -> None:
    """Sizes and places of any value: no allocation, no other exception."""
    whole = write_set(tmp_path, num_shards=1, per_shard=1)[0]
    path = next(tmp_path.glob("*.tar"))
    assert index_path(path).is_file()
    row = whole.rows[0]
    for offset, size in ((-1, 10), (0, 1 << 62), (1 << 62, 10), (1 << 70, 10), (0, -5)):
        row.json_offset, row.json_size = offset, size
        with pytest.raises(DataError, match=r"truncated|unreachable|hash_mismatch"):
            fetch(path, row)
