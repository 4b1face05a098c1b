"""Writing shards: what comes back through webdataset, and that the same input gives same bytes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import webdataset

from data_pipelines.shards import Sample, write_shards
from omni_train.config.errors import ConfigError, DataError
from omni_train.data.chatml import TextPiece, render
from omni_train.data.index import hash_file, index_path, read_index, read_manifest
from omni_train.data.tokenizer import tokenizer_hash, train_tokenizer

TOKENIZER = train_tokenizer(["write down the words apple river"] * 3, vocab_size=320)


def wav(number: int) -> bytes:
    sink = io.BytesIO()
    wave = np.sin(np.arange(1600 + number) / 10).astype(np.float32)
    soundfile.write(sink, wave, 16000, format="WAV", subtype="PCM_16")
    return sink.getvalue()


def sample(number: int, member: str = "0.wav") -> Sample:
    content = [
        {"type": "audio", "audio": member},
        {"type": "text", "text": "Write down the words."},
    ]
    reply = "apple river caf\u00e9"
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
    record: dict[str, Any] = {"messages": messages, "task": "asr", "meta": {"number": number}}
    return Sample(f"s-{number:03d}", record, {member: wav(number)})


def write(folder: Path, count: int = 7) -> None:
    samples = (sample(number) for number in range(count))
    write_shards(samples, folder, tokenizer=TOKENIZER, samples_per_shard=3)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert len(files(tmp_path / "a")) == 3 + 3 + 1


def test_webdataset_reads_every_sample(tmp_path: Path) -> None:
    write(tmp_path)
    shards = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    seen = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [entry["__key__"] for entry in seen] == [sample(number).key for number in range(7)]
    for number, entry in enumerate(seen):
        assert json.loads(entry["json"]) == sample(number).record
        assert entry["0.wav"] == wav(number)


def test_manifest_and_index_describe_the_files(tmp_path: Path) -> None:
    write(tmp_path)
    manifest = read_manifest(tmp_path)
    assert [shard.num_samples for shard in manifest.shards] == [3, 3, 1]
    assert manifest.tokenizer_hash == tokenizer_hash(TOKENIZER)
    pieces = [
        p for p in render(sample(0).record["messages"], TOKENIZER) if isinstance(p, TextPiece)
    ]
    for shard in manifest.shards:
        path = tmp_path / shard.name
        assert (shard.xxh3, shard.index_xxh3) == (hash_file(path), hash_file(index_path(path)))
        for row in read_index(index_path(path)):
            assert row.num_text_tokens == sum(len(piece.ids) for piece in pieces)
            assert row.num_target_tokens == sum(len(p.ids) for p in pieces if p.supervised)
            assert 0 < row.num_target_tokens < row.num_text_tokens


def test_a_set_is_written_once(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ConfigError, match="written once"):
        write(tmp_path)


@pytest.mark.parametrize("member", ["_0.wav", "json", "x/0.wav"])
def test_members_that_would_be_lost_are_refused(tmp_path: Path, member: str) -> None:
    with pytest.raises(DataError, match="unsafe_name"):
        write_shards([sample(0, member)], tmp_path, tokenizer=TOKENIZER, samples_per_shard=3)
    assert list(tmp_path.iterdir()) == []


def test_a_key_twice_is_refused_across_shards(tmp_path: Path) -> None:
    samples = [sample(0), sample(1), sample(0)]
    with pytest.raises(DataError, match="duplicate_key"):
        write_shards(samples, tmp_path, tokenizer=TOKENIZER, samples_per_shard=1)
    assert not (tmp_path / "manifest.json").exists()


def test_shards_hold_at_least_one_sample(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="samples_per_shard"):
        write_shards([], tmp_path, tokenizer=TOKENIZER, samples_per_shard=0)
