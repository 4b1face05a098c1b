"""Every source format in, every field and every media byte out again."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pytest
import webdataset

from data_pipelines.merge import merge
from data_pipelines.prepare import Part, prepare
from omni_train.data.index import read_index
from tests.unit.data_pipelines.sourcing import job, png, tokenizer, wav, write_lines, write_media

Samples = list[dict[str, Any]]
Rejections = list[dict[str, Any]]


@pytest.fixture(scope="module")
def token_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer(folder)
    return folder


def run(path: Path, out: Path, token_dir: Path, format_: str, **options: Any) -> Samples:
    made = job(path, out, token_dir, format_, **options)
    prepare(made, part=Part(), num_workers=0, report=lambda *_: None)
    merge(out)
    shards = [str(shard) for shard in sorted(out.glob("*.tar"))]
    read = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False) if shards else []
    return [{**entry, "record": json.loads(entry["json"])} for entry in read]


def rejections(out: Path) -> Rejections:
    lines = (out / "rejected.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def contents(sample: dict[str, Any]) -> list[Any]:
    return [turn["content"] for turn in sample["record"]["messages"]]


def test_our_own_lines(tmp_path: Path, token_dir: Path) -> None:
    write_media(tmp_path / "m")
    turns = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "audio", "audio": "m/0.wav", "gain": 2},
                {"type": "image", "image": "m/1.png"},
                {"type": "video", "video": ["m/0.png", "m/0.png"], "fps": 2, "audio": "m/1.wav"},
                {"type": "text", "text": "What is it?"},
            ],
        },
        {"role": "assistant", "content": "an apple", "rating": 5},
    ]
    row = {"messages": turns, "task": "qa", "speaker": 84, "id": "x/1", "meta": {"a": [1, None]}}
    pair = {"sound": "m/1.wav", "text": "river", "task": "asr", "language": "en", "snr": 3.5}
    path = write_lines(tmp_path / "own.jsonl", [row, "", pair])
    first, second = run(path, tmp_path / "o", token_dir, "jsonl", columns=(("audio", "sound"),))
    record = first["record"]
    items = record["messages"][1]["content"]
    assert items[0] == {"type": "audio", "audio": "0.wav", "gain": 2}
    assert items[2] == {"type": "video", "video": ["2.png", "3.png"], "fps": 2, "audio": "4.wav"}
    assert record["messages"][0] == turns[0]
    assert record["messages"][2] == turns[2]
    assert (first["0.wav"], first["1.png"], first["4.wav"]) == (wav(0), png(1), wav(1))
    assert record["extra"] == {"id": "x/1", "meta": {"a": [1, None]}}
    assert (record["task"], record["speaker"], record["source"]) == ("qa", "84", "set")
    assert record["origin"]["media"]["0.wav"] == "m/0.wav"
    assert second["0.wav"] == wav(1)
    assert second["record"]["extra"] == {"snr": 3.5}
    assert second["record"]["language"] == "en"
    # The empty line is no row, but lines keep their numbers.
    assert second["record"]["origin"]["row"] == 3
    assert second["__key__"] == "set-000000003"
    assert rejections(tmp_path / "o") == []


def test_a_spoken_reply_comes_along_and_its_voice_makes_another_sample(
    tmp_path: Path, token_dir: Path
) -> None:
    write_media(tmp_path / "m")
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Say: river"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "river"},
                        {"type": "speech", "speech": f"m/{number}.wav"},
                    ],
                },
            ],
            "speaker": speaker,
        }
        for number, speaker in ((0, "anna"), (1, "ben"))
    ]
    path = write_lines(tmp_path / "spoken.jsonl", rows)
    first, second = run(path, tmp_path / "o", token_dir, "jsonl")
    assert first["record"]["messages"][1]["content"][1] == {"type": "speech", "speech": "0.wav"}
    assert (first["0.wav"], second["0.wav"]) == (wav(0), wav(1))
    indexes = sorted((tmp_path / "o").glob("*.parquet"))
    one, other = (row for index in indexes for row in read_index(index))
    assert one.speech is not None
    assert (one.media, one.speech.num_codes) == ([], 0)
    assert one.content_hash != other.content_hash


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_llamafactory(tmp_path: Path, token_dir: Path, suffix: str) -> None:
    write_media(tmp_path)
    rows = [
        {
            "messages": [
                {"role": "user", "content": "<image>And <audio>what<image>?"},
                {"role": "assistant", "content": "apples", "weight": 1},
            ],
            "images": ["0.png", "1.png"],
            "audios": ["0.wav"],
            "id": 7,
        },
        {
            "conversations": [
                {"from": "human", "value": "<audio>What is said?"},
                {"from": "gpt", "value": "river"},
            ],
            "audios": "1.wav",
            "system": "Be brief.",
            "tools": "[]",
        },
        {
            "conversations": [
                {"from": "human", "value": "<image><image>?"},
                {"from": "gpt", "value": "x"},
            ],
            "images": ["0.png"],
        },
        {
            "conversations": [{"from": "function_call", "value": "f"}],
        },
    ]
    path = tmp_path / f"data{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        write_lines(path, rows)
    first, second = run(path, tmp_path / "o", token_dir, "llamafactory")
    assert contents(first)[0] == [
        {"type": "image", "image": "0.png"},
        {"type": "text", "text": "And "},
        {"type": "audio", "audio": "1.wav"},
        {"type": "text", "text": "what"},
        {"type": "image", "image": "2.png"},
        {"type": "text", "text": "?"},
    ]
    assert (first["0.png"], first["1.wav"], first["2.png"]) == (png(0), wav(0), png(1))
    assert first["record"]["messages"][1] == {"role": "assistant", "content": "apples", "weight": 1}
    assert first["record"]["extra"] == {"id": 7}
    assert [turn["role"] for turn in second["record"]["messages"]] == [
        *("system", "user", "assistant")
    ]
    assert contents(second)[0] == "Be brief."
    assert second["0.wav"] == wav(1)
    assert second["record"]["extra"] == {"tools": "[]"}
    assert [(row["file"], row["row"], row["reason"]) for row in rejections(tmp_path / "o")] == [
        (path.name, 3, "placeholder_mismatch"),
        (path.name, 4, "unsupported_role"),
    ]


def test_llamafactory_columns_and_tags_by_name(tmp_path: Path, token_dir: Path) -> None:
    write_media(tmp_path)
    turns = [{"who": "Q", "says": "<image>?"}, {"who": "A", "says": "apple"}]
    path = write_lines(tmp_path / "d.jsonl", [{"talk": turns, "pics": ["1.png"]}])
    names = {"messages": "talk", "images": "pics", "role_tag": "who", "content_tag": "says"}
    columns = tuple({**names, "user_tag": "Q", "assistant_tag": "A"}.items())
    (sample,) = run(path, tmp_path / "o", token_dir, "llamafactory", columns=columns)
    assert sample["0.png"] == png(1)
    assert contents(sample)[1] == "apple"


def test_ms_swift(tmp_path: Path, token_dir: Path) -> None:
    write_media(tmp_path)
    answer = {"role": "assistant", "content": "apple"}
    rows = [
        {
            "messages": [{"role": "user", "content": "<image>What?"}, answer],
            "images": [{"path": "1.png"}],
            "audios": ["0.wav"],
            "system": "Be brief.",
            "rejected_response": "pear",
            "objects": {"ref": []},
        },
        {"messages": [{"role": "user", "content": "<image>?"}, answer], "images": []},
        {"messages": [{"role": "user", "content": "?"}, {**answer, "loss": False}]},
        {"messages": [{"role": "user", "content": "?"}, {**answer, "content": "<bbox>"}]},
        {"messages": [{"role": "user", "content": "?"}]},
        {"messages": [{"role": "user", "content": "<image>?"}, answer], "images": ["no.png"]},
        {"messages": [{"role": "user", "content": "<image>?"}, answer], "images": ["0.wav"]},
        {"messages": [{"role": "user", "content": "?"}, {**answer, "content": "<|en|>hi"}]},
    ]
    path = write_lines(tmp_path / "swift.jsonl", rows)
    (sample,) = run(path, tmp_path / "o", token_dir, "ms_swift")
    # Sound that no tag names comes first.
    assert contents(sample)[1] == [
        {"type": "audio", "audio": "0.wav"},
        {"type": "image", "image": "1.png"},
        {"type": "text", "text": "What?"},
    ]
    assert contents(sample)[0] == "Be brief."
    assert (sample["0.wav"], sample["1.png"]) == (wav(0), png(1))
    assert sample["record"]["extra"] == {"rejected_response": "pear", "objects": {"ref": []}}
    assert [row["reason"] for row in rejections(tmp_path / "o")] == [
        *("placeholder_mismatch", "unsupported_loss", "unsupported_placeholder", "no_target"),
        *("missing_media", "kind_mismatch", "task_tag"),
    ]


def test_a_saved_dataset_is_read_without_decoding(tmp_path: Path, token_dir: Path) -> None:
    write_media(tmp_path / "m")
    rows = {
        "clip": [{"bytes": wav(0), "path": "a.wav"}, {"bytes": wav(1), "path": None}],
        "picture": [{"bytes": png(0), "path": None}, {"bytes": png(1), "path": "b.png"}],
        "sentence": ["apple", "river"],
        "speaker_id": [84, 85],
        "when": [datetime(2020, 1, 2), None],  # noqa: DTZ001
        "score": [float("nan"), 0.5],
    }
    made = datasets.Dataset.from_dict(rows)
    made = made.cast_column("clip", datasets.Audio()).cast_column("picture", datasets.Image())
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "d"))
    columns = (("text", "sentence"), ("speaker", "speaker_id"))
    options = {"split": "train", "task": "caption", "columns": columns}
    first, second = run(tmp_path / "d", tmp_path / "o", token_dir, "hf_datasets", **options)
    assert (first["0.png"], first["1.wav"]) == (png(0), wav(0))
    assert (second["0.png"], second["1.wav"]) == (png(1), wav(1))
    assert contents(first)[1] == "apple"
    assert first["record"]["speaker"] == "84"
    assert first["record"]["extra"] == {"when": "2020-01-02T00:00:00", "score": "nan"}
    assert second["record"]["extra"] == {"when": None, "score": 0.5}


def test_a_saved_dataset_of_dialogues(tmp_path: Path, token_dir: Path) -> None:
    turns = [{"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "no"}]
    pictures = [{"bytes": png(n), "path": None} for n in range(2)]
    made = datasets.Dataset.from_dict({"messages": [turns], "pictures": [pictures], "id": [3]})
    made = made.cast_column("pictures", datasets.List(datasets.Image()))
    made.save_to_disk(str(tmp_path / "d"))
    (sample,) = run(tmp_path / "d", tmp_path / "o", token_dir, "hf_datasets")
    assert (sample["0.png"], sample["1.png"]) == (png(0), png(1))
    assert sample["record"]["extra"] == {"id": 3}


def test_a_folder(tmp_path: Path, token_dir: Path) -> None:
    root = tmp_path / "in"
    write_media(root / "sub")
    (root / "sub" / "0.txt").write_text("apple river\n")
    (root / "sub" / "1.json").write_text('{"text": "seven", "speaker": "anna", "take": 2}')
    (root / "notes.md").write_text("x")
    (root / "alone.txt").write_text("x")
    samples = run(root, tmp_path / "o", token_dir, "folder", task="caption")
    found = {sample["record"]["origin"]["file"]: sample for sample in samples}
    assert set(found) == {"sub/0.wav", "sub/0.png", "sub/1.wav", "sub/1.png"}
    assert found["sub/0.wav"]["0.wav"] == wav(0)
    assert contents(found["sub/0.png"])[1] == "apple river"
    assert found["sub/1.wav"]["record"]["speaker"] == "anna"
    assert found["sub/1.wav"]["record"]["extra"] == {"take": 2}
    assert [(row["file"], row["reason"]) for row in rejections(tmp_path / "o")] == [
        ("alone.txt", "missing_media"),
        ("notes.md", "unknown_media"),
    ]


@pytest.mark.parametrize("value", [{"bytes": 5}, {"bytes": "UklGRg=="}, {"path": 3}, 7, {}, [1]])
def test_media_that_are_neither_a_path_nor_bytes(
    tmp_path: Path, token_dir: Path, value: Any
) -> None:
    path = write_lines(tmp_path / "own.jsonl", [{"audio": value, "text": "x", "task": "asr"}])
    assert run(path, tmp_path / "o", token_dir, "jsonl") == []
    assert [row["reason"] for row in rejections(tmp_path / "o")] == ["bad_media"]
