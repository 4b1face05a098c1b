"""Spoken replies in records and in the index: what is read, what is refused, older indexes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from data_pipelines.shards import Sample, write_shards
from omni_train.config.errors import DataError
from omni_train.data.chatml import codes_member, count_text_tokens, media_pieces, spoken_member
from omni_train.data.encode import encode
from omni_train.data.fetch import fetch
from omni_train.data.index import index_path, read_index, read_table, table_of
from omni_train.data.tokenizer import encode_text
from omni_train.speech.codec import dump_codes, parse_codes
from tests.faults.shards import wav
from tests.speech_sets import codes_of, spoken_sample
from tests.unit.data.samples import CONFIG, SPEC, TOKENIZER

SPEECH = {"type": "speech", "speech": "reply.wav"}


def write(folder: Path, *samples: Sample) -> Path:
    write_shards(samples, folder, tokenizer=TOKENIZER, samples_per_shard=100)
    return folder / "shard-000000.tar"


def dialogue(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": content}]


def test_a_reply_is_found_with_its_codes_and_is_no_input(tmp_path: Path) -> None:
    tar = write(tmp_path, spoken_sample("a", "apple banana", heard=wav(1)))
    (row,) = read_index(index_path(tar))
    assert row.speech is not None
    assert (row.speech.member, row.speech.num_codes) == ("reply.codes.npy", 16)
    assert row.speech.text == "apple banana"
    assert row.speech.num_reply_tokens == len(encode_text(TOKENIZER, "apple banana"))
    assert [info.member for info in row.media] == ["0.wav"]
    raw = fetch(tar, row, codes=True)
    codes = parse_codes(raw.media["reply.codes.npy"], 96)
    assert torch.equal(codes, codes_of("apple banana", "<|speaker_0|>"))
    assert set(fetch(tar, row).media) == {"0.wav"}
    # The ids are those of the same dialogue without speech.
    silent = dialogue("apple banana")
    silent[0] = raw.record["messages"][0]
    assert count_text_tokens(silent, TOKENIZER) == (row.num_text_tokens, row.num_target_tokens)
    spoken = encode(raw, TOKENIZER, CONFIG, SPEC)
    raw.record["messages"] = silent
    assert torch.equal(encode(raw, TOKENIZER, CONFIG, SPEC).input_ids, spoken.input_ids)


def test_codes_lie_beside_the_sound_or_are_named_themselves() -> None:
    assert codes_member("reply.wav") == codes_member("reply.codes.npy") == "reply.codes.npy"
    assert codes_member("a.b.flac") == "a.b.codes.npy"
    messages = dialogue([{"type": "text", "text": "x"}, SPEECH])
    assert spoken_member(messages) == "reply.wav"
    assert media_pieces(messages) == []
    assert spoken_member(dialogue("x")) is None


def test_a_sound_without_codes_waits_for_them(tmp_path: Path) -> None:
    record = {"messages": dialogue([{"type": "text", "text": "x"}, SPEECH]), "speaker": "v"}
    (row,) = read_index(index_path(write(tmp_path, Sample("a", record, {"reply.wav": wav(0)}))))
    assert row.speech is not None
    assert (row.speech.num_codes, row.speech.size) == (0, 0)


TEXT = {"type": "text", "text": "x"}
MISPLACED = {
    "before the text": dialogue([SPEECH, TEXT]),
    "twice": dialogue([TEXT, SPEECH, SPEECH]),
    "alone": dialogue([SPEECH]),
    "behind more": dialogue([TEXT, TEXT, SPEECH]),
    "no name": dialogue([TEXT, {"type": "speech", "speech": ""}]),
    "of the user": [{"role": "user", "content": [TEXT, SPEECH]}],
    "in an earlier turn": [*dialogue([TEXT, SPEECH]), *dialogue([TEXT, SPEECH])],
    "behind a picture": dialogue([{"type": "image", "image": "0.png"}, SPEECH]),
}


@pytest.mark.parametrize("messages", MISPLACED.values(), ids=MISPLACED)
def test_speech_in_another_place_is_refused(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match="bad_messages"):
        spoken_member(messages)


def test_what_cannot_be_learnt_from_is_refused_when_the_index_is_made(tmp_path: Path) -> None:
    good = {"reply.codes.npy": dump_codes(torch.tensor([1, 2]))}
    floats, huge = io.BytesIO(), io.BytesIO()
    np.save(floats, np.zeros(3))
    # A few bytes that ask for terabytes.
    facts = {"descr": "<i4", "fortran_order": False, "shape": (10**12,)}
    np.lib.format.write_array_header_1_0(huge, facts)
    cases: list[tuple[str, dict[str, bytes], str]] = [
        ("x", {}, "missing_member"),
        ("x", {"other.wav": wav(0)}, "missing_member"),
        ("x", {"reply.codes.npy": b"no file of NumPy"}, "bad_codes"),
        ("x", {"reply.codes.npy": floats.getvalue()}, "bad_codes"),
        ("x", {"reply.codes.npy": huge.getvalue()}, "bad_codes"),
        ("x", {"reply.codes.npy": dump_codes(torch.tensor([-1]))}, "bad_codes"),
        ("  ", good, "empty_reply"),
    ]
    for number, (text, media, reason) in enumerate(cases):
        record = {"messages": dialogue([{"type": "text", "text": text}, SPEECH])}
        with pytest.raises(DataError) as error:
            write(tmp_path / str(number), Sample("a", record, media))
        assert (error.value.reason, error.value.key) == (reason, "a")


def test_an_index_from_before_there_was_speech_is_read(tmp_path: Path) -> None:
    path = index_path(write(tmp_path, spoken_sample("a", "apple"), spoken_sample("b", "banana")))
    rows = read_index(path)
    older = table_of(rows).drop_columns(["speech"])
    pq.write_table(older, path)
    found = read_index(path)
    assert [row.speech for row in found] == [None, None]
    for row in rows:
        row.speech = None
    assert found == rows
    table = read_table(path, columns=["key", "speech.num_codes"])
    assert table.column("speech").null_count == 2
    assert read_table(path, columns=("key",)).column_names == ["key"]
    # A column that nobody knows is still another version's.
    pq.write_table(older.append_column("later", [[1, 2]]), path)
    with pytest.raises(DataError, match="other columns"):
        read_index(path)
