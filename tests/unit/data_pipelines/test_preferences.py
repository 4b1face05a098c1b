"""Which candidates become pairs and why not, and the files that are made of them."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk

from data_pipelines import preferences
from data_pipelines.demo_content import VOCABULARY
from data_pipelines.preferences import PairConfig, RecordingUse, build_pairs, choose_pairs
from launch.cli import main
from omni_train.config.errors import ConfigError, DataError
from omni_train.data.fetch import fetch
from omni_train.data.source import ShardSet
from omni_train.data.tokenizer import train_tokenizer
from omni_train.speech.codec import parse_codes
from omni_train.tracking import report_data
from tests.candidate_sets import content, write_candidates


def candidate(name: str, score: float | None, **values: Any) -> dict[str, Any]:
    heard = values.pop("heard", [score] if score is not None else [])
    judged = [{"wer": values.get("wer", s), "score": s} for s in heard]
    usual = {"name": name, "score": score, "num_codes": 20, "failure": None, "heard": judged}
    return {"key": "k", **usual, **values}


def reasons(rows: list[dict[str, Any]], **settings: Any) -> dict[tuple[str, str], str]:
    found = choose_pairs(rows, PairConfig(**settings))
    return {(p["chosen"]["name"], p["rejected"]["name"]): p["reason"] for p in found}


def test_the_widest_gaps_are_kept_and_an_answer_stands_in_one_pair() -> None:
    rows = [candidate(n, s) for n, s in (("a", 0.0), ("b", 0.3), ("c", 0.6), ("d", 1.0))]
    assert reasons(rows) == {
        ("a", "d"): "kept",
        ("b", "d"): "used_before",
        ("a", "c"): "used_before",
        # 0.3 is meant to be enough for 0.3.
        ("b", "c"): "kept",
        ("c", "d"): "used_before",
        ("a", "b"): "used_before",
    }
    assert reasons(rows, max_pairs=1)["b", "c"] == "enough_pairs"
    assert reasons(rows, min_gap=0.7)["b", "c"] == "small_gap"
    assert reasons(rows, max_chosen_score=0.2)["b", "c"] == "chosen_bad"


@pytest.mark.parametrize(
    ("better", "worse", "reason"),
    [
        ({"failure": "no_end"}, {}, "chosen_failed"),
        ({}, {"failure": "no_end"}, "kept"),
        ({}, {"num_codes": 0}, "rejected_empty"),
        ({}, {"num_codes": 41}, "length_ratio"),
        ({"num_codes": 41}, {}, "length_ratio"),
        ({}, {"num_codes": 40}, "kept"),
        ({"heard": [0.0, 0.2]}, {"heard": [1.0, 0.1]}, "recognizers_disagree"),
        ({"heard": [0.0, 0.2]}, {"heard": [1.0, 0.2]}, "recognizers_disagree"),
        ({"heard": [0.0, 0.2]}, {"heard": [1.0, 0.3]}, "kept"),
    ],
)
def test_each_guard(better: dict[str, Any], worse: dict[str, Any], reason: str) -> None:
    rows = [candidate("a", 0.0, **better), candidate("b", 1.0, **worse)]
    assert reasons(rows) == {("a", "b"): reason}


def test_what_has_no_score_is_in_no_pair() -> None:
    assert reasons([candidate("a", 0.0), candidate("b", None)]) == {}


def test_a_recording_is_left_out_or_competes_or_is_always_chosen() -> None:
    rows = [candidate("a", 0.0), candidate("b", 1.0), candidate("recording", 0.2)]
    assert set(reasons(rows)) == {("a", "b")}
    assert reasons(rows, recording=RecordingUse.may) == {
        ("a", "b"): "kept",
        ("recording", "b"): "used_before",
        ("a", "recording"): "small_gap",
    }
    assert reasons(rows, recording=RecordingUse.chosen) == {
        ("a", "b"): "not_recorded",
        ("recording", "b"): "kept",
        # Never against a better sample: the gap is negative.
        ("recording", "a"): "small_gap",
    }


def test_it_is_said_where_pauses_decide_the_order() -> None:
    rates = (("a", 0.0, 0.5), ("b", 0.4, 0.3), ("c", 0.9, 0.5))
    rows = [candidate(name, score, wer=wer) for name, score, wer in rates]
    pairs = choose_pairs(rows, PairConfig())
    found = {(p["chosen"]["name"], p["rejected"]["name"]): p["by_wer"] for p in pairs}
    assert found == {("a", "b"): "reversed", ("a", "c"): "tie", ("b", "c"): "same"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Candidates, their ranking and the pairs, by the command line."""
    root = tmp_path_factory.mktemp("pairs")
    write_candidates(root / "candidates")
    train_tokenizer(["say river doctor"], vocab_size=300).save_pretrained(str(root / "tokenizer"))
    asr = f"pocketsphinx:{','.join(VOCABULARY)}"
    rank = ["talker", "rank", str(root / "candidates"), str(root / "ranking"), "--asr", asr]
    assert main([*rank, "--pause-weight", "0.5", "--workers", "0"]) == 0
    assert main(pairs_command(root, root / "pairs")) == 0
    return root


def pairs_command(root: Path, out: Path, *extra: str) -> list[str]:
    places = [str(root / "candidates"), str(root / "ranking"), str(out)]
    return ["talker", "pairs", *places, "--tokenizer", str(root / "tokenizer"), *extra]


def test_pairs_are_shards_with_both_answers(made: Path) -> None:
    source = ShardSet("pairs", str(made / "pairs"))
    rows = [json.loads(line) for line in (made / "pairs" / "pairs.jsonl").read_text().splitlines()]
    kept = [row for row in rows if row["reason"] == "kept"]
    assert sum(source.counts) == len(kept) > 2
    assert {row["reason"] for row in rows} > {"kept"}
    for row in source.rows(0):
        raw = fetch(source.path_of(0), row, codes=True)
        pair = raw.record["pair"]
        assert row.speech is not None
        assert row.speech.text == raw.record["messages"][-1]["content"][0]["text"] == pair["text"]
        number = int(pair["chosen"].removeprefix("sample-"))
        codes = parse_codes(raw.media["chosen.codes.npy"], 100)
        assert codes.tolist() == list(range(len(codes)))
        assert len(codes) % 10 == number
        assert len(raw.record["rejected_codes"]) % 10 == int(pair["rejected"][-1])
        assert (pair["model"], pair["gap"] >= 0.3) == ("m", True)
    # The pause alone makes "river, doctor" better than "river doctor".
    summary = json.loads((made / "pairs" / "pairs.json").read_text())
    assert summary["pairs"] == len(kept)
    by_pauses = [r for r in rows if (r["chosen"], r["rejected"]) == ("sample-1", "sample-0")]
    assert [row["by_wer"] for row in by_pauses] == ["tie"]


def test_pairs_are_a_dataset_of_the_library(made: Path) -> None:
    dataset = load_from_disk(str(made / "pairs" / "dataset"))
    summary = json.loads((made / "pairs" / "pairs.json").read_text())
    assert len(dataset) == summary["pairs"]
    first = dataset[0]
    assert json.loads(first["prompt"])[0]["role"] == "user"
    assert first["chosen_score"] + first["gap"] == pytest.approx(first["rejected_score"])
    assert first["chosen_codes"] == list(range(len(first["chosen_codes"])))


def test_the_page_is_complete_in_itself_and_escaped(made: Path, tmp_path: Path) -> None:
    page = (made / "pairs" / "listen.html").read_text()
    assert page.count("data:audio/wav;base64,") == 2 * (page.count("<tr>") - 1) > 2
    assert "http:" not in page
    assert "river, doctor" in page
    heard_pairs = report_data.heard_pairs(made / "pairs")
    waves = [sound.uri for pair in heard_pairs for sound in (pair.chosen, pair.rejected)]
    assert [uri in page for uri in waves] == [True] * page.count("data:audio/wav;base64,")
    assert all(pair.chosen.wer <= pair.rejected.wer for pair in heard_pairs)
    evil = "</td><script>alert(1)</script>"
    heard = [{"raw": evil, "wer": 0.0, "pause_error": None}]
    row = {"key": evil, "speaker": evil, "text": evil, "gap": 1.0}
    entry = (row | {"chosen_heard": heard, "rejected_heard": heard}, [b"a", b"b"])
    shown = preferences.listening_page(iter([entry]))
    assert "<script" not in shown
    assert html.escape(evil) in shown


def test_killed_and_made_again_the_files_are_the_same(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(rows: list[dict[str, Any]], folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preferences, "_write_dataset", stop)
        with pytest.raises(KeyboardInterrupt):
            main(pairs_command(made, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert main(pairs_command(made, tmp_path / "out")) == 0
    before = content(tmp_path / "out")
    assert before == content(made / "pairs")
    # What is finished stays as it is.
    assert main(pairs_command(made, tmp_path / "out")) == 0
    assert content(tmp_path / "out") == before


def test_what_cannot_be_paired_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(pairs_command(made, made / "pairs", "--min-gap", "0.4")) == 2
    assert "holds other pairs" in capsys.readouterr().err
    assert main(pairs_command(made, tmp_path / "out", "--min-gap", "90")) == 65
    assert "no pair is kept" in capsys.readouterr().err
    assert main(pairs_command(made, tmp_path / "out", "--max-pairs", "0")) == 2
    other = write_candidates(tmp_path / "other", {"r9": ("river", ["river", "doctor"])})
    tokenizer = str(made / "tokenizer")
    with pytest.raises(DataError, match="ranks other candidates"):
        build_pairs(other, made / "ranking", tmp_path / "x", PairConfig(), tokenizer_dir=tokenizer)
    command = ["talker", "rank", "x", str(tmp_path / "y"), "--asr"]
    assert main([*command, "sphinx:a"]) == 2
    assert main([*command, "whisper"]) == 2
    with pytest.raises(ConfigError, match="min-gap"):
        PairConfig(min_gap=0.0)
