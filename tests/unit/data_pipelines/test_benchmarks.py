"""Every benchmark's converter on a row of its documented layout, and what a bad row is told."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from data_pipelines.benchmarks.make import make_benchmark
from data_pipelines.benchmarks.rows import read_rows
from data_pipelines.benchmarks.table import BENCHMARKS
from launch.cli import main
from omni_train.config.errors import ConfigError, DataError
from omni_train.data.fetch import fetch
from omni_train.data.source import ShardSet
from omni_train.evaluation.kinds.base import Answer
from omni_train.evaluation.metrics import Metric, Normalizer
from omni_train.evaluation.scoring import score
from tests.numerics.samples import small_tokenizer
from tests.unit.data.clips import clip, every, tone, wav
from tests.unit.data.samples import png

SOUND = {"bytes": wav(tone(0.3, 16_000)), "path": "a.wav"}
PICTURE = {"bytes": png(56, 56, 1), "path": "a.png"}
FOUR = ["red", "blue", "green", "pink"]
# name -> (a row as the owner documents it, media files, the right reply)
ROWS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "librispeech": ({"id": "84-1-0000", "text": "GO DO"}, ["84-1-0000.flac"], "GO DO"),
    "common_voice": (
        {"client_id": "c", "path": "c.mp3", "sentence": "Go on.", "up_votes": "2"},
        ["clips/c.mp3"],
        "Go on.",
    ),
    "common_voice_zh": (
        {"path": "c.mp3", "sentence": "\u4f60\u597d"},
        ["clips/c.mp3"],
        "\u4f60\u597d",
    ),
    "fleurs": ({"id": 1, "audio": SOUND, "transcription": "go", "lang_id": 1}, [], "go"),
    "fleurs_zh": ({"audio": SOUND, "transcription": "\u4f60\u597d"}, [], "\u4f60\u597d"),
    "voxpopuli": ({"audio": SOUND, "normalized_text": "go", "raw_text": "Go."}, [], "go"),
    "covost2": (
        {"path": "c.mp3", "sentence": "Go.", "translation": "Geh.", "client_id": "c"},
        ["clips/c.mp3"],
        "Geh.",
    ),
    "covost2_zh": ({"path": "c.mp3", "translation": "\u8d70"}, ["clips/c.mp3"], "\u8d70"),
    "meld": (
        {"Utterance": "Oh", "Emotion": "joy", "Dialogue_ID": "0", "Utterance_ID": "3"},
        ["dia0_utt3.mp4"],
        "joy",
    ),
    "vocalsound": (
        {"wav": "/data/owner/audio_16k/f0003_0_cough.wav", "labels": "/m/01b_21"},
        ["audio_16k/f0003_0_cough.wav"],
        "cough",
    ),
    "omnibench": (
        {
            "index": 1,
            "task type": "Action",
            "audio type": "speech",
            "question": "What?",
            "options": FOUR,
            "answer": "green",
            "audio_path": "a.mp3",
            "image_path": "a.jpg",
        },
        ["mm_data/audio/a.mp3", "mm_data/image/a.jpg"],
        "C",
    ),
    "mmau": (
        {"id": "x", "audio_id": "./t/a.wav", "question": "?", "choices": FOUR, "answer": "blue"}
        | {"task": "sound", "difficulty": "easy"},
        ["t/a.wav"],
        "B",
    ),
    "mmmu": (
        {"id": "x", "question": "<image 1>?", "options": str(FOUR), "answer": "D"}
        | {"question_type": "multiple-choice", "subfield": "Art", "image_1": PICTURE},
        [],
        "D",
    ),
    "mmlu": ({"question": "?", "choices": FOUR, "answer": 2, "subject": "art"}, [], "C"),
    "mmlu_pro": (
        {"question": "?", "options": [*FOUR, "grey"], "answer": "E", "category": "art"},
        [],
        "E",
    ),
    "video_mme": (
        {"videoID": "v", "question": "?", "options": ["A. red", "B. blue"], "answer": "B"}
        | {"duration": "short", "question_id": "001-1"},
        ["v.mp4"],
        "B",
    ),
    "mvbench": (
        {"video": "x/v.mp4", "question": "?", "candidates": FOUR, "answer": "red"},
        ["x/v.mp4"],
        "A",
    ),
    "ai2d": ({"image": PICTURE, "question": "?", "options": FOUR, "answer": "3"}, [], "D"),
    "chartqa": ({"imgname": "1.png", "query": "How many?", "label": "14"}, ["png/1.png"], "14"),
    "textvqa": (
        {"image_id": "1f", "question": "?", "answers": ["nokia", "nokia", "nok"]},
        ["1f.jpg"],
        "nokia",
    ),
    "docvqa": ({"image": "d/1.png", "question": "?", "answers": ["7"]}, ["d/1.png"], "7"),
    "refcoco": (
        {"image": PICTURE, "answer": ["left cup"], "bbox": [10.0, 20.0, 30.0, 5.5]},
        [],
        "[10.0, 20.0, 40.0, 25.5]",
    ),
    "voicebench": ({"audio": SOUND, "prompt": "Who?", "reference": "Bach"}, [], "Bach"),
    "voicebench_text": ({"prompt": "Who?", "reference": "Bach"}, [], "Bach"),
    "gsm8k": ({"question": "?", "answer": "2+2\n#### 1,004"}, [], "1004"),
}
# A field whose absence must be named.
NEEDED = {
    "librispeech": "text",
    "common_voice": "sentence",
    "common_voice_zh": "path",
    "fleurs": "transcription",
    "fleurs_zh": "audio",
    "voxpopuli": "normalized_text",
    "covost2": "translation",
    "covost2_zh": "path",
    "meld": "Emotion",
    "vocalsound": "labels",
    "omnibench": "audio_path",
    "mmau": "choices",
    "mmmu": "options",
    "mmlu": "answer",
    "mmlu_pro": "category",
    "video_mme": "videoID",
    "mvbench": "candidates",
    "ai2d": "image",
    "chartqa": "label",
    "textvqa": "answers",
    "docvqa": "question",
    "refcoco": "bbox",
    "voicebench": "reference",
    "voicebench_text": "prompt",
    "gsm8k": "answer",
}
BYTES = {
    ".mp4": lambda: clip(every(1.0, 4), sound=tone(0.5, 16_000)),
    ".wav": lambda: SOUND["bytes"],
}


def sound_file(suffix: str) -> bytes:
    """A real sound in the container of the suffix."""
    sink = io.BytesIO()
    soundfile.write(sink, tone(0.3, 16_000), 16_000, format=suffix.lstrip(".").upper())
    return sink.getvalue()


def picture_file(suffix: str) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (56, 56), "red").save(sink, format={".jpg": "JPEG"}.get(suffix, "PNG"))
    return sink.getvalue()


def lay_out(folder: Path, name: str, row: dict[str, Any]) -> Path:
    """Write media and one row in the owner's kind of file; return what the command is given."""
    for media in ROWS[name][1]:
        path = folder / media
        path.parent.mkdir(parents=True, exist_ok=True)
        make = {".mp4": BYTES[".mp4"], ".wav": BYTES[".wav"]}.get(path.suffix)
        if make is not None:
            path.write_bytes(make())
        elif path.suffix in (".png", ".jpg"):
            path.write_bytes(picture_file(path.suffix))
        else:
            path.write_bytes(sound_file(path.suffix))
    if name.startswith(("common_voice", "covost2", "meld")):
        file = folder / ("meld.csv" if name == "meld" else "test.tsv")
        with file.open("w", encoding="utf-8", newline="") as sink:
            writer = csv.DictWriter(sink, row, delimiter="," if name == "meld" else "\t")
            writer.writeheader()
            writer.writerow(row)
        return file
    if any(isinstance(value, dict) for value in row.values()):
        file = folder / "test.parquet"
        pq.write_table(pa.Table.from_pylist([row]), file)
        return file
    file = folder / ("rows.json" if name in ("vocalsound", "textvqa") else "rows.jsonl")
    text = json.dumps({"data": [row]} if file.suffix == ".json" else row)
    file.write_text(text + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_row_becomes_a_sample_that_scores_as_right(name: str, tmp_path: Path) -> None:
    row, media, reply = ROWS[name]
    (tmp_path / "data").mkdir()
    source = lay_out(tmp_path / "data", name, row)
    out = tmp_path / "out"
    made = make_benchmark(name, source, out, tokenizer=small_tokenizer())
    assert made.num_samples == 1
    shards = ShardSet("made", str(out))
    raw = fetch(shards.path_of(0), shards.row(0, 0))
    wanted = len(media) + sum(isinstance(value, dict) for value in row.values())
    assert len(raw.media) == wanted
    messages, meta = raw.record["messages"], raw.record["meta"]
    assert messages[-1] == {"role": "assistant", "content": reply}
    benchmark = BENCHMARKS[name]
    values = []
    for said in (reply, "nothing of the kind"):
        answer = Answer(
            "s", tuple(meta.get("references", [reply])), said, tuple(meta.get("options", []))
        )
        normalizer = Normalizer[benchmark.normalizer]
        values.append(score([answer], Metric[benchmark.metric], normalizer).whole.value)
    right, wrong = values
    if benchmark.metric in ("wer", "cer"):
        assert right == 0.0 < wrong
    else:
        assert right > wrong
        # BLEU of a single word is smoothed.
        assert right == 1.0 or benchmark.metric == "bleu"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_missing_field_is_named_with_file_and_row(name: str, tmp_path: Path) -> None:
    row, _, _ = ROWS[name]
    short = {key: value for key, value in row.items() if key != NEEDED[name]}
    (tmp_path / "data").mkdir()
    source = lay_out(tmp_path / "data", name, short)
    with pytest.raises(DataError) as caught:
        make_benchmark(name, source, tmp_path / "out", tokenizer=small_tokenizer())
    message = str(caught.value)
    for part in (source.name, "row 1", NEEDED[name]):
        assert part in message, message
    assert not (tmp_path / "out").exists()


def test_every_reader(tmp_path: Path) -> None:
    tree = tmp_path / "LibriSpeech" / "84" / "1"
    tree.mkdir(parents=True)
    (tree / "84-1.trans.txt").write_text("84-1-0000 GO DO\n84-1-0001 HEAR\n")
    rows = list(read_rows(tmp_path / "LibriSpeech"))
    assert [(r.number, r.text("text"), r.root) for r in rows] == [
        (1, "GO DO", tree),
        (2, "HEAR", tree),
    ]
    dataset = datasets.Dataset.from_list([{"question": "?", "answer": "#### 1"}])
    datasets.DatasetDict({"test": dataset}).save_to_disk(str(tmp_path / "saved"))
    (found,) = read_rows(tmp_path / "saved", split="test")
    assert (found.file, found.number, found.text("question")) == ("test", 1, "?")
    with pytest.raises(DataError, match="splits test"):
        list(read_rows(tmp_path / "saved", split="train"))
    for name, text in (("a.jsonl", "{\n"), ("a.json", "3"), ("b.jsonl", "[]\n"), ("a.xml", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=r"corrupt_source|unknown_source"):
            list(read_rows(tmp_path / name))
    with pytest.raises(FileNotFoundError):
        list(read_rows(tmp_path / "nowhere"))


def test_nothing_is_overwritten_or_guessed(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no_samples"):
        make_benchmark("gsm8k", tmp_path / "empty.jsonl", tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="converters for"):
        make_benchmark("gsm9k", tmp_path / "empty.jsonl", tmp_path / "out", tokenizer=tokenizer)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        make_benchmark("gsm8k", tmp_path / "empty.jsonl", tmp_path / "out", tokenizer=tokenizer)
    missing = {"audio_id": "gone.wav", "question": "?", "choices": FOUR, "answer": "red"}
    (tmp_path / "m.jsonl").write_text(json.dumps(missing | {"task": "sound"}))
    with pytest.raises(DataError, match=r"missing_media: m\.jsonl, row 1.*gone\.wav"):
        make_benchmark("mmau", tmp_path / "m.jsonl", tmp_path / "new", tokenizer=tokenizer)
    wrong = {**missing, "answer": "grey", "task": "sound"}
    (tmp_path / "w.jsonl").write_text(json.dumps(wrong))
    with pytest.raises(DataError, match=r"w\.jsonl, row 1: answer 'grey'"):
        make_benchmark("mmau", tmp_path / "w.jsonl", tmp_path / "new", tokenizer=tokenizer)


def test_the_command_says_how_to_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "g.jsonl").write_text(json.dumps(ROWS["gsm8k"][0]))
    out = str(tmp_path / "out")
    given = ["data", "benchmark", "gsm8k", str(tmp_path / "g.jsonl"), out]
    assert main([*given, "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    assert "metric: relaxed_match" in capsys.readouterr().out
    assert main([*given, "--tokenizer", str(tmp_path / "tokenizer")]) == 2
