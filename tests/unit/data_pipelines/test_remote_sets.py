"""Sets in an object store: looked at where they are, over HTTP and over S3's own protocol."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from omni_train.config.errors import DataError
from omni_train.data.index import read_manifest
from omni_train.data.stores import FetchConfig, Store
from tests.faults.http_server import FaultServer, serving
from tests.faults.shards import write_set
from tests.unit.data.samples import TOKENIZER

SHARD = "shard-000000.tar"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("remote")
    write_set(root / "set", num_shards=2, per_shard=6)
    TOKENIZER.save_pretrained(str(root / "tokenizer"))
    return root


@pytest.fixture
def server(folder: Path) -> Iterator[FaultServer]:
    with serving() as running:
        running.files = {f"/set/{p.name}": p.read_bytes() for p in (folder / "set").iterdir()}
        yield running


def look(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, Any]:
    """Exit code and JSON of a command."""
    capsys.readouterr()
    code = main(["data", *args, "--json"])
    return code, json.loads(capsys.readouterr().out or "null")


def looks_the_same(capsys: pytest.CaptureFixture[str], folder: Path, url: str, out: Path) -> None:
    """Lint, info and show give what they give of the files."""
    tokenizer = ("--tokenizer", str(folder / "tokenizer"))
    here = str(folder / "set")
    report = ("--workers", "0", "--report", str(out / "lint.json"))
    for command, more in (("lint", report), ("info", ())):
        far, near = (look(capsys, command, where, *tokenizer, *more) for where in (url, here))
        far[1].pop("unknown_files", None), near[1].pop("unknown_files", None)
        assert far == near
        assert far[0] == 0
    shown = [
        look(capsys, "show", f"{where}/{SHARD}:k-0002", *tokenizer, "--out", str(out / str(number)))
        for number, where in enumerate((url, here))
    ]
    assert shown[0][1]["ids"] == shown[1][1]["ids"]


def test_a_set_on_a_web_server(
    folder: Path, server: FaultServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    looks_the_same(capsys, folder, f"{server.url}/set", tmp_path)
    assert not [path for path, _ in server.requests if path.endswith("lint.json")]


@pytest.mark.parametrize("damage", ["bit", "longer", "shorter", "missing"])
def test_what_is_wrong_there_is_found_and_left_out(
    folder: Path,
    server: FaultServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    name, url = f"/set/{SHARD}", f"{server.url}/set"
    data = server.files[name]
    at = data.find(b"RIFF") + 200
    server.files[name] = {
        "bit": data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :],
        "longer": data + bytes(512),
        "shorter": data[:-512],
        "missing": data,
    }[damage]
    if damage == "missing":
        del server.files[name]
    report, tokenizer = str(tmp_path / "lint.json"), ("--tokenizer", str(folder / "tokenizer"))
    args = ("lint", url, *tokenizer, "--workers", "0", "--report", report)
    code, found = look(capsys, *args)
    assert code == 65
    reasons = {
        "bit": {"hash_mismatch": 1, "shard_hash_mismatch": 1},
        "missing": {"missing_shard": 7},
    }
    assert found["reasons"] == reasons.get(damage, {"shard_hash_mismatch": 1})
    assert main(["data", "fix", url, "--report", report]) == 2
    assert "--out" in capsys.readouterr().err
    skip = tmp_path / "skip.json"
    code, fixed = look(capsys, "fix", url, "--report", report, "--out", str(skip))
    assert fixed["num_skipped"] == {"bit": 1, "missing": 6}.get(damage, 0)
    assert skip.exists() is (fixed["num_skipped"] > 0)
    if damage == "bit":
        # Copied beside the shards it is read there.
        server.files["/set/skip.json"] = skip.read_bytes()
        assert look(capsys, *args)[0] == 0


@pytest.fixture
def bucket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server that speaks S3's protocol, in this process, with the set in a bucket."""
    moto = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    if not files.exists("shards"):  # what the server holds outlives it in this process
        files.mkdir("shards")
    for path in (folder / "set").iterdir():
        files.pipe_file(f"shards/a/{path.name}", path.read_bytes())
    yield files
    running.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_set_in_s3(
    folder: Path, bucket: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, data = Store(), (folder / "set" / SHARD).read_bytes()
    url = f"s3://shards/a/{SHARD}"
    assert store.read_range(url, 512, 1_000) == data[512:1_512]
    assert store.read_range(url, 0, len(data)) == data
    assert store.read_range(url, len(data), 0) == b""
    assert store.read_all(url) == data
    assert read_manifest("s3://shards/a") == read_manifest(folder / "set")
    looks_the_same(capsys, folder, "s3://shards/a", tmp_path)


def test_what_s3_refuses_has_our_reasons(bucket: Any, folder: Path) -> None:
    size = (folder / "set" / SHARD).stat().st_size
    hasty = Store(FetchConfig(attempts=2, base_delay_s=0.01, time_limit_s=20.0))
    for url, offset, reason in (
        ("s3://shards/a/none.tar", 0, "missing_shard"),
        ("s3://nobucket/a.tar", 0, "missing_shard"),
        (f"s3://shards/a/{SHARD}", size - 100, "truncated"),
        (f"s3://shards/a/{SHARD}", size + 100, "truncated"),
    ):
        with pytest.raises(DataError) as caught:
            hasty.read_range(url, offset, 1_000)
        assert (url, caught.value.reason) == (url, reason)
    with pytest.raises(DataError) as caught:
        hasty.read_all("s3://shards/a/none.json")
    assert caught.value.reason == "missing_shard"


def test_s3_that_is_not_there_is_unreachable(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    type(bucket).clear_instance_cache()
    hasty = Store(FetchConfig(attempts=2, base_delay_s=0.01, time_limit_s=4.0))
    with pytest.raises(DataError) as caught:
        hasty.read_range(f"s3://shards/a/{SHARD}", 0, 10)
    assert caught.value.reason == "unreachable"
