"""A recording of eight minutes and a long clip, from a source to the loader's packs, whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from data_pipelines.merge import merge
from data_pipelines.prepare import Part, prepare
from omni_train.data.config import DataConfig, SourceConfig
from omni_train.data.loader import PlannedLoader
from omni_train.data.split import RATE_HZ
from omni_train.data.types import ProcessingConfig
from omni_train.speech.mel import log_mel, num_mel_frames
from tests.unit.data.clips import clip, every, wav
from tests.unit.data.samples import SPEC, TOKENIZER
from tests.unit.data_pipelines.sourcing import job, write_lines

SECONDS = 481.3
BUDGET = 2048


def sweep(seconds: float) -> np.ndarray:
    """No stretch of it is like another."""
    time = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    return (0.3 * np.sin(2 * np.pi * (300 + 2 * time) * time)).astype(np.float32)


def words(seconds: float, each_s: float) -> list[dict[str, Any]]:
    """A word in every stretch of so many seconds, never over a whole even second."""
    starts = np.arange(0.2, seconds - each_s, each_s)
    return [
        {"start_s": round(float(s), 3), "end_s": round(float(s) + 0.6, 3), "text": f"w{n}."}
        for n, s in enumerate(starts)
    ]


def make_set(folder: Path, rows: list[dict[str, Any]]) -> Path:
    TOKENIZER.save_pretrained(str(folder / "tokenizer"))
    made = job(
        write_lines(folder / "in.jsonl", rows), folder / "set", folder / "tokenizer", "jsonl"
    )
    prepare(made, part=Part(), num_workers=0, report=lambda *_: None)
    assert merge(folder / "set").rejected == {}
    return folder / "set"


def packs(root: Path, ledger: list[Any], **settings: Any) -> list[Any]:
    config = DataConfig(
        sources={"talks": SourceConfig(path=str(root), max_epochs=1)},
        pack_tokens=BUDGET,
        global_batch_packs=1,
        num_workers=0,
        **settings,
    )
    loader = PlannedLoader(
        config,
        tokenizer=TOKENIZER,
        spec=SPEC,
        rank=0,
        world_size=1,
        seed=0,
        ledger=lambda **row: ledger.append(row),
    )
    return [batch for item in loader.steps() for batch in item.micro_batches if batch.keys]


def said_in(batch: Any) -> list[str]:
    return re.findall(r"w\d+\.", TOKENIZER.decode(batch.target_ids))


@pytest.mark.parametrize("container", ["WAV", "FLAC"])
def test_eight_minutes_of_sound_arrive_in_parts(tmp_path: Path, container: str) -> None:
    name, said = f"talk.{container.lower()}", words(SECONDS, 1.0)
    (tmp_path / name).write_bytes(wav(sweep(SECONDS), container=container))
    rows = [
        {"audio": name, "task": "asr", "segments": said},
        {"audio": name, "task": "asr", "text": "w9999."},
    ]
    root, ledger = make_set(tmp_path, rows), []
    batches = packs(root, ledger)
    assert [row["key"] for row in ledger] == ["set-000000002"]
    keys = sorted(key for batch in batches for key in batch.keys)
    assert keys == [f"set-000000001-{n:04d}" for n in range(len(keys))]
    # 25 tokens of sound and about 5 of text a second.
    assert 7 <= len(keys) <= 10
    assert all(not batch.bad and batch.num_tokens <= BUDGET for batch in batches)
    found = sorted(
        (word for batch in batches for word in said_in(batch)), key=lambda w: int(w[1:-1])
    )
    assert found == [s["text"] for s in said]
    # Each part's sound is the stretch of its words, to the block and in the features themselves.
    read, _ = soundfile.read(tmp_path / name, dtype="float32")
    whole = torch.from_numpy(read)
    heard = 0
    for batch in sorted(batches, key=lambda b: b.keys):
        assert len(batch.keys) == 1
        start = heard
        assert start % (2 * RATE_HZ) == 0
        mel_frames = int(batch.mel_lengths[0])
        numbers = [int(word[1:-1]) for word in said_in(batch)]
        assert start / RATE_HZ <= said[numbers[0]]["start_s"] < start / RATE_HZ + 1
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        stop = min(start + -(-mel_frames // 200) * 2 * RATE_HZ, len(whole))
        assert mel_frames == num_mel_frames(stop - start)
        wanted = log_mel(whole[start:stop], SPEC.num_mel_bins)
        given = batch.mel_chunks.transpose(1, 2).reshape(-1, SPEC.num_mel_bins)[:mel_frames].T
        assert (given - wanted).abs().max() < 1e-5
        heard = stop
    assert heard == len(whole)


def test_a_long_clip_arrives_in_parts_with_pictures_sound_and_words(tmp_path: Path) -> None:
    said = words(100, 2.0)
    film = clip(every(4, 400), sound=sweep(100), moving=True, codec_options={"g": "20"})
    (tmp_path / "talk.mp4").write_bytes(film)
    rows = [
        {"video": "talk.mp4", "task": "asr", "segments": said},
        {"video": "talk.mp4", "task": "asr", "text": "w9999."},
    ]
    small = ProcessingConfig(video_min_pixels=28 * 28, video_max_pixels=84 * 84)
    root, ledger = make_set(tmp_path, rows), []
    batches = packs(root, ledger, processing=small)
    assert [row["key"] for row in ledger] == ["set-000000002"]
    assert all(not batch.bad and batch.num_tokens <= BUDGET for batch in batches)
    assert len(batches) >= 2
    batches.sort(key=lambda batch: batch.keys)
    assert [word for batch in batches for word in said_in(batch)] == [s["text"] for s in said]
    # Two frames a second and one patch in time of both, and all of the sound, which aac makes 40 ms
    # longer: as of the whole.
    assert sum(int(batch.grid_thw[0, 0]) for batch in batches) == 100
    assert sum(int(batch.mel_lengths.sum()) for batch in batches) == 10_004
    assert all(int(batch.mel_lengths[0]) % 200 == 0 for batch in batches[:-1])
    record = json.loads((root / "prepare" / "000000.json").read_text())
    assert record["shard"]["num_samples"] == 2
