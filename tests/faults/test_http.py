"""An object store that fails in every way: samples arrive or have a reason, nothing hangs."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from omni_train.config.errors import ConfigError, DataError
from omni_train.data import stores
from omni_train.data.fetch import fetch
from omni_train.data.index import read_index, read_manifest
from omni_train.data.stores import FetchConfig, Store, open_root
from tests.faults.http_server import FaultServer, serving
from tests.faults.shards import write_set

FAST = {"attempts": 4, "base_delay_s": 0.005, "time_limit_s": 2.0}
DATA = random.Random(1).randbytes(50_000)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with serving() as running:
        running.files["/a.bin"] = DATA
        yield running


def read(server: FaultServer, offset: int = 1_000, size: int = 40_000, **settings: object) -> bytes:
    store = Store(FetchConfig(**{**FAST, **settings}))
    return store.read_range(f"{server.url}/a.bin", offset, size)


PASSING = ["503", "slow", "stall", "short", "reset", "close", "hang", "wrong_range"]


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_costs_time_only(server: FaultServer, fault: str) -> None:
    server.faults = [fault, fault]
    started = time.monotonic()
    assert read(server) == DATA[1_000:41_000]
    assert time.monotonic() - started < 2.0
    assert len(server.faults) == (1 if fault == "slow" else 0)


def test_a_read_goes_on_where_it_ended(server: FaultServer) -> None:
    server.faults = ["short", "reset", "stall"]
    assert read(server) == DATA[1_000:41_000]
    starts = [int(wanted.split("=")[1].split("-")[0]) for _, wanted in server.requests]
    assert starts[0] == 1_000
    assert starts == sorted(set(starts)), "no byte is asked for twice"
    assert starts[1] == 21_000


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("503!", "unreachable"),
        ("hang!", "unreachable"),
        ("close!", "unreachable"),
        ("403", "unreachable"),
        ("whole", "no_ranges"),
        ("redirect", "unreachable"),
    ],
)
def test_a_fault_that_stays_is_a_reason_within_the_time_limit(
    server: FaultServer, fault: str, reason: str
) -> None:
    server.faults = [fault]
    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        read(server, time_limit_s=1.0)
    assert caught.value.reason == reason
    assert time.monotonic() - started < 1.5


def test_a_drip_that_never_ends_meets_the_time_limit(server: FaultServer) -> None:
    server.faults = ["stall!"]  # each attempt gives half of what is left
    started = time.monotonic()
    with pytest.raises(DataError, match=r"time_limit_s=1\b"):
        read(server, time_limit_s=1.0, attempts=3)
    assert time.monotonic() - started < 1.5


def test_files_that_are_missing_or_too_short_are_not_asked_for_again(server: FaultServer) -> None:
    store = Store(FetchConfig(**FAST))
    for url, offset, reason in (("/b.bin", 0, "missing_shard"), ("/a.bin", 49_990, "truncated")):
        before = len(server.requests)
        with pytest.raises(DataError) as caught:
            store.read_range(server.url + url, offset, 100)
        assert caught.value.reason == reason
        assert len(server.requests) == before + 1
    with pytest.raises(DataError, match="truncated"):
        store.read_range(f"{server.url}/a.bin", 60_000, 5)


def test_a_connection_is_used_again(server: FaultServer) -> None:
    for offset in range(0, 40_000, 1_000):
        assert read(server, offset, 500) == DATA[offset : offset + 500]
    assert len(server.connections) == 1


def test_user_and_password_and_query_are_not_in_messages(server: FaultServer) -> None:
    url = f"http://127.0.0.1:{server.server_port}/none.bin?signature=canary"
    with pytest.raises(DataError) as caught:
        Store(FetchConfig(**FAST)).read_range(url, 0, 5)
    assert "canary" not in str(caught.value)


def test_every_sample_arrives_or_is_in_the_ledger(server: FaultServer, tmp_path: Path) -> None:
    wholes = write_set(tmp_path, num_shards=3, per_shard=30)
    for path in tmp_path.iterdir():
        server.files[f"/set/{path.name}"] = path.read_bytes()
    root = open_root(f"{server.url}/set/", FetchConfig(**FAST))
    shards = read_manifest(root).shards
    rows = [
        (root.url_of(shard.name), row)
        for shard in shards
        for row in read_index(
            root.url_of(shard.name.replace(".tar", ".parquet")), xxh3=shard.index_xxh3
        )
    ]
    assert len(rows) == 90
    del server.files["/set/shard-000002.tar"]
    rng = random.Random(3)
    kinds = ["", "503", "slow", "short", "reset", "close", "wrong"]
    server.faults = [rng.choice(kinds) for _ in range(90)]
    original = {key: data for whole in wholes for key, data in whole.members.items()}
    delivered, ledger = set(), {}
    started = time.monotonic()
    for shard, row in rows:
        try:
            raw = fetch(shard, row, root.store)
        except DataError as error:
            ledger[error.key] = error.reason
            continue
        delivered.add(row.key)
        for member, data in raw.media.items():
            assert data == original[row.key, member]
    assert time.monotonic() - started < 20
    assert delivered.isdisjoint(ledger)
    assert delivered | set(ledger) == {key for key, _ in original}
    # Two wrong answers in a row, or four without a byte, may lose some of the existing shards.
    assert len(delivered) >= 55
    assert sum(reason == "missing_shard" for reason in ledger.values()) == 30
    assert set(ledger.values()) <= {"missing_shard", "hash_mismatch", "unreachable"}


def test_wrong_bytes_are_read_once_more(server: FaultServer, tmp_path: Path) -> None:
    whole = write_set(tmp_path, num_shards=1, per_shard=2)[0]
    server.files["/s.tar"] = whole.data
    store = Store(FetchConfig(**FAST))
    server.faults = ["wrong"]
    assert fetch(f"{server.url}/s.tar", whole.rows[1], store).media
    assert len(server.requests) == 2
    server.faults = ["wrong!"]
    with pytest.raises(DataError, match="hash_mismatch"):
        fetch(f"{server.url}/s.tar", whole.rows[1], store)
    assert len(server.requests) == 4


def test_one_request_a_sample(server: FaultServer, tmp_path: Path) -> None:
    whole = write_set(tmp_path, num_shards=1, per_shard=9)[0]
    server.files["/s.tar"] = whole.data
    for row in whole.rows:
        fetch(f"{server.url}/s.tar", row, Store(FetchConfig(**FAST)))
    assert len(server.requests) == 9


def test_cached_samples_are_not_asked_for_and_damaged_ones_are_fetched_anew(
    server: FaultServer, tmp_path: Path
) -> None:
    whole = write_set(tmp_path / "set", num_shards=1, per_shard=4)[0]
    server.files["/s.tar"] = whole.data
    cached = {**FAST, "cache_dir": str(tmp_path / "cache"), "cache_bytes": 1 << 20}
    for _ in range(3):
        for row in whole.rows:
            fetch(f"{server.url}/s.tar", row, Store(FetchConfig(**cached)))
    assert len(server.requests) == 4
    for path in (tmp_path / "cache").iterdir():
        if not path.name.startswith("index"):
            path.write_bytes(bytes(path.stat().st_size))
    for _ in range(2):
        for row in whole.rows:
            assert fetch(f"{server.url}/s.tar", row, Store(FetchConfig(**cached))).record
    assert len(server.requests) == 8


class FlakyStore(MemoryFileSystem):
    """A store as fsspec offers it, which fails on demand."""

    protocol = "s3"
    failures: list[str] = []

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        fault = self.failures.pop(0) if self.failures else ""
        if fault == "error":
            raise RuntimeError("slow down")
        if fault == "hang":
            time.sleep(1.0)
        data = super().cat_file(path, start=start, end=end)
        return data[: len(data) // 2] if fault == "short" else data


def test_stores_behind_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("s3", FlakyStore, clobber=True)
    FlakyStore().pipe_file("bucket/a.bin", DATA)
    store = Store(FetchConfig(**{**FAST, "time_limit_s": 1.0}))
    FlakyStore.failures = ["error", "short", "hang", "error"]
    assert store.read_range("s3://bucket/a.bin", 10, 30_000) == DATA[10:30_010]
    assert not FlakyStore.failures
    assert store.read_all("s3://bucket/a.bin") == DATA
    for url, offset, reason in (("none", 0, "missing_shard"), ("a.bin", 49_999, "truncated")):
        with pytest.raises(DataError) as caught:
            store.read_range(f"s3://bucket/{url}", offset, 9)
        assert caught.value.reason == reason
    FlakyStore.failures = ["error"] * 9
    with pytest.raises(DataError, match="unreachable"):
        store.read_range("s3://bucket/a.bin", 0, 9)
    FlakyStore.failures = []
    monkeypatch.setitem(stores.FSSPEC_PACKAGES, "gs", "gcsfs")
    with pytest.raises(ConfigError, match="gcsfs"):
        store.read_range("gs://bucket/a.bin", 0, 9)


def test_settings_that_cannot_work_are_refused() -> None:
    for wrong in ({"attempts": 0}, {"time_limit_s": 0.0}, {"base_delay_s": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            FetchConfig(**wrong)
    with pytest.raises(ConfigError, match="set both"):
        FetchConfig(cache_dir="cache")
