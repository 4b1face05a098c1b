"""The Parquet index, the manifest, and the rows made from tars, good and bad."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import xxhash
from PIL import Image

from omni_train.config.errors import DataError
from omni_train.data.index import (
    Manifest,
    ShardInfo,
    describe_shard,
    index_path,
    read_index,
    read_manifest,
    write_index,
    write_manifest,
)
from omni_train.data.scan import index_shard
from omni_train.data.types import IndexRow, MediaInfo, MediaKind

Member = tuple[str, bytes]


def wav(seconds: float = 0.1) -> bytes:
    sink = io.BytesIO()
    wave = np.sin(np.arange(int(16000 * seconds)) / 10).astype(np.float32)
    soundfile.write(sink, wave, 16000, format="WAV", subtype="PCM_16")
    return sink.getvalue()


def png() -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (56, 28), (200, 10, 10)).save(sink, format="PNG")
    return sink.getvalue()


def record(*media: tuple[str, str], **fields: Any) -> bytes:
    content = [{"type": kind, kind: member} for kind, member in media]
    content.append({"type": "text", "text": "What is it?"})
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    return json.dumps({"messages": messages, **fields}).encode()


def tar(path: Path, members: list[Member], layout: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=layout) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def count(content: dict[str, Any]) -> tuple[int, int]:
    return 10 * len(content["messages"]), len(content["messages"])


def row(**fields: Any) -> IndexRow:
    basics = {
        "key": "k",
        "json_offset": 512,
        "json_size": 7,
        "json_xxh3": "0" * 16,
        "media": [],
        "num_text_tokens": 5,
        "num_target_tokens": 2,
    }
    return IndexRow(**{**basics, **fields})


CLIP = MediaInfo(
    kind=MediaKind.video,
    member="0.mp4",
    offset=2**40,
    size=9,
    xxh3="f" * 16,
    width=84,
    height=56,
    num_frames=3,
    frame_times_us=[0, 40_000, 90_000],
    first_frame_us=-5,
    fps=2.5,
    keyframe_interval=3,
    has_audio=True,
    audio_start_us=-64_000,
    num_audio_samples=16_001,
    sample_rate_hz=16_000,
    num_channels=2,
    duration_us=1_000_063,
)


def test_index_gives_back_every_field(tmp_path: Path) -> None:
    rows = [row(media=[CLIP, MediaInfo(MediaKind.audio, "1.wav")], task="av", speaker="x"), row()]
    path = tmp_path / "shard-000000.parquet"
    write_index(path, rows)
    assert read_index(path) == rows
    first = path.read_bytes()
    write_index(path, rows)
    assert path.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_unreadable_indexes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    with pytest.raises(DataError, match="missing_index"):
        read_index(path)
    write_index(path, [row()])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="corrupt_index"):
        read_index(path)


def test_manifest_gives_back_every_field(tmp_path: Path) -> None:
    shard = ShardInfo(name="a.tar", num_samples=3, bytes=9, xxh3="a" * 16, index_xxh3="b" * 16)
    manifest = Manifest(tokenizer_hash="c" * 16, shards=(shard, shard))
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert json.loads((tmp_path / "manifest.json").read_bytes())["num_samples"] == 6


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(schema_version=99), "schema_version"),
        (lambda m: m.update(num_samples=4), "corrupt_manifest"),
        (lambda m: m.pop("tokenizer_hash"), "corrupt_manifest"),
        (lambda m: m["shards"][0].update(name="../a.tar"), "corrupt_manifest"),
        (lambda m: m["shards"][0].update(bytes="9"), "corrupt_manifest"),
        (lambda m: m["shards"][0].pop("xxh3"), "corrupt_manifest"),
    ],
)
def test_garbled_manifests_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    shard = ShardInfo(name="a.tar", num_samples=3, bytes=9, xxh3="a" * 16, index_xxh3="b" * 16)
    write_manifest(tmp_path, Manifest(tokenizer_hash="c" * 16, shards=(shard,)))
    content = json.loads((tmp_path / "manifest.json").read_bytes())
    change(content)
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError) as error:
        read_manifest(tmp_path)
    assert error.value.reason == reason


def test_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing_manifest"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_rows_point_at_the_bytes_of_a_foreign_tar(tmp_path: Path, layout: int) -> None:
    folder = "./speech/" + "d" * 120 if layout != tarfile.USTAR_FORMAT else "./speech"
    sound, picture = wav(), png()
    said = record(("image", "b.png"), ("audio", "a.wav"), task="mixed", language="en", source="s")
    path = tar(
        tmp_path / "foreign.tar",
        [
            (f"{folder}/one.a.wav", sound),
            (f"{folder}/one.json", said),
            (f"{folder}/one.b.png", picture),
            (f"{folder}/one.note.txt", b"left alone"),
            (f"{folder}/two.json", record()),
        ],
        layout,
    )
    first, second = index_shard(path, count_text_tokens=count)
    assert (first.key, second.key) == ("one", "two")
    assert (first.task, first.language, first.speaker, first.source) == ("mixed", "en", "", "s")
    assert (first.num_text_tokens, first.num_target_tokens) == (20, 2)
    # In the order of the messages, not of the tar.
    assert [info.member for info in first.media] == ["b.png", "a.wav"]
    data = path.read_bytes()
    for info, content in zip(first.media, (picture, sound), strict=True):
        assert data[info.offset : info.offset + info.size] == content
        assert info.xxh3 == xxhash.xxh3_64_hexdigest(content)
    assert data[first.json_offset : first.json_offset + first.json_size] == said
    assert first.json_xxh3 == xxhash.xxh3_64_hexdigest(said)
    assert (first.media[0].width, first.media[0].height) == (56, 28)
    assert first.media[1].num_audio_samples == 1600
    assert second.media == []


BAD: dict[str, tuple[list[Member], str]] = {
    "members of a sample lie apart": (
        [("a.json", record(("audio", "0.wav"))), ("b.json", record()), ("a.0.wav", wav())],
        "not_adjacent",
    ),
    "the same sample twice in a row": (
        [("a.json", record()), ("a.json", record())],
        "duplicate_member",
    ),
    "the same key later": (
        [("a.json", record()), ("b.json", record()), ("a.json", record())],
        "not_adjacent",
    ),
    "the same key in two directories": (
        [("x/a.json", record()), ("y/a.json", record())],
        "duplicate_key",
    ),
    "no record": ([("a.0.wav", wav())], "missing_json"),
    "no JSON": ([("a.json", b"{")], "corrupt_json"),
    "no messages": ([("a.json", b"[]")], "bad_messages"),
    "medium not there": ([("a.json", record(("audio", "0.wav")))], "missing_member"),
    "another kind": (
        [("a.json", record(("audio", "0.png"))), ("a.0.png", png())],
        "kind_mismatch",
    ),
    "half a wav": (
        [("a.json", record(("audio", "0.wav"))), ("a.0.wav", wav()[:1000])],
        "truncated",
    ),
    "absolute name": ([("/a.json", record())], "unsafe_name"),
    "climbing name": ([("../a.json", record())], "unsafe_name"),
    "climbing name in the middle": ([("x/../../a.json", record())], "unsafe_name"),
    "no extension": ([("a", record())], "unsafe_name"),
    "key with a blank": ([("a b.json", record())], "bad_key"),
    "key with quotes": ([("a'$(x).json", record())], "bad_key"),
    "task is no text": ([("a.json", record(task=3))], "bad_messages"),
}


@pytest.mark.parametrize(("members", "reason"), BAD.values(), ids=BAD.keys())
def test_bad_tars_are_refused(tmp_path: Path, members: list[Member], reason: str) -> None:
    path = tar(tmp_path / "bad.tar", members)
    with pytest.raises(DataError) as error:
        index_shard(path, count_text_tokens=count)
    assert error.value.reason == reason
    assert error.value.shard == str(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "link.tar"
    with tarfile.open(path, "w") as file:
        info = tarfile.TarInfo("a.json")
        info.type, info.linkname = kind, "b.json"
        file.addfile(info)
    with pytest.raises(DataError, match="unsafe_name"):
        index_shard(path, count_text_tokens=count)


def test_a_name_behind_a_nul_is_refused(tmp_path: Path) -> None:
    path = tar(tmp_path / "nul.tar", [("a.json", record())])
    data = bytearray(path.read_bytes())
    data[7:18] = b"../evil.txt"
    blank = data[:148] + b" " * 8 + data[156:512]
    data[148:156] = f"{sum(blank):06o}\0 ".encode()
    path.write_bytes(data)
    with tarfile.open(path) as file:  # the reader of the standard library sees nothing
        assert file.getnames() == ["a.json"]
    with pytest.raises(DataError, match="unsafe_name"):
        index_shard(path, count_text_tokens=count)


def test_no_cut_and_no_flipped_header_bit_loses_samples_silently(tmp_path: Path) -> None:
    good = tar(tmp_path / "good.tar", [(f"k{i}.json", record()) for i in range(6)])
    data = good.read_bytes()
    rows = index_shard(good, count_text_tokens=count)
    rng = np.random.default_rng(0)
    end = 6 * 1024
    bad = tmp_path / "bad.tar"
    for size in rng.integers(0, end, 60):
        bad.write_bytes(data[:size])
        with pytest.raises(DataError):
            index_shard(bad, count_text_tokens=count)
    for _ in range(100):
        flipped = bytearray(data)
        # Not the last, unused bytes of a header; those the checksum covers all the same.
        at = int(rng.integers(0, 6)) * 1024 + int(rng.integers(0, 512))
        flipped[at] ^= 1 << int(rng.integers(0, 8))
        bad.write_bytes(flipped)
        try:
            found = index_shard(bad, count_text_tokens=count)
        except DataError:
            continue
        # A checksum field has spare bits; a flip there changes nothing that is read.
        assert found == rows


def test_describe_shard_names_both_files(tmp_path: Path) -> None:
    path = tar(tmp_path / "shard-000000.tar", [("a.json", record())])
    rows = index_shard(path, count_text_tokens=count)
    write_index(index_path(path), rows)
    info = describe_shard(path, num_samples=len(rows))
    assert info.bytes == path.stat().st_size
    assert info.xxh3 == xxhash.xxh3_64_hexdigest(path.read_bytes())
    assert info.index_xxh3 == xxhash.xxh3_64_hexdigest(index_path(path).read_bytes())


def test_missing_tar(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing_shard"):
        index_shard(tmp_path / "none.tar", count_text_tokens=count)
