"""Words with their times: every layout in, the same segments out, and what is refused by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import webdataset

from data_pipelines.merge import merge
from data_pipelines.prepare import Part, prepare
from data_pipelines.shards import Sample, write_shards
from data_pipelines.sources.segments import as_segments, read_subtitles
from omni_train.config.errors import DataError
from tests.unit.data_pipelines.sourcing import job, tokenizer, wav, write_lines

SAID = [
    {"start_s": 0.0, "end_s": 0.05, "text": "apple"},
    {"start_s": 0.06, "end_s": 0.1, "text": "river"},
]
WHISPER = {
    "text": " apple river",
    "segments": [
        {"id": 0, "seek": 0, "start": 0.0, "end": 0.05, "text": " apple", "avg_logprob": -0.2},
        {"id": 1, "seek": 0, "start": 0.06, "end": 0.1, "text": " river", "avg_logprob": -0.3},
    ],
    "language": "en",
}
SRT = "1\n00:00:00,000 --> 00:00:00,050\napple\n\n2\n00:00:00,060 --> 00:00:00,100\nriver\n"
VTT = (
    "WEBVTT - made by hand\n\nNOTE two words\n\n00:00.000 --> 00:00.050 align:start\napple\n\n"
    "second\n00:00:00.060 --> 00:00:00.100\n<v Ann>river</v>\n"
)


@pytest.fixture(scope="module")
def token_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer(folder)
    return folder


def run(path: Path, out: Path, token_dir: Path, format_: str, **options: Any) -> list[Any]:
    """Records of the shards, and what was rejected as (row, reason, detail)."""
    made = job(path, out, token_dir, format_, **options)
    prepare(made, part=Part(), num_workers=0, report=lambda *_: None)
    merge(out)
    shards = [str(shard) for shard in sorted(out.glob("*.tar"))]
    read = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False) if shards else []
    lines = (out / "rejected.jsonl").read_text().splitlines()
    rejected = [(row["row"], row["reason"], row["detail"]) for row in map(json.loads, lines)]
    return [[json.loads(entry["json"]) for entry in read], rejected]


def sound(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "a.wav").write_bytes(wav(0))


def test_our_own_lines_keep_every_field(tmp_path: Path, token_dir: Path) -> None:
    sound(tmp_path)
    kept = [{**SAID[0], "speaker": "A", "words": [1, None]}, SAID[1]]
    messages = [
        {"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "apple river"}]},
    ]
    rows = [
        {"audio": "a.wav", "text": "apple river", "task": "asr", "segments": kept, "snr": 3},
        {"messages": messages, "task": "asr", "segments": kept, "n": 1},
        {"audio": "a.wav", "task": "asr", "segments": SAID},
        {"audio": "a.wav", "task": "asr", "language": "zh", "segments": SAID},
        # Another task's text is another: a translation of what the segments say.
        {"audio": "a.wav", "text": "Apfel", "task": "caption", "segments": SAID},
    ]
    path = write_lines(tmp_path / "own.jsonl", rows)
    records, rejected = run(path, tmp_path / "o", token_dir, "jsonl")
    assert rejected == []
    assert [record["segments"] for record in records] == [kept, kept, SAID, SAID, SAID]
    assert [record.get("extra") for record in records] == [{"snr": 3}, {"n": 1}, None, None, None]
    replies = [record["messages"][-1]["content"] for record in records]
    assert replies[2:] == ["apple river", "appleriver", "Apfel"]


@pytest.mark.parametrize(
    ("segments", "reason", "detail"),
    [
        ("apple", "bad_segments", "segments is str, not a list"),
        ([SAID[0], 3], "bad_segments", "segment 2 is no object"),
        ([{"start_s": "0:01", "end_s": 2, "text": "x"}], "bad_segments", "segment 1 has the times"),
        ([{**SAID[0], "end_s": -1}], "bad_segments", "segment 1 lasts from 0.0 to -1.0 s"),
        ([{"start_s": 0, "end_s": 1}], "bad_segments", "segment 1 has the text None"),
        (SAID[::-1], "bad_segments", "segment 2 begins before"),
        ({"start": [0], "end": [1, 2], "text": ["x"]}, "bad_segments", "columns of one length"),
        (SAID[:1], "segments_mismatch", "'' there, 'river' here"),
        # Milliseconds taken for seconds, in a sound of 0.2 s.
        ([SAID[0], {**SAID[1], "start_s": 60, "end_s": 100}], "bad_segments", "begins at 60 s"),
    ],
)
def test_a_row_with_wrong_segments_is_rejected_with_its_line(
    tmp_path: Path, token_dir: Path, segments: Any, reason: str, detail: str
) -> None:
    sound(tmp_path)
    good = {"audio": "a.wav", "text": "apple river", "task": "asr"}
    path = write_lines(tmp_path / "own.jsonl", [good, good, {**good, "segments": segments}])
    records, rejected = run(path, tmp_path / "o", token_dir, "jsonl")
    assert len(records) == 2
    assert [(row, why) for row, why, _ in rejected] == [(3, reason)]
    assert detail in rejected[0][2]


@pytest.mark.parametrize("format_", ["llamafactory", "ms_swift"])
def test_dialogues_with_placeholders(tmp_path: Path, token_dir: Path, format_: str) -> None:
    sound(tmp_path)
    turns = [
        {"role": "user", "content": "<audio>Write it down."},
        {"role": "assistant", "content": "apple river"},
    ]
    row = {"messages": turns, "audios": ["a.wav"], "task": "asr", "times": WHISPER["segments"]}
    path = write_lines(tmp_path / "rows.jsonl", [row])
    columns = (("segments", "times"),)
    records, rejected = run(path, tmp_path / "o", token_dir, format_, columns=columns)
    assert rejected == []
    assert [(s["start_s"], s["end_s"], s["text"]) for s in records[0]["segments"]] == [
        (0.0, 0.05, " apple"),
        (0.06, 0.1, " river"),
    ]
    assert records[0]["segments"][1]["avg_logprob"] == -0.3


@pytest.mark.parametrize("columns", [False, True])
def test_a_column_of_a_dataset(tmp_path: Path, token_dir: Path, columns: bool) -> None:
    timed = [{"start": s["start_s"], "end": s["end_s"], "text": s["text"]} for s in SAID]
    value: Any = timed
    if columns:
        value = {name: [entry[name] for entry in timed] for name in timed[0]}
    sounds = [{"bytes": wav(0), "path": "a.wav"}]
    made = datasets.Dataset.from_dict(
        {"audio": sounds, "text": ["apple river"], "task": ["asr"], "segments": [value]}
    )
    made = made.cast_column("audio", datasets.Audio(decode=False))
    made.save_to_disk(str(tmp_path / "set"))
    records, rejected = run(tmp_path / "set", tmp_path / "o", token_dir, "hf_datasets")
    assert rejected == []
    assert records[0]["segments"] == SAID


@pytest.mark.parametrize("suffix", ["json", "srt", "vtt"])
def test_files_beside_the_media(tmp_path: Path, token_dir: Path, suffix: str) -> None:
    sound(tmp_path / "in")
    text = {"json": json.dumps(WHISPER), "srt": SRT, "vtt": VTT}[suffix]
    (tmp_path / "in" / f"a.{suffix}").write_text(text)
    records, rejected = run(tmp_path / "in", tmp_path / "o", token_dir, "folder", task="asr")
    assert rejected == []
    found = [(s["start_s"], s["end_s"], s["text"].strip()) for s in records[0]["segments"]]
    assert found == [(s["start_s"], s["end_s"], s["text"]) for s in SAID]
    assert records[0]["messages"][-1]["content"] == "apple river"
    if suffix == "json":
        assert records[0]["segments"][0]["seek"] == 0
        assert records[0]["language"] == "en"


def test_what_lies_beside_the_media_must_agree(tmp_path: Path, token_dir: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.wav").write_bytes(wav(0))
        (folder / f"{name}.srt").write_text(SRT)
    (folder / "a.txt").write_text("apple river")
    (folder / "b.txt").write_text("apple sea")
    (folder / "c.vtt").write_text(VTT)
    (folder / "d.srt").write_text(SRT.replace("-->", "to"))
    (folder / "e.srt").write_text(SRT)
    records, rejected = run(folder, tmp_path / "o", token_dir, "folder", task="asr")
    assert [record["messages"][-1]["content"] for record in records] == ["apple river"]
    assert [(row, reason) for row, reason, _ in rejected] == [
        (2, "segments_mismatch"),
        (3, "two_segments"),
        (4, "bad_subtitles"),
        (5, "missing_media"),
    ]
    assert "line 2 of d.srt" in rejected[2][2]


def test_subtitles_as_they_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a.srt"
    path.write_bytes(
        b"\xef\xbb\xbf1\r\n00:00:01,500 --> 01:02:03,004\r\n<i>one</i> <font color='red'>two</font>"
        b"\r\n{\\an8}a < b > c\r\n \r\n2\r\n01:02:03,004 --> 01:02:04,000\r\n\r\n"
    )
    assert read_subtitles(path) == [
        {"start_s": 1.5, "end_s": 3723.004, "text": "one two a < b > c"},
    ]
    path = tmp_path / "a.vtt"
    path.write_text(
        "WEBVTT\nKind: captions\n\nSTYLE\n::cue { color: red }\n\n"
        "00:01.500 --> 00:02.000 line:0 position:20%\n<v.loud Bob>R&amp;D <00:01.700>is</v>\n- on\n"
    )
    assert read_subtitles(path) == [{"start_s": 1.5, "end_s": 2.0, "text": "R&D is - on"}]


@pytest.mark.parametrize(
    ("name", "text", "reason", "detail"),
    [
        ("a.srt", "1\n00:00:01 --> 00:00:02\nx\n", "bad_subtitles", "line 2 of a.srt"),
        ("a.srt", "1\n\nx\n", "bad_subtitles", "line 2 of a.srt"),
        ("a.srt", "00:00:61,000 --> 00:01:02,000\nx\n", "bad_subtitles", "line 1 of a.srt"),
        ("a.srt", "00:00:02,000 --> 00:00:01,000\nx\n", "bad_segments", "segment 1 lasts"),
        ("a.vtt", "00:01.500 --> 00:02.000\nx\n", "bad_subtitles", "WEBVTT"),
        ("a.vtt", "", "bad_subtitles", "WEBVTT"),
        ("a.srt", "caf\xe9", "bad_subtitles", "not UTF-8"),
    ],
)
def test_subtitles_that_are_none(
    tmp_path: Path, name: str, text: str, reason: str, detail: str
) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=detail) as caught:
        read_subtitles(tmp_path / name)
    assert caught.value.reason == reason


def test_a_foreign_tar_may_mean_something_else_by_segments(tmp_path: Path, token_dir: Path) -> None:
    messages = [
        {"role": "user", "content": [{"type": "audio", "audio": "0.wav"}]},
        {"role": "assistant", "content": "apple"},
    ]
    sample = Sample("a", {"messages": messages, "task": "asr", "segments": [7]}, {"0.wav": wav(0)})
    made = write_shards(
        [sample], tmp_path / "o", tokenizer=tokenizer(token_dir), samples_per_shard=1
    )
    assert made.num_samples == 1
    sample.record["segments"] = [{"start_s": 9, "end_s": 10, "text": "apple"}]
    with pytest.raises(DataError, match="begins at 9 s"):
        write_shards([sample], tmp_path / "p", tokenizer=tokenizer(token_dir), samples_per_shard=1)


def test_names_of_our_own_come_before_whispers() -> None:
    given = [{"start": 5, "start_s": 0, "end": 6, "end_s": 1, "text": "x"}]
    assert as_segments(given) == given
