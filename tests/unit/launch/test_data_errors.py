"""Every `data` command with what it cannot use: its exit code, and one line with what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.cli import main
from tests.unit.data_pipelines.sourcing import talks, tokenizer

SHARD = "shard-000000.tar"
KEY = "set-000000001"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, a tokenizer and a finished set."""
    root = tmp_path_factory.mktemp("data")
    talks(root / "src", 8)
    tokenizer(root / "tokenizer")
    assert main(prepare(root)) == 0
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """The same to be damaged, with a file `file` and an empty directory `empty`."""
    shutil.copytree(made, tmp_path / "d")
    (tmp_path / "d" / "file").write_text("x")
    (tmp_path / "d" / "empty").mkdir()
    return tmp_path / "d"


def prepare(root: Path, source: str = "src/talks.jsonl", out: str = "set", *more: str) -> list[str]:
    return [
        *("data", "prepare", str(root / source), str(root / out), "--format", "jsonl"),
        *("--tokenizer", str(root / "tokenizer"), "--name", "set"),
        *("--samples-per-shard", "4", "--workers", "0", *more),
    ]


def commands(root: Path, name: str) -> dict[str, list[str]]:
    """Each command that reads a set, on one of them."""
    where = name if "://" in name else str(root / name)
    return {
        "merge": ["merge", where],
        "index": ["index", where, "--tokenizer", str(root / "tokenizer")],
        "lint": ["lint", where, "--workers", "0"],
        "info": ["info", where],
        "fix": ["fix", where],
        "show": ["show", f"{where}/{SHARD}:{KEY}", "--out", str(root / "pictures")],
    }


def assert_fails(
    capsys: pytest.CaptureFixture[str], args: list[str], code: int, *words: str
) -> None:
    """The command ends in this code and says so in one line; a traceback would be raised here."""
    capsys.readouterr()
    assert main(args) == code
    output = capsys.readouterr()
    assert output.out == ""
    lines = [line for line in output.err.splitlines() if not line.startswith("[")]
    assert len(lines) == 1, output.err
    assert lines[0].startswith("omni-train: ")
    # What is wrong, and after it what to do.
    assert ";" in lines[0] or " is not read: " in lines[0], lines[0]
    for word in words:
        assert word in lines[0]


COMMANDS = ["merge", "index", "lint", "info", "fix", "show"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["none", "file", "empty"])
def test_there_is_no_set(
    place: Path, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    assert_fails(capsys, ["data", *commands(place, name)[command]], 66, str(place / name))


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def no_json(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def other_version(folder: Path) -> None:
    record = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**record, "schema_version": 1}))


def a_directory(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()


@pytest.mark.parametrize("command", ["lint", "info", "show"])
@pytest.mark.parametrize(
    ("damage", "code", "word"),
    [
        (no_manifest, 66, "missing_manifest"),
        (a_directory, 66, "unreachable"),
        (no_json, 65, "corrupt_manifest"),
        (other_version, 65, "schema_version"),
    ],
)
def test_a_bad_manifest(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    damage: Callable[[Path], None],
    code: int,
    word: str,
) -> None:
    damage(place / "set")
    assert_fails(capsys, ["data", *commands(place, "set")[command]], code, word)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("url", "code"), [("ftp://host/set", 77), ("s3://bucket/set", 2)])
def test_places_that_are_not_read(
    place: Path, capsys: pytest.CaptureFixture[str], command: str, url: str, code: int
) -> None:
    if command == "index":
        code = 2
    if command == "merge":
        code = 66
    assert_fails(capsys, ["data", *commands(place, url)[command]], code)


@pytest.mark.parametrize(
    ("source", "more", "code", "word"),
    [
        ("none", (), 66, "there is no source"),
        ("src", (), 66, "is a directory"),
        ("file", ("--format", "folder"), 66, "is a file"),
        ("src", ("--format", "hf_datasets"), 66, "holds no dataset"),
        ("src/talks.jsonl", ("--part", "3/3"), 2, "numbered from 0"),
        ("src/talks.jsonl", ("--part", "1/0"), 2, "numbered from 0"),
        ("src/talks.jsonl", ("--part", "one"), 2, "I/N"),
        ("src/talks.jsonl", ("--part", "1/2/3"), 2, "I/N"),
        ("src/talks.jsonl", ("--workers", "-1"), 2, "--workers"),
        ("src/talks.jsonl", ("--samples-per-shard", "0"), 2, "--samples-per-shard"),
        ("src/talks.jsonl", ("--columns", "audio"), 2, "--columns"),
        ("src/talks.jsonl", ("--name", "a/b"), 77, "--name"),
        ("src/talks.jsonl", ("--task", "qa"), 2, "was begun with"),
    ],
)
def test_prepare_refuses(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    source: str,
    more: tuple[str, ...],
    code: int,
    word: str,
) -> None:
    assert_fails(capsys, prepare(place, source, "set", *more), code, word)


@pytest.mark.parametrize("key", ["SOURCE", "OUT"])
def test_prepare_is_local(capsys: pytest.CaptureFixture[str], made: Path, key: str) -> None:
    args = prepare(made)
    args[2 if key == "SOURCE" else 3] = "s3://bucket/a"
    assert_fails(capsys, args, 2, f"{key}='s3://bucket/a'")


@pytest.mark.parametrize("text", ["--format=none", "--part=-1/2", "--workers=x"])
def test_what_argparse_refuses(made: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*prepare(made), *(["--part", "-1/2"] if "part" in text else [text])])
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_sources_without_a_row(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, name, word in (("", "a.jsonl", "has no rows"), ("{}", "a.json", "not a list")):
        (place / name).write_text(text)
        assert main(prepare(place, name, "o")) == 65
        assert word in capsys.readouterr().err


@pytest.mark.parametrize("command", ["prepare", "index", "lint", "fix", "show", "merge"])
def test_output_that_cannot_be_written(
    place: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    if command in ("prepare", "show"):
        args = {
            "prepare": prepare(place, out="file/o"),
            "show": ["data", "show", f"{place}/set/{SHARD}:{KEY}", "--out", str(place / "file")],
        }[command]
        assert_fails(capsys, args, 74, "cannot write into", "file")
    assert main(["data", "lint", str(place / "set"), "--workers", "0"]) == 0
    args = prepare(place) if command == "prepare" else ["data", *commands(place, "set")[command]]
    if command == "show":
        args[-1] = str(place / "set")
    with read_only(place / "set"):
        assert_fails(capsys, args, 74, "cannot write into", "Permission denied")


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Without the right to write; root gives up its rights for as long."""
    for parent in [folder, *folder.parents]:
        if (
            parent.stat().st_uid == os.geteuid()
            and parent != folder
            and not parent.stat().st_mode & 1
        ):
            parent.chmod(0o755)
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65_534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_a_tokenizer_that_is_none(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("index", "lint", "info", "show"):
        args = [*commands(place, "set")[command], "--tokenizer", str(place / "empty")]
        assert_fails(capsys, ["data", *args], 2, "tokenizer.json")


def test_records_of_prepare_that_are_damaged(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = sorted(path.read_bytes() for path in (place / "set").glob("*.tar"))
    (place / "set" / "prepare" / "000000.json").write_text("{")
    assert_fails(capsys, ["data", "merge", str(place / "set")], 65, "corrupt_record", "000000.json")
    # A shard whose record is gone is made again, the same.
    assert main(prepare(place)) == 0
    assert sorted(path.read_bytes() for path in (place / "set").glob("*.tar")) == shards
    capsys.readouterr()
    for name in ("part-0-of-1.json", "prepare/settings.json"):
        (place / "set" / name).write_text("{}")
    assert_fails(capsys, ["data", "merge", str(place / "set")], 65, "part-0-of-1.json")
    (place / "set" / "prepare" / "settings.json").write_text("[1]")
    assert_fails(capsys, prepare(place), 65, "settings.json")


def test_samples_and_shards_that_are_not_there(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show = ["data", "show", "--out", str(place / "pictures")]
    assert_fails(capsys, [*show, f"{place}/set/{SHARD}:none"], 65, "unknown_key")
    assert_fails(capsys, [*show, f"{place}/set/shard-000009.tar:{KEY}"], 66, "missing_index")
    assert_fails(capsys, [*show, SHARD], 2, "SHARD:KEY")
    (place / "set" / SHARD).unlink()
    assert_fails(capsys, [*show, f"{place}/set/{SHARD}:{KEY}"], 66, "missing_shard")
    (place / "set" / SHARD).write_bytes(b"x" * 700)
    index = commands(place, "set")["index"]
    assert_fails(capsys, ["data", *index], 65, "corrupt_tar")
    assert_fails(
        capsys, ["data", "lint", str(place / "set"), "--processing", "video_fp=1"], 2, "video_fps?"
    )


def test_json_is_json(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where something is wrong: reports on stdout, nothing else with them."""
    root = place / "set"
    for damage, code in ((False, 0), (True, 65)):
        if damage:
            data = bytearray((root / SHARD).read_bytes())
            data[-4_000] ^= 1
            at = data.find(b"RIFF") + 100
            data[at] ^= 1
            (root / SHARD).write_bytes(data)
        for command in ("lint", "info", "fix"):
            capsys.readouterr()
            found = main(["data", *commands(place, "set")[command], "--json"])
            record = json.loads(capsys.readouterr().out)
            if command == "lint":
                assert found == code
                assert record["failed"] is damage
                assert record["unknown_files"] == []
            elif command == "info":
                assert found == 0
                assert record["total"]["samples"] == 7
            else:
                assert (found, record["num_skipped"]) == (0, int(damage))
                assert record["written"] == (str(root / "skip.json") if damage else "")
