"""Lint and fix on sets with faults that were put there: every one is counted, and no other."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from data_pipelines.fix import fix_set
from data_pipelines.lint import LINT_NAME, Encoding, LintReport, Task, lint_set
from data_pipelines.lint_pool import check_all
from data_pipelines.shards import Sample, write_shards
from launch import cli
from omni_train.config.errors import ConfigError, DataError
from omni_train.data.index import (
    Manifest,
    describe_shard,
    index_path,
    read_index,
    read_manifest,
    write_index,
    write_manifest,
)
from omni_train.data.skiplist import read_skip_list, write_skip_list
from omni_train.data.stores import open_root
from omni_train.data.tokenizer import load_tokenizer, train_tokenizer
from omni_train.data.types import IndexRow, ProcessingConfig
from omni_train.models.config import ModelPreset
from omni_train.models.presets import build_config, model_spec

SHARD = "shard-000000.tar"


def encoding_of(corpus: Path) -> Encoding:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    spec = model_spec(build_config(ModelPreset.tiny, tokenizer).thinker_config, tokenizer)
    return Encoding(tokenizer, ProcessingConfig(video_min_pixels=3136), spec)


@pytest.fixture
def copied(corpus: Path, tmp_path: Path) -> Path:
    """A set of speech that a test may damage."""
    return Path(shutil.copytree(corpus / "heldout" / "asr", tmp_path / "asr"))


def lint(root: Path, corpus: Path, num_workers: int = 0) -> LintReport:
    return lint_set(root, encoding_of(corpus), num_workers=num_workers)


def index_anew(root: Path, rows: list[IndexRow]) -> None:
    """Make index and manifest fit the tar again, so that only the sample itself is wrong."""
    write_index(index_path(root / SHARD), rows)
    shard = describe_shard(root / SHARD, num_samples=len(rows))
    write_manifest(root, replace(read_manifest(root), shards=(shard,)))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def test_a_clean_set_is_clean_whatever_the_number_of_processes(corpus: Path, copied: Path) -> None:
    report = lint(copied, corpus)
    assert report.num_samples == len(read_index(index_path(copied / SHARD))) > 5
    assert (report.problems, report.unknown_files, report.failed) == ([], [], False)
    written = (copied / LINT_NAME).read_bytes()
    assert lint(copied, corpus, num_workers=2) == report
    assert (copied / LINT_NAME).read_bytes() == written


def test_a_flipped_byte_names_its_sample_and_its_shard(corpus: Path, copied: Path) -> None:
    rows = read_index(index_path(copied / SHARD))
    flip(copied / SHARD, rows[2].media[0].offset + rows[2].media[0].size // 2)
    flip(copied / SHARD, rows[5].json_offset + 3)
    report = lint(copied, corpus)
    assert report.reasons() == {"hash_mismatch": 2, "shard_hash_mismatch": 1}
    bad = {p.key for p in report.problems if p.reason == "hash_mismatch"}
    assert bad == {rows[2].key, rows[5].key}
    record = json.loads((copied / LINT_NAME).read_bytes())
    assert (record["failed"], record["num_bad_samples"]) == (True, 2)


def test_a_truncated_tar_loses_what_lies_behind_the_cut(corpus: Path, copied: Path) -> None:
    rows = read_index(index_path(copied / SHARD))
    cut = rows[4].media[0].offset + 10
    os.truncate(copied / SHARD, cut)
    lost = {
        row.key
        for row in rows
        if max(row.json_offset + row.json_size, *(m.offset + m.size for m in row.media)) > cut
    }
    report = lint(copied, corpus)
    assert report.reasons() == {"truncated": len(lost), "shard_hash_mismatch": 1}
    assert {p.key for p in report.problems if p.key} == lost
    assert 0 < len(lost) < len(rows)


def test_json_that_is_none_is_found_though_all_hashes_fit(corpus: Path, copied: Path) -> None:
    import xxhash

    rows = read_index(index_path(copied / SHARD))
    row = rows[1]
    flip(copied / SHARD, row.json_offset)
    data = (copied / SHARD).read_bytes()[row.json_offset : row.json_offset + row.json_size]
    row.json_xxh3 = xxhash.xxh3_64_hexdigest(data)
    rows[3].num_text_tokens += 1
    index_anew(copied, rows)
    report = lint(copied, corpus)
    assert [(p.key, p.reason) for p in report.problems] == [
        (row.key, "bad_json"),
        (rows[3].key, "wrong_tokens"),
    ]


def spoken(number: int, num_samples: int) -> Sample:
    sink = io.BytesIO()
    wave = np.sin(np.arange(num_samples) / 10).astype(np.float32)
    soundfile.write(sink, wave, 16000, format="WAV", subtype="PCM_16")
    user = [{"type": "audio", "audio": "0.wav"}, {"type": "text", "text": "Write."}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": "apple"},
    ]
    return Sample(f"s-{number}", {"messages": messages}, {"0.wav": sink.getvalue()})


def test_sound_too_short_for_a_token_is_empty_audio(corpus: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    samples = [spoken(0, 8000), spoken(1, 100), spoken(2, 4000)]
    write_shards(samples, tmp_path / "s", tokenizer=tokenizer, samples_per_shard=2)
    report = lint(tmp_path / "s", corpus)
    assert [(p.key, p.reason) for p in report.problems] == [("s-1", "empty_audio")]


def test_what_is_wrong_with_the_set_itself(corpus: Path, copied: Path) -> None:
    manifest = read_manifest(copied)
    (info,) = manifest.shards
    shutil.copy(copied / SHARD, copied / "shard-000001.tar")
    shutil.copy(index_path(copied / SHARD), copied / "shard-000001.parquet")
    second = replace(info, name="shard-000001.tar", num_samples=info.num_samples + 1)
    third = replace(info, name="shard-000002.tar", num_samples=0)
    write_manifest(copied, Manifest(tokenizer_hash=manifest.tokenizer_hash, shards=(
        replace(info, index_xxh3="0" * 16), second, third)))  # fmt: skip
    (copied / "notes.txt").write_text("mine")
    report = lint(copied, corpus)
    assert report.reasons() == {
        "duplicate_key": info.num_samples,
        "index_hash_mismatch": 1,
        "missing_index": 1,
        "missing_shard": 1,
        "wrong_count": 1,
    }
    assert report.unknown_files == ["notes.txt"]


def test_another_tokenizer_is_refused(corpus: Path, copied: Path) -> None:
    other = replace(encoding_of(corpus), tokenizer=train_tokenizer(["apple"], vocab_size=300))
    with pytest.raises(ConfigError, match="counts tokens with tokenizer"):
        lint_set(copied, other, num_workers=0)


def test_fix_writes_the_skip_list_and_lint_then_passes(corpus: Path, copied: Path) -> None:
    rows = read_index(index_path(copied / SHARD))
    flip(copied / SHARD, rows[2].media[0].offset + 100)
    with pytest.raises(FileNotFoundError, match="data lint"):
        fix_set(copied)
    write_skip_list(copied, {SHARD: {rows[0].key: "not wanted"}})
    before = {p.name: p.read_bytes() for p in copied.glob("shard-*")}
    assert lint(copied, corpus).failed
    report = fix_set(copied)
    assert (report.num_added, report.num_skipped, report.left) == (1, 2, [])
    assert read_skip_list(copied) == {
        SHARD: {rows[0].key: "not wanted", rows[2].key: "hash_mismatch"}
    }
    assert {p.name: p.read_bytes() for p in copied.glob("shard-*")} == before
    again = lint(copied, corpus)
    assert not again.failed
    assert Counter(p.skipped for p in again.problems) == {True: 2}
    assert fix_set(copied).num_added == 0


def test_fix_says_what_a_skip_list_cannot_mend(corpus: Path, copied: Path) -> None:
    # The last bytes are the tar's end mark: every sample is whole, the file is not.
    flip(copied / SHARD, (copied / SHARD).stat().st_size - 1)
    assert lint(copied, corpus).reasons() == {"shard_hash_mismatch": 1}
    assert [p.reason for p in fix_set(copied).left] == ["shard_hash_mismatch"]
    index_anew(copied, read_index(index_path(copied / SHARD)))
    with pytest.raises(DataError, match="stale_lint"):
        fix_set(copied)


@pytest.mark.parametrize("text", ["[", "{}", '{"schema_version": 1, "skip": {"a.tar": ["k"]}}'])
def test_a_damaged_skip_list_is_never_an_empty_one(tmp_path: Path, text: str) -> None:
    assert read_skip_list(tmp_path) == {}
    (tmp_path / "skip.json").write_text(text)
    with pytest.raises(DataError, match="corrupt_skip_list"):
        read_skip_list(tmp_path)


def test_commands_end_with_their_exit_codes(
    corpus: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = ["--tokenizer", str(corpus / "tokenizer")]
    command = ["data", "lint", str(copied), "--workers", "0", *tokenizer]
    assert cli.main(command) == 0
    assert "clean" in capsys.readouterr().out
    rows = read_index(index_path(copied / SHARD))
    flip(copied / SHARD, rows[1].media[0].offset + 50)
    assert cli.main(command) == 65
    assert "hash_mismatch" in capsys.readouterr().out
    assert cli.main([*command, "--json"]) == 65
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((copied / LINT_NAME).read_bytes())
    assert cli.main(["data", "fix", str(copied), "--json"]) == 0
    assert cli.main(command) == 0
    assert cli.main(["data", "lint", str(copied / "none"), *tokenizer]) == 66
    assert cli.main(["data", "lint", str(copied)]) == 2
    assert "--tokenizer" in capsys.readouterr().err
    assert cli.main([*command, "--processing", "video_fsp=4"]) == 2
    assert "did you mean video_fps?" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["lint", "info", "fix", "show"])
def test_every_command_shows_examples(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", action, "--help"])
    assert ended.value.code == 0
    assert "examples:\n  omni-train data" in capsys.readouterr().out


def crash_on_third(task: Task, shared: str) -> list[str]:
    """Stand-in for a decoder that takes its process along."""
    for row in task.rows:
        if row.key == "k3":
            os._exit(11)
    return [f"{shared} {row.key}" for row in task.rows]


def test_a_sample_that_kills_its_process_is_named_and_the_rest_is_checked() -> None:
    rows = [IndexRow(f"k{number}", 0, 0, "", [], 0, 0) for number in range(8)]
    tasks = iter([Task(open_root(Path("a")), "a.tar", tuple(rows[at : at + 4])) for at in (0, 4)])
    found = [
        text
        for _, texts in check_all(
            tasks, crash_on_third, lambda task: [f"died {task.rows[0].key}"], "ok", num_workers=1
        )
        for text in texts
    ]
    assert sorted(found) == sorted(
        ["died k3", *(f"ok k{number}" for number in range(8) if number != 3)]
    )
