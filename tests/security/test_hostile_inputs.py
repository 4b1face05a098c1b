"""Hostile inputs through the real loaders: none runs, none opens another file, each is refused.

Every case ends in a message and in exit code 77 (refused for safety) or 65 (bad data), while the
tripwire watches for programs, connections, pickled functions and the files beside the input.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
import xxhash
from PIL import Image

from omni_train.config.load import compose_config
from omni_train.config.register import register_root
from omni_train.data.fetch import fetch
from omni_train.data.index import read_index, read_manifest, write_index
from omni_train.data.media import decode_image, probe
from omni_train.data.scan import index_shard
from omni_train.data.stores import open_root
from omni_train.data.types import IndexRow
from omni_train.engine.checkpoint_files import FileRecord, Manifest, record_of
from omni_train.engine.checkpoint_reader import CheckpointReader
from omni_train.engine.exit_codes import ExitCode, exit_code_of
from omni_train.engine.foreign import load_tensors
from omni_train.models.weights import open_source
from omni_train.speech.asr import AsrConfig, AsrKind, build_recognizer
from omni_train.speech.codec import parse_codes
from omni_train.speech.mel_kmeans import MelKMeansCodec, MelKMeansConfig
from omni_train.speech.similarity import WavLmVoices
from omni_train.speech.token2wav import load_speakers
from recipes.stage1_audio import Stage1AudioConfig
from tests.security import evil
from tests.security.evil import SECRET
from tests.security.tripwire import tripwire
from tests.unit.data.clips import clip, every

Attack = Callable[[Path, Path], object]
ATTACKS: dict[str, Attack] = {}


def attack(name: str) -> Callable[[Attack], Attack]:
    def keep(function: Attack) -> Attack:
        assert name not in ATTACKS
        ATTACKS[name] = function
        return function

    return keep


# --- weights: a pickle in each loader, in each disguise; files that call themselves safetensors


def _checkpoint(folder: Path, name: str, data: bytes) -> Path:
    """A checkpoint whose manifest is right about a file that is not what it should be."""
    folder.mkdir(parents=True)
    (folder / name).write_bytes(data)
    table = {"w": {"shape": [2], "trainable": True, "dtype": "float32"}}
    files = {name: record_of(folder / name)}
    Manifest(1, 1, {}, files, params=table).write(folder)
    return folder


def _as_codec(folder: Path, data: bytes) -> Path:
    """A mel_kmeans codec whose settings are right about such a file."""
    home = folder / "codec"
    home.mkdir()
    record = {**asdict(MelKMeansConfig()), "format": 1, "kind": "mel_kmeans"}
    record["weights_xxh3"] = xxhash.xxh3_64_hexdigest(data)
    (home / "codec.json").write_text(json.dumps(record))
    (home / "codec.safetensors").write_bytes(data)
    return folder


for disguise, write in evil.PICKLES.items():
    ATTACKS |= {
        f"speakers, {disguise}": lambda at, marker, write=write: load_speakers(
            write(at / "spk_dict.pt", marker)
        ),
        f"weights of another project, {disguise}": lambda at, marker, write=write: open_source(
            str(write(at / "model" / "pytorch_model.bin", marker).parent)
        ),
        f"safetensors in name only, {disguise}": lambda at, marker, write=write: open_source(
            str(write(at / "model" / "model.safetensors", marker).parent)
        ),
        f"file of a checkpoint, {disguise}": lambda at, marker, write=write: CheckpointReader(
            _checkpoint(
                at / "step-1",
                "rank-00000.safetensors",
                write(at / "evil.pt", marker).read_bytes(),
            )
        ),
        f"a DeepSpeed shard, {disguise}": lambda at, marker, write=write: load_tensors(
            write(at / "zero_pp_rank_0_mp_rank_00_optim_states.pt", marker), key="DIR"
        ),
        f"codec, {disguise}": lambda at, marker, write=write: MelKMeansCodec.load(
            _as_codec(at, write(at / "evil.pt", marker).read_bytes())
        ),
    }

for kind, data in evil.BAD_SAFETENSORS.items():
    ATTACKS[f"safetensors: {kind}"] = lambda at, marker, data=data: CheckpointReader(
        _checkpoint(at / "step-1", "rank-00000.safetensors", data)
    )


@attack("Whisper as a pickle")
def _(at: Path, marker: Path) -> object:
    evil.zip_pickle(at / "asr" / "pytorch_model.bin", marker)
    return build_recognizer(AsrConfig(kind=AsrKind.whisper, path=str(at / "asr")))


@attack("WavLM as a pickle")
def _(at: Path, marker: Path) -> object:
    return WavLmVoices(str(evil.zip_pickle(at / "voice" / "model.pt", marker).parent))


@attack("a DeepSpeed directory as weights")
def _(at: Path, marker: Path) -> object:
    name = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    evil.zip_pickle(at / "run" / "global_step1" / name, marker)
    return open_source(str(at / "run"))


@attack("an index of weights that points elsewhere")
def _(at: Path, marker: Path) -> object:
    index = {"weight_map": {"w": f"../{SECRET}/weights.safetensors"}}
    (at / "model.safetensors.index.json").write_text(json.dumps(index))
    return open_source(str(at))


@attack("a manifest that points elsewhere")
def _(at: Path, marker: Path) -> object:
    folder = at / "step-1"
    folder.mkdir()
    outside = f"../{SECRET}/weights.safetensors"
    Manifest(1, 1, {}, {outside: FileRecord(1, "0" * 16)}).write(folder)
    return CheckpointReader(folder)


@attack("a manifest whose frozen weights lie elsewhere")
def _(at: Path, marker: Path) -> object:
    folder = at / "step-1"
    folder.mkdir()
    record = {"weights.safetensors": FileRecord(1, "0" * 16)}
    Manifest(1, 1, {}, {}, f"../{at.name}/{SECRET}", record).write(folder)
    return CheckpointReader(folder)


@attack("a manifest nested too deep")
def _(at: Path, marker: Path) -> object:
    (at / "manifest.json").write_text('{"files": ' + "[" * 200_000)
    return CheckpointReader(at)


@attack("codes that are a pickle")
def _(at: Path, marker: Path) -> object:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    text = evil.text_pickle(at / "p", marker).read_bytes()
    return parse_codes(b"\x93NUMPY\x01\x00\x76\x00" + header + text, codebook_size=8)


# --- configuration: code by name in many disguises, bombs


def _compose(*overrides: str, extra: Path | None = None) -> object:
    root = register_root("stage1_audio", Stage1AudioConfig)
    return compose_config(root, overrides, extra_dir=extra)


def _with_file(at: Path, name: str, text: str) -> object:
    path = at / "conf" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    group, _, option = name.removesuffix(".yaml").partition("/")
    return _compose(f"{group}={option}", extra=at / "conf")


TARGETS = {
    "appended": ["+_target_=os.system"],
    "in a section": ["+optim._target_=logging.os.system"],
    "inside a mapping": ["optim={_target_: pandas.read_pickle, path: x}"],
    "in a list": ["run.resume_allow=[{_target_: os.system}]"],
    "of Hydra's sweeper": ["hydra.sweeper._target_=os.system"],
    "partial": ["+optim._partial_=true"],
    "a logging class": ["hydra.job_logging=x"],
    "the environment": ["run.experiment='${oc.env:HOME}'"],
    "a nested resolver": ["run.experiment='${oc.decode:${oc.env:HOME}}'"],
}
for disguise, overrides in TARGETS.items():
    ATTACKS[f"override: {disguise}"] = lambda at, marker, o=tuple(overrides): _compose(*o)

LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
FILES = {
    "a target": ("optim/evil.yaml", "_target_: os.system\n"),
    "an escaped target": ("optim/evil.yaml", '"\\x5ftarget_": os.system\n'),
    "a target folded into a block": ("optim/evil.yaml", "? >-\n  _target_\n: os.system\n"),
    "a tag that calls": ("optim/evil.yaml", "lr: !!python/object/apply:os.system ['x']\n"),
    "callbacks": (
        "experiment/evil.yaml",
        "# @package hydra.callbacks\nx:\n  _target_: os.system\n",
    ),
    "a logging factory": ("experiment/evil.yaml", "# @package hydra.job_logging\n(): os.system\n"),
    "a billion laughs": ("optim/evil.yaml", LAUGHS),
    "a mapping merged into itself": ("optim/evil.yaml", "a: &a {<<: *a}\n"),
    "depth": ("optim/evil.yaml", "lr: " + "[" * 5_000),
    "callbacks without a target": (
        "experiment/evil.yaml",
        "# @package hydra.callbacks\nx: {y: 1}\n",
    ),
    "a logging class": (
        "experiment/evil.yaml",
        "# @package hydra.job_logging\nhandlers: {x: {class: a.B}}\n",
    ),
    "a million characters": ("optim/evil.yaml", "#\n" * 600_000),
}
for disguise, (name, text) in FILES.items():
    ATTACKS[f"YAML: {disguise}"] = lambda at, marker, n=name, t=text: _with_file(at, n, t)


# --- data: places, archives, media

URLS = ["pipe:touch {0}", "pipe://touch {0}", "PIPE:touch {0}", "file://host/x", "zip://a::s3://b"]
URLS += ["simplecache::http://h/b", "data:text/plain,x", "memory://x", "a\0b", "git+ssh://h/r"]
for url in URLS:
    ATTACKS[f"address {url!r}"] = lambda at, marker, url=url: open_root(url.format(marker))
    ATTACKS[f"shard at {url!r}"] = lambda at, marker, url=url: fetch(url.format(marker), _row())


def _row(key: str = "a") -> IndexRow:
    return IndexRow(key, 0, 1, "0" * 16, [], 1, 1)


def _index(path: Path) -> object:
    return index_shard(path, count_text_tokens=lambda record: (1, 1))


MEMBERS: dict[str, list[tuple[str | tarfile.TarInfo, bytes]]] = {
    "climbing": [("../../a.json", evil.said())],
    "absolute": [("/etc/a.json", evil.said())],
    "climbing in the middle": [("a/../../b.json", evil.said())],
    "a backslash": [("..\\a.json", evil.said())],
    "a symbolic link": [(evil.special("a.json", tarfile.SYMTYPE, f"{SECRET}/x"), b"")],
    "a hard link": [(evil.special("a.json", tarfile.LNKTYPE, f"{SECRET}/x"), b"")],
    "a pipe": [(evil.special("a.json", tarfile.FIFOTYPE, ""), b"")],
    "a device": [(evil.special("a.json", tarfile.CHRTYPE, ""), b"")],
    "a .pyd, which others unpickle": [
        ("a.json", evil.said(("audio", "pyd"))),
        ("a.pyd", b"cos\nsystem\n(S'touch hacked'\ntR."),
    ],
    "a key with a newline": [("a\nb.json", evil.said())],
    "a key that is markup": [("<script>.json", evil.said())],
    "JSON nested too deep": [("a.json", b"[" * 200_000)],
}
for disguise, members in MEMBERS.items():
    ATTACKS[f"tar: {disguise}"] = lambda at, marker, m=members: _index(
        evil.tar_of(at / "bad.tar", *m)
    )


@attack("tar: a name that goes on behind a NUL")
def _(at: Path, marker: Path) -> object:
    path = evil.tar_of(at / "bad.tar", ("a.json", evil.said()))
    data = bytearray(path.read_bytes())
    data[7:16] = b"../../etc"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(bytes(data))
    return _index(path)


@attack("tar: compressed")
def _(at: Path, marker: Path) -> object:
    path = evil.tar_of(at / "bad.tar", ("a.json", evil.said()))
    path.write_bytes(gzip.compress(path.read_bytes() + bytes(50_000_000)))
    return _index(path)


@attack("an index whose keys are paths")
def _(at: Path, marker: Path) -> object:
    write_index(at / "a.parquet", [_row("../../a")])
    return read_index(at / "a.parquet")


@attack("a manifest of shards that lie elsewhere")
def _(at: Path, marker: Path) -> object:
    shard = {"name": f"../{SECRET}/a.tar", "num_samples": 1, "bytes": 1}
    shard |= {"xxh3": "0" * 16, "index_xxh3": "0" * 16}
    record = {"schema_version": 3, "tokenizer_hash": "x", "shards": [shard]}
    for version in range(1, 9):
        (at / "manifest.json").write_text(json.dumps({**record, "schema_version": version}))
        try:
            read_manifest(at)
        except Exception as error:
            if "schema_version" not in str(error):
                raise
    raise AssertionError("no version of it was read")


def _medium(at: Path, kind: str, member: str, data: bytes) -> object:
    path = evil.tar_of(at / "bad.tar", ("a.json", evil.said((kind, member))), (f"a.{member}", data))
    return _index(path)


def _concat(at: Path) -> bytes:
    return f"ffconcat version 1.0\nfile '{at / SECRET / 'clip.mp4'}'\n".encode()


@attack("clip: a list of files named .mp4")
def _(at: Path, marker: Path) -> object:
    return _medium(at, "video", "0.mp4", _concat(at))


@attack("clip: the same behind the first bytes of an mp4")
def _(at: Path, marker: Path) -> object:
    return _medium(at, "video", "0.mp4", b"\0\0\0\x08ftyp\0\0\0\x08moov" + _concat(at))


@attack("clip: a playlist")
def _(at: Path, marker: Path) -> object:
    text = f"#EXTM3U\n#EXTINF:1,\n{at / SECRET / 'clip.mp4'}\n#EXT-X-ENDLIST\n"
    return _medium(at, "video", "0.mp4", text.encode())


@attack("clip: a decoder that is not on the list")
def _(at: Path, marker: Path) -> object:
    data = clip(every(5.0, 3), container="matroska", video_codec="ffv1")
    return _medium(at, "video", "0.mkv", data)


@attack("bomb: a picture of 90 million pixels")
def _(at: Path, marker: Path) -> object:
    sink = io.BytesIO()
    Image.new("L", (10_000, 9_000)).save(sink, "PNG")
    return decode_image(sink.getvalue())


@attack("bomb: ten hours of silence")
def _(at: Path, marker: Path) -> object:
    sink = io.BytesIO()
    silence = np.zeros(8_000 * 600, np.int16)
    with soundfile.SoundFile(sink, "w", 8_000, 1, format="FLAC", subtype="PCM_16") as file:
        for _ in range(60):
            file.write(silence)
    return probe(sink.getvalue(), "0.flac")


@attack("bomb: codes that declare terabytes")
def _(at: Path, marker: Path) -> object:
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }"
    text = header.ljust(117) + b"\n"
    return parse_codes(b"\x93NUMPY\x01\x00\x76\x00" + text, codebook_size=8)


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_runs_and_it_is_refused(place: Path, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "hacked"
    with tripwire(place / SECRET) as happened, pytest.raises(Exception) as caught:
        ATTACKS[name](place, marker)
    assert happened == []
    assert not list(tmp_path.rglob("hacked"))
    assert exit_code_of(caught.value) in (ExitCode.refused, ExitCode.bad_data), repr(caught.value)
    assert len(str(caught.value)) > 20


def test_there_are_enough_of_them() -> None:
    assert len(ATTACKS) >= 25
