"""Scores of sampled replies: what each is, what fails and why; a restart changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.demo_content import VOCABULARY
from omni_train.config.errors import ConfigError, DataError
from omni_train.data.candidates import read_rows
from omni_train.preferences import ranking
from omni_train.preferences.ranking import RankConfig, rank
from omni_train.speech.asr import AsrConfig, AsrKind
from tests.candidate_sets import content, write_candidates

ASR = AsrConfig(kind=AsrKind.pocketsphinx, vocabulary=list(VOCABULARY))
CONFIG = RankConfig(recognizers=[ASR], pause_weight=0.5)


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_candidates(tmp_path_factory.mktemp("made") / "candidates")


@pytest.fixture(scope="module")
def ranked(candidates: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranked") / "out"
    rank(candidates, out, CONFIG, num_workers=0)
    return out


def rows(out: Path, shard: int) -> list[dict[str, Any]]:
    return list(read_rows(out / f"shard-{shard:06d}.jsonl"))


def test_score_is_the_weighted_sum_and_everything_is_kept(ranked: Path) -> None:
    plain, paused, other, silent = rows(ranked, 0)
    assert [row["heard"][0]["wer"] for row in (plain, paused, other)] == [0.0, 0.0, 1.0]
    # The text has a comma; one voice pauses there, the other does not.
    assert (plain["heard"][0]["pause_error"], plain["score"]) == (1.0, 0.5)
    assert (paused["heard"][0]["pause_error"], paused["score"]) == (0.0, 0.0)
    # A failed reply: all words wrong, no boundary to be placed, and the failure itself.
    assert silent["score"] == 1.0 + 0.5 + 1.0
    heard = other["heard"][0]
    assert (heard["raw"], heard["normalized"]) == ("paper window", "paper window")
    assert (heard["reference"], heard["recognizer"]) == ("river doctor", "pocketsphinx")
    job = json.loads((ranked / "job.json").read_text())
    assert job["recognizers"][0]["revision"]
    assert job["settings"]["normalizer"] == "seed_tts"


def test_empty_reference_silence_and_endless_samples_are_in_the_ledger(ranked: Path) -> None:
    lines = (ranked / "ledger.jsonl").read_text().splitlines()
    found = {(e["key"], e["name"]): e["reason"] for e in map(json.loads, lines)}
    assert found["r0", "sample-3"].startswith("empty: the wave is silent")
    assert found["r1", "sample-2"].startswith("no_end: ")
    assert found["r1", "sample-3"].startswith("empty: the wave is silent")
    assert found["r2", "sample-0"].startswith("empty_reference: ")
    assert set(found) >= {("r2", "sample-1")}
    assert all(row["score"] is None for row in rows(ranked, 2))
    summary = json.loads((ranked / "ranking.json").read_text())
    assert summary["failures"] == {"empty": 2, "empty_reference": 2, "no_end": 1}
    assert (summary["candidates"], summary["scored"]) == (14, 12)


def test_stopped_and_started_again_gives_the_same_files(
    candidates: Path, ranked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real, done = tmp_path / "out", ranking._rank_shard, []

    def stop(job: Any) -> str:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job)
        return real(job)

    monkeypatch.setattr(ranking, "_rank_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        rank(candidates, out, CONFIG, num_workers=0)
    assert not (out / "ranking.json").exists()
    made: list[str] = []
    monkeypatch.setattr(ranking, "_rank_shard", real)
    rank(candidates, out, CONFIG, num_workers=0, report=made.append)
    # What was there is not heard again.
    assert len(made) == 2
    assert content(out) == content(ranked)


@pytest.mark.slow
def test_workers_change_nothing(candidates: Path, ranked: Path, tmp_path: Path) -> None:
    rank(candidates, tmp_path / "out", CONFIG, num_workers=2)
    assert content(tmp_path / "out") == content(ranked)


def test_two_recognizers_are_both_kept_and_averaged(candidates: Path, tmp_path: Path) -> None:
    few = AsrConfig(kind=AsrKind.pocketsphinx, vocabulary=["river", "apple", "garden"])
    rank(candidates, tmp_path / "out", RankConfig(recognizers=[ASR, few]), num_workers=0)
    for row in rows(tmp_path / "out", 1):
        one, other = row["heard"]
        assert row["score"] == (one["score"] + other["score"]) / 2
    job = json.loads((tmp_path / "out" / "job.json").read_text())
    assert [r["grammar"] for r in job["recognizers"]][1] == "apple,garden,river"


def test_other_settings_other_files_and_damage_are_refused(
    candidates: Path, ranked: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="other candidates or with other settings"):
        rank(candidates, ranked, RankConfig(recognizers=[ASR]), num_workers=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match="holds other files"):
        rank(candidates, tmp_path / "mine", CONFIG, num_workers=0)
    with pytest.raises(DataError, match="not finished"):
        rank(tmp_path / "mine", tmp_path / "out", CONFIG, num_workers=0)
    damaged = write_candidates(tmp_path / "damaged")
    with (damaged / "shard-000001.tar").open("r+b") as file:
        file.seek(1000)
        file.write(b"x")
    with pytest.raises(DataError, match="hash_mismatch"):
        rank(damaged, tmp_path / "out", CONFIG, num_workers=0)


@pytest.mark.parametrize(
    "values",
    [
        {"recognizers": []},
        {"recognizers": [ASR] * 3},
        {"recognizers": [ASR], "wer_weight": 0.0},
        {"recognizers": [ASR], "pause_weight": -1.0},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RankConfig(**values)
