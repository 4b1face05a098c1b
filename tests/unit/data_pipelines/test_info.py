"""Totals from the index equal a count by hand over what encoding gives."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.info import collect_info, modality
from launch import cli
from omni_train.data.encode import encode
from omni_train.data.fetch import fetch
from omni_train.data.index import index_path, read_index, read_manifest
from omni_train.data.skiplist import write_skip_list
from omni_train.data.types import IGNORE_INDEX, IndexRow, MediaInfo, MediaKind
from tests.unit.data_pipelines.test_lint import encoding_of

SUBSETS = ("text", "asr", "caption", "av", "dialogue")


def test_totals_equal_a_count_over_encoded_samples(corpus: Path) -> None:
    roots = [corpus / "heldout" / name for name in SUBSETS]
    how = encoding_of(corpus)
    info = collect_info(roots, how)
    samples: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    targets, hours, lengths = 0, 0.0, []
    for root in roots:
        for shard in read_manifest(root).shards:
            for row in read_index(index_path(root / shard.name)):
                sample = encode(fetch(root / shard.name, row), how.tokenizer, how.config, how.spec)
                for name in (f"task {row.task}", f"speaker {row.speaker}", "all"):
                    samples[name] += 1
                    tokens[name] += sample.num_tokens
                targets += int((sample.labels != IGNORE_INDEX).sum())
                hours += sum(medium.duration_us for medium in row.media) / 3.6e9
                lengths.append(sample.num_tokens)
    assert info.total.samples == samples["all"] > 50
    assert info.total.tokens == tokens["all"]
    assert info.total.target_tokens == targets
    assert info.total.hours == pytest.approx(hours)
    for group in ("task", "speaker"):
        for value, totals in info.groups[group].items():
            name = f"{group} {value}"
            assert (totals.samples, totals.tokens) == (samples[name], tokens[name])
    for values in info.groups.values():
        assert sum(totals.tokens for totals in values.values()) == tokens["all"]
    assert sorted(info.lengths.tolist()) == sorted(lengths)
    for low, high, count in info.histogram():
        assert count == sum(low <= length < high for length in lengths)
    assert sum(count for _, _, count in info.histogram()) == len(lengths)
    assert info.quantiles()["max"] == max(lengths)


def test_the_histogram_keeps_lengths_on_its_borders() -> None:
    from data_pipelines.info import Info

    info = Info(lengths=np.array([1, 2, 3, 4, 127, 128], dtype=np.int64))
    counts = {low: count for low, _, count in info.histogram()}
    assert counts == {1: 1, 2: 2, 4: 1, 8: 0, 16: 0, 32: 0, 64: 1, 128: 1}
    assert Info().histogram() == []


@pytest.mark.parametrize(
    ("media", "name"),
    [
        ([], "text"),
        ([MediaInfo(MediaKind.image, "0.png")], "image"),
        ([MediaInfo(MediaKind.audio, "0.wav", has_audio=True)], "audio"),
        ([MediaInfo(MediaKind.video, "0.mp4", has_audio=True)], "audio-video"),
        ([MediaInfo(MediaKind.video, "0.mp4", has_audio=True, use_audio=False)], "video"),
        ([MediaInfo(MediaKind.video, "0.mp4")], "video"),
        (
            [MediaInfo(MediaKind.image, "0.png"), MediaInfo(MediaKind.audio, "1.wav")],
            "audio+image",
        ),
    ],
)
def test_modality(media: list[MediaInfo], name: str) -> None:
    assert modality(IndexRow("k", 0, 0, "", media, 1, 1)) == name


def test_the_command_opens_no_tar(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "av"
    root.mkdir()
    for path in (corpus / "heldout" / "av").iterdir():
        if path.suffix != ".tar":
            (root / path.name).write_bytes(path.read_bytes())
    (row, *_) = read_index(root / "shard-000000.parquet")
    write_skip_list(root, {"shard-000000.tar": {row.key: "not wanted", "gone": "not there"}})
    command = ["data", "info", str(root), "--tokenizer", str(corpus / "tokenizer")]
    assert cli.main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["total"]["samples"] == read_manifest(root).num_samples
    assert record["skipped"] == 1
    assert set(record["by_modality"]) == {"audio-video", "video"}
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "audio-video" in out
    assert "#" in out
