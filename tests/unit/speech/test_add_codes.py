"""Codes beside sound files: a new set that goes on where it was stopped."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import soundfile
import torch

from data_pipelines.codes import add_codes
from data_pipelines.prepare import Part
from data_pipelines.shards import Sample, write_shards
from data_pipelines.voices import SAMPLE_RATE_HZ, speak
from launch.cli import main
from omni_train.config.errors import ConfigError, DataError
from omni_train.data.fetch import fetch
from omni_train.data.media import decode_audio
from omni_train.data.source import ShardSet
from omni_train.data.tokenizer import load_tokenizer, train_tokenizer
from omni_train.speech.codec import CODES_FILE, CodecConfig, parse_codes
from omni_train.speech.codec_fit import starting_centroids
from omni_train.speech.mel_kmeans import MelKMeansCodec, MelKMeansConfig, stacked_mel

WORDS = ("river", "doctor", "paper", "window", "apple")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards, a tokenizer and a codec."""
    root = tmp_path_factory.mktemp("codes")
    train_tokenizer(list(WORDS), vocab_size=300).save_pretrained(str(root / "tokenizer"))
    waves = [speak(word, "en-us") for word in WORDS]
    samples = []
    for number, (word, wave) in enumerate(zip(WORDS, waves, strict=True)):
        sink = io.BytesIO()
        soundfile.write(sink, wave, SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
        wave_file = sink.getvalue()
        heard = {"role": "user", "content": [{"type": "audio", "audio": "0.wav"}]}
        said = [{"type": "text", "text": word}, {"type": "speech", "speech": "reply.wav"}]
        # The last one is answered in text alone.
        said = said if word != WORDS[-1] else said[:1]
        messages = [heard, {"role": "assistant", "content": said}]
        media = {"0.wav": wave_file, "reply.wav": wave_file, "notes.txt": b"kept"}
        samples.append(Sample(f"s{number}", {"messages": messages}, media))
    tokenizer = load_tokenizer(str(root / "tokenizer"))
    write_shards(samples, root / "set", tokenizer=tokenizer, samples_per_shard=2)
    config = MelKMeansConfig(frame_rate_hz=25, codebook_size=16)
    frames = torch.cat([stacked_mel(torch.from_numpy(w), SAMPLE_RATE_HZ, config) for w in waves])
    MelKMeansCodec(config, starting_centroids(frames, 16, seed=0)).save(root / "codec")
    return root


def add(root: Path, out: Path, num_workers: int = 0) -> None:
    config = CodecConfig(path=str(root / "codec"))
    tokenizer = str(root / "tokenizer")
    add_codes(root / "set", out, config, tokenizer_dir=tokenizer, num_workers=num_workers)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_codes_are_those_of_the_codec_and_all_else_is_kept(made: Path, tmp_path: Path) -> None:
    add(made, tmp_path / "out", num_workers=2)
    codec = MelKMeansCodec.load(made / "codec")
    before, after = ShardSet("a", str(made / "set")), ShardSet("b", str(tmp_path / "out"))
    assert after.counts == [2, 2, 1]
    for shard, count in enumerate(after.counts):
        with tarfile.open(after.path_of(shard)) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        for number in range(count):
            raw, old = (fetch(s.path_of(shard), s.row(shard, number)) for s in (after, before))
            assert (raw.record, raw.media) == (old.record, old.media)
            key = raw.row.key
            assert members[f"{key}.notes.txt"] == b"kept"
            assert f"{key}.0.codes.npy" not in members
            if raw.row.speech is None:
                assert key == "s4"
                continue
            codes = parse_codes(members[f"{key}.reply.codes.npy"], 16)
            # The same sound as the one that is heard.
            wave = decode_audio(raw.media["0.wav"], raw.row.media[0])
            assert torch.equal(codes, codec.encode(wave, SAMPLE_RATE_HZ))
            assert raw.row.speech.num_codes == len(codes)
            assert old.row.speech is not None
            assert old.row.speech.num_codes == 0


def test_stopped_and_continued_equals_uninterrupted(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(made, tmp_path / "whole")
    calls = 0

    def dies(codec: MelKMeansCodec, wave: torch.Tensor, rate: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return encode(codec, wave, rate)

    encode = MelKMeansCodec.encode
    monkeypatch.setattr(MelKMeansCodec, "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        add(made, tmp_path / "parts")
    assert set(content(tmp_path / "parts")) == {
        "codes.json",
        "shard-000000.tar",
        "shard-000000.parquet",
    }
    calls = 10
    add(made, tmp_path / "parts")
    assert calls == 10 + 2
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_other_codes_are_not_mixed_in(made: Path, tmp_path: Path) -> None:
    add(made, tmp_path / "out")
    config = CodecConfig(path=str(tmp_path))
    loaded = MelKMeansCodec.load(made / "codec")
    MelKMeansCodec(loaded.config, loaded.centroids.flip(0)).save(tmp_path / "codec")
    tokenizer = str(made / "tokenizer")
    with pytest.raises(ConfigError, match="another codec"):
        add_codes(made / "set", tmp_path / "out", config, tokenizer_dir=tokenizer, num_workers=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ConfigError, match="other files"):
        add(made, tmp_path / "full")


def test_parts_make_the_set_of_one(made: Path, tmp_path: Path) -> None:
    add(made, tmp_path / "whole")
    config, tokenizer = CodecConfig(path=str(made / "codec")), str(made / "tokenizer")
    for number in (1, 0):
        part = Part(number, 2)
        out = tmp_path / "parts"
        assert (
            add_codes(made / "set", out, config, tokenizer_dir=tokenizer, part=part, num_workers=0)
            is None
        )
    assert not (tmp_path / "parts" / "manifest.json").exists()
    add(made, tmp_path / "parts")
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_codes_are_not_added_twice_nor_to_what_is_not_spoken(made: Path, tmp_path: Path) -> None:
    add(made, tmp_path / "once")
    config, tokenizer = CodecConfig(path=str(made / "codec")), str(made / "tokenizer")
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    silent = [Sample("s", {"messages": turns})]
    loaded = load_tokenizer(tokenizer)
    write_shards(silent, tmp_path / "silent", tokenizer=loaded, samples_per_shard=1)
    for source, reason in (("once", "bad_codes"), ("silent", "no_speech")):
        out = tmp_path / f"{source}-codes"
        with pytest.raises(DataError, match=reason):
            add_codes(tmp_path / source, out, config, tokenizer_dir=tokenizer, num_workers=0)


def test_the_command_says_what_it_did(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    command = ["data", "codes", str(made / "set"), out, "--codec", str(made / "codec")]
    command += ["--tokenizer", str(made / "tokenizer"), "--workers", "0"]
    assert main([*command, "--part", "0/2"]) == 0
    assert "run without --part" in capsys.readouterr().out
    assert main(command) == 0
    assert "5 samples in" in capsys.readouterr().out
    assert (tmp_path / "out" / CODES_FILE).is_file()
    add(made, tmp_path / "whole")
    whole = content(tmp_path / "whole")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in whole} == whole
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    command[3] = str(tmp_path / "full")
    assert main(command) == 2
    assert "holds other files" in capsys.readouterr().err


def test_a_changed_shard_is_refused(made: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(made / "set", tmp_path / "set")
    shutil.copytree(made / "tokenizer", tmp_path / "tokenizer")
    shutil.copytree(made / "codec", tmp_path / "codec")
    tar = tmp_path / "set" / "shard-000001.tar"
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(data)
    with pytest.raises(DataError, match="hash_mismatch"):
        add(tmp_path, tmp_path / "out")
