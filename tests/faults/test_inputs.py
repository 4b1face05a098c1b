"""Every bad input has its reason, at the index or at the fetch, and none runs or opens anything."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from omni_train.config.errors import DataError
from omni_train.data import stores
from omni_train.data.fetch import fetch
from omni_train.data.index import read_index, read_manifest, write_index
from omni_train.data.media import decode_audio, probe
from omni_train.data.scan import index_shard
from omni_train.data.stores import Store, open_root
from omni_train.engine.exit_codes import ExitCode, RunError, exit_code_of
from omni_train.speech.mel import log_mel
from tests.unit.data.clips import clip, every, tone, wav


def said(*media: tuple[str, str]) -> bytes:
    content = [{"type": kind, kind: member} for kind, member in media]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    return json.dumps({"messages": turns}).encode()


def write_tar(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for named, data in members:
            info = named if isinstance(named, tarfile.TarInfo) else tarfile.TarInfo(named)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def count(record: dict[str, Any]) -> tuple[int, int]:
    return 10, 2


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "../../outside"
    return info


def flac_of_hours(hours: float) -> bytes:
    sink = io.BytesIO()
    silence = np.zeros(8_000 * 600, np.int16)
    with soundfile.SoundFile(sink, "w", 8_000, 1, format="FLAC", subtype="PCM_16") as file:
        for _ in range(round(hours * 6)):
            file.write(silence)
    return sink.getvalue()


def big_png() -> bytes:
    """90 million pixels in less than a megabyte."""
    sink = io.BytesIO()
    Image.new("L", (10_000, 9_000)).save(sink, "PNG")
    return sink.getvalue()


def mp4() -> bytes:
    return clip(every(10.0, 20), sound=tone(2.0, 16_000))


def sample(member: str, make: Callable[[], bytes]) -> Callable[[], list[Any]]:
    kinds = {"wav": "audio", "flac": "audio", "mp4": "video", "png": "image"}
    kind = kinds[member.rpartition(".")[2]]
    return lambda: [("a.json", said((kind, member))), (f"a.{member}", make())]


FFCONCAT = b"ffconcat version 1.0\nfile '../secret.mp4'\n"
BAD: dict[str, tuple[Callable[[], list[Any]], set[str]]] = {
    "half a wav": (sample("0.wav", lambda: wav(tone(1.0, 16_000))[:9_000]), {"truncated"}),
    "half an mp4": (sample("0.mp4", lambda: mp4()[: len(mp4()) // 2]), {"truncated"}),
    "no wav at all": (sample("0.wav", lambda: b"\x93not a wav" * 20), {"corrupt"}),
    "no mp4 at all": (sample("0.mp4", lambda: b"\x93not an mp4" * 20), {"bad_container"}),
    "sound without samples": (sample("0.wav", lambda: wav(np.zeros(0))), {"empty_audio"}),
    "ten hours of sound": (sample("0.flac", lambda: flac_of_hours(10)), {"too_long"}),
    "a picture that is a bomb": (sample("0.png", big_png), {"too_large"}),
    "a list of files named mp4": (sample("0.mp4", lambda: FFCONCAT), {"bad_container"}),
    "a list of files behind an mp4's first bytes": (
        sample("0.mp4", lambda: b"\x00\x00\x00\x08ftyp\x00\x00\x00\x08moov" + FFCONCAT),
        {"corrupt", "truncated", "no_video"},
    ),
    "a pickle as a medium": (
        lambda: [("a.json", said(("audio", "pyd"))), ("a.pyd", b"cos\nsystem\n(S'exit 1'\ntR.")],
        {"unknown_media"},
    ),
    "a.b.ext, which others take for another sample": (
        lambda: [("a.json", said(("audio", "0.wav"))), ("b.json", said()), ("a.0.wav", b"x")],
        {"not_adjacent"},
    ),
    "a medium that is not there": (
        lambda: [("a.json", said(("audio", "0.wav")))],
        {"missing_member"},
    ),
    "JSON nested too deep": (lambda: [("a.json", b"[" * 200_000)], {"corrupt_json"}),
    "climbing": (lambda: [("../a.json", said())], {"unsafe_name"}),
    "absolute": (lambda: [("/a.json", said())], {"unsafe_name"}),
    "a symbolic link": (lambda: [(link("a.json", tarfile.SYMTYPE), b"")], {"unsafe_name"}),
    "a hard link": (lambda: [(link("a.json", tarfile.LNKTYPE), b"")], {"unsafe_name"}),
    "a pipe": (lambda: [(link("a.json", tarfile.FIFOTYPE), b"")], {"unsafe_name"}),
    "a key that climbs": (lambda: [("..a.json", said())], {"bad_key"}),
}


@pytest.mark.parametrize(("make", "reasons"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_with_its_reason(
    tmp_path: Path, make: Callable[[], list[Any]], reasons: set[str]
) -> None:
    path = write_tar(tmp_path / "bad.tar", make())
    with pytest.raises(DataError) as caught:
        index_shard(path, count_text_tokens=count)
    assert caught.value.reason in reasons
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.tar"], "nothing was written"


def test_a_name_that_hides_something_behind_a_nul(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "bad.tar", [("a.json", said())])
    data = bytearray(path.read_bytes())
    data[7:16] = b"../../etc"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="unsafe_name"):
        index_shard(path, count_text_tokens=count)


def test_a_member_of_a_foreign_kind_is_left_alone(tmp_path: Path) -> None:
    members = [("a.json", said(("audio", "0.wav"))), ("a.0.wav", wav(tone(0.1, 16_000)))]
    path = write_tar(tmp_path / "a.tar", [*members, ("a.pyd", b"cos\nsystem\n(S'exit 1'\ntR.")])
    row = index_shard(path, count_text_tokens=count)[0]
    assert set(fetch(path, row).media) == {"0.wav"}


REFUSED = ["pipe:cat x", "pipe://cat x", "PIPE:cat x", "ftp://h/x", "simplecache::s3://b/x"]
REFUSED += ["data:text/plain,x", "memory://x", "file://other/x", "zip://a::http://h/b", "a\0b"]


@pytest.mark.parametrize("url", REFUSED)
def test_other_schemes_are_refused_and_nothing_is_started(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*args: object, **kwargs: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess.Popen, "__init__", started)
    monkeypatch.setattr(stores, "_read_local", started)
    row = index_row()
    for read in (
        lambda: open_root(url),
        lambda: read_manifest(url),
        lambda: read_index(url),
        lambda: fetch(url, row),
        lambda: Store().read_range(url, 0, 1),
        lambda: Store().read_all(url),
    ):
        with pytest.raises(RunError, match="is not read") as caught:
            read()
        assert exit_code_of(caught.value) == ExitCode.refused == 77


def index_row() -> Any:
    from omni_train.data.types import IndexRow

    return IndexRow("a", 0, 1, "0" * 16, [], 1, 1)


def test_file_urls_and_paths_name_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "a b.bin"
    path.write_bytes(b"0123456789")
    for url in (path, str(path), f"file://{str(path).replace(' ', '%20')}"):
        assert Store().read_range(url, 3, 4) == b"3456"
        assert Store().read_all(url) == b"0123456789"
    write_index(tmp_path / "i.parquet", [index_row()])
    assert read_index(f"file://{tmp_path}/i.parquet") == [index_row()]


def test_a_record_that_is_no_object(tmp_path: Path) -> None:
    import xxhash

    path = tmp_path / "a.tar"
    path.write_bytes(b"[1]")
    row = replace(index_row(), json_size=3, json_xxh3=xxhash.xxh3_64_hexdigest(b"[1]"))
    with pytest.raises(DataError, match="bad_json"):
        fetch(path, row)


def test_ten_hours_are_refused_from_the_header() -> None:
    data = flac_of_hours(10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="too_long"):
        probe(data, "0.flac")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize("rate_hz", [8_000, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_tone_has_its_mel_peak_at_any_rate(rate_hz: int, channels: int) -> None:
    def peak(rate: int, num: int) -> int:
        time = np.arange(rate) / rate
        wave = np.repeat(0.5 * np.sin(2 * np.pi * 1_000 * time)[:, None], num, axis=1)
        data = wav(wave, rate)
        mel = log_mel(decode_audio(data, probe(data, "0.wav")))
        return int(torch.as_tensor(mel).mean(dim=1).argmax())

    assert peak(rate_hz, channels) == peak(16_000, 1)
