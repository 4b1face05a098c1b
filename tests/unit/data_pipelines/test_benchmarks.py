"""Every benchmark's converter on a row of its documented layout, and what a bad row is told."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import soundfile

from data_pipelines.benchmarks.base import Row
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
from tests.unit.data_pipelines.benchmark_rows import FOUR, INNER, NEEDED, PICTURE, ROWS, lay_out


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
    wanted += INNER.get(name, 0)
    assert len(raw.media) == wanted
    messages, meta = raw.record["messages"], raw.record["meta"]
    assert messages[-1] == {"role": "assistant", "content": reply}
    benchmark = BENCHMARKS[name]
    values = []
    # Where others judge, only silence is worse.
    wrong_reply = "" if benchmark.metric == "answered" else "nothing of the kind"
    for said in (reply, wrong_reply):
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
        assert right == pytest.approx(100.0 if benchmark.metric == "bleu" else 1.0)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_missing_field_is_named_with_file_and_row(name: str, tmp_path: Path) -> None:
    row, _, _ = ROWS[name]
    short = {key: value for key, value in row.items() if key != NEEDED[name]}
    (tmp_path / "data").mkdir()
    source = lay_out(tmp_path / "data", name, short)
    with pytest.raises(DataError) as caught:
        make_benchmark(name, source, tmp_path / "out", tokenizer=small_tokenizer())
    message = str(caught.value)
    file = "1092771.LOFI.bpm" if name == "giantsteps" else source.name
    for part in (file, "row 1", NEEDED[name]):
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


def refusal(name: str, folder: Path, **changed: Any) -> str:
    """What is said of a row with other values in it."""
    folder.mkdir()
    source = lay_out(folder, name, {**ROWS[name][0], **changed})
    with pytest.raises(DataError) as caught:
        make_benchmark(name, source, folder / "out", tokenizer=small_tokenizer())
    return str(caught.value)


def test_values_that_fit_no_benchmark_are_named(tmp_path: Path) -> None:
    changes: list[tuple[str, dict[str, Any], str]] = [
        ("wenetspeech", {"end_time": 0.1}, "'begin_time' and 'end_time'"),
        ("wenetspeech", {"begin_time": 5.0, "end_time": 6.0}, "no sound"),
        ("wenetspeech", {"path": "gone.opus"}, "no file gone.opus"),
        ("giantsteps", {"tempo": "0.0"}, "no tempo"),
        ("giantsteps", {"tempo": "fast"}, "no number"),
        ("mmbench", {"answer": "C"}, "none of AB"),
        ("mmbench", {"image": "12"}, "another row"),
        ("mmbench", {"image": "no picture!"}, "no base64"),
        ("mmbench", {"B": ""}, "'A' or 'B' is missing"),
        ("muirbench", {"image_list": [PICTURE]}, "2 places for 1 pictures"),
        ("muirbench", {"image_list": "a.png"}, "no list"),
        ("mmmu_pro", {"options": "A or B"}, "'options' is no list"),
        ("mathvista", {"answer": "grey"}, "none of"),
        ("egoschema", {"answer": "2"}, "no number of an option"),
        ("math", {"solution": "It is \\boxed{1"}, "no \\boxed"),
        ("mmlu_redux", {"answer": 4}, "no number of a choice"),
    ]
    for number, (name, changed, said) in enumerate(changes):
        message = refusal(name, tmp_path / str(number), **changed)
        assert said in message, message
        assert "row 1" in message, message


def test_a_segment_is_cut_out_of_its_recording(tmp_path: Path) -> None:
    row, _, _ = ROWS["wenetspeech"]
    source = lay_out(tmp_path, "wenetspeech", row)
    assert list(read_rows(source, split="TEST_MEETING")) == []
    (found,) = read_rows(source, split="TEST_NET")
    _, sound = BENCHMARKS["wenetspeech"].convert(found).content[0]
    samples, rate = soundfile.read(io.BytesIO(sound["bytes"]))
    assert len(samples) / rate == pytest.approx(0.15, abs=0.001)
    source.write_text(json.dumps({"audios": [{"path": "a.opus"}]}))
    with pytest.raises(DataError, match=r"WenetSpeech\.json, row 1: no list of `segments`"):
        list(read_rows(source))


def test_pictures_stand_where_the_text_has_their_places(tmp_path: Path) -> None:
    source = lay_out(tmp_path, "muirbench", ROWS["muirbench"][0])
    (row,) = read_rows(source)
    content = BENCHMARKS["muirbench"].convert(row).content
    shapes = [item if isinstance(item, str) else item[0].name for item in content]
    assert shapes[:4] == ["image", "Like?\nA. ", "image", shapes[3]]
    assert shapes[3].startswith("\nB. none")


def test_open_questions_of_sets_that_also_have_choices(tmp_path: Path) -> None:
    def converted(name: str, **changed: Any) -> Any:
        values = {**ROWS[name][0], **changed}
        return BENCHMARKS[name].convert(Row("f", 1, values, tmp_path))

    free = {"question_type": "free_form", "choices": None, "answer": "1.5"}
    asked = converted("mathvista", **free, unit="cm", precision=1.0)
    assert asked.references == ["1.5"]
    assert "Unit: cm." in asked.content[1]
    assert "1 decimal places" in asked.content[1]
    closed = converted("mathvision", options=FOUR, answer="B")
    assert closed.references == ["B", "blue"]


def test_a_tsv_has_quotes_only_where_its_benchmark_says(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    long = "x" * 200_000
    file.write_text(f'image\ttext\n{long}\t"He said\n""no"""\n')
    (row,) = read_rows(file, quoted=True)
    assert (len(row.text("image")), row.text("text")) == (200_000, 'He said\n"no"')
    file.write_text('text\n"Go" he said\n')
    (row,) = read_rows(file)
    assert row.text("text") == '"Go" he said'


def test_the_command_says_how_to_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "g.jsonl").write_text(json.dumps(ROWS["gsm8k"][0]))
    out = str(tmp_path / "out")
    given = ["data", "benchmark", "gsm8k", str(tmp_path / "g.jsonl"), out]
    assert main([*given, "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    assert "metric: relaxed_match" in capsys.readouterr().out
    assert main([*given, "--tokenizer", str(tmp_path / "tokenizer")]) == 2
