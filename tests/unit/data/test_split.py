"""Long recordings in parts: whole, on block boundaries, with the words that are spoken in them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.shards import Sample, write_shards
from omni_train.config.errors import DataError
from omni_train.data.chatml import count_text_tokens
from omni_train.data.config import DataConfig, SourceConfig
from omni_train.data.loader import PlannedLoader
from omni_train.data.media import decode_audio
from omni_train.data.split import BLOCK_S, RATE_HZ, Part, can_split, cut, split_recording
from omni_train.data.types import IndexRow, ProcessingConfig, RawSample
from tests.unit.data.clips import tone, wav
from tests.unit.data.samples import SPEC, TOKENIZER, raw_sample

BUDGET = 300


def record(seconds: float, *, gap_s: float = 0.3, word_s: float = 0.7) -> dict[str, Any]:
    """A recording of one word a second, each with its time."""
    segments = [
        {"start_s": n + gap_s, "end_s": n + gap_s + word_s, "text": f"word{n}"}
        for n in range(int(seconds))
    ]
    content = [
        {"type": "audio", "audio": "0.wav"},
        {"type": "text", "text": "which words"},
    ]
    reply = " ".join(s["text"] for s in segments)
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
    return {"messages": messages, "segments": segments, "task": "asr"}


def sample(seconds: float, rate_hz: int = RATE_HZ) -> RawSample:
    given = record(seconds)
    raw = raw_sample(given["messages"], {"0.wav": wav(tone(seconds, rate_hz), rate_hz)})
    raw.record = given
    raw.row.task = "asr"
    return raw


def count(messages: Any) -> tuple[int, int]:
    return count_text_tokens(messages, TOKENIZER)


def parts_of(raw: RawSample, budget: int = BUDGET) -> list[Part]:
    return split_recording(raw.record, raw.row, budget, count, ProcessingConfig(), SPEC)


def test_parts_are_the_whole_recording_on_block_boundaries_with_its_words() -> None:
    raw = sample(20.5)
    parts = parts_of(raw)
    assert len(parts) > 1
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == round(20.5 * RATE_HZ)
    assert all(part.start % (BLOCK_S * RATE_HZ) == 0 for part in parts)
    assert " ".join(part.text for part in parts) == raw.record["messages"][-1]["content"]
    for part in parts:
        first, last = part.text.split()[0], part.text.split()[-1]
        assert part.start <= (int(first[4:]) + 0.3) * RATE_HZ
        assert (int(last[4:]) + 1.0) * RATE_HZ <= part.stop


def test_a_part_is_heard_as_the_same_stretch_of_the_whole() -> None:
    raw = sample(20.5, rate_hz=22_050)
    whole = decode_audio(raw.media["0.wav"], raw.row.media[0])
    pieces = [cut(raw, part) for part in parts_of(raw)]
    heard = [decode_audio(p.media["0.wav"], p.row.media[0]) for p in pieces]
    assert [len(wave) for wave in heard] == [part.stop - part.start for part in parts_of(raw)]
    # The resampler computes in float32, in another order.
    assert torch.allclose(torch.cat(heard), whole, rtol=0, atol=1e-6)
    assert [p.record["messages"][-1]["content"] for p in pieces] == [p.text for p in parts_of(raw)]
    assert len({p.row.key for p in pieces}) == len(pieces)


def test_no_cut_inside_a_word() -> None:
    raw = sample(12)
    # One word lasts from 1.5 s to 6.5 s: no boundary at 2, 4 or 6 s.
    raw.record["segments"][1]["start_s"] = 1.5
    raw.record["segments"][1]["end_s"] = 6.5
    for number in range(2, 7):
        raw.record["segments"][number]["start_s"] = 6.6
        raw.record["segments"][number]["end_s"] = 6.9
    assert 2 * BLOCK_S * RATE_HZ not in {part.start for part in parts_of(raw)}
    assert {2, 4, 6}.isdisjoint({part.start / RATE_HZ for part in parts_of(raw)})


# Twice as late as they are said, as in a list of times in another unit.
LATE = [
    {"start_s": 2 * s["start_s"], "end_s": 2 * s["end_s"], "text": s["text"]}
    for s in record(20)["segments"]
]


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"segments": []}, "without segments"),
        ({"segments": [{"start_s": 0.0, "end_s": 1.0, "text": "another"}]}, "not the reply"),
        ({"segments": {"start_s": 0.0}}, "not a list"),
        ({"segments": ["Hi"]}, "segment 1 is no object"),
        ({"segments": [{"start": 0.0}]}, "no numbers"),
        ({"segments": [{"start_s": 0.0, "end_s": True, "text": "Hi"}]}, "no numbers"),
        ({"segments": [{"start_s": 2.0, "end_s": 1.0, "text": "Hi"}]}, "lasts from 2.0 to 1.0 s"),
        ({"segments": [{"start_s": 0.0, "end_s": math.inf, "text": "Hi"}]}, "to inf s"),
        ({"segments": [{"start_s": 0.0, "end_s": 30.0, "text": None}]}, "has the text None"),
        ({"segments": [*record(3)["segments"], record(3)["segments"][0]]}, "segment 4 begins"),
        ({"segments": LATE}, "begins at 38.6 s"),
    ],
)
def test_what_cannot_be_split_is_over_budget(change: dict[str, Any], detail: str) -> None:
    raw = sample(20.5)
    raw.record.update(change)
    with pytest.raises(DataError, match=detail) as caught:
        parts_of(raw)
    assert caught.value.reason == "over_budget"


def test_only_recordings_for_recognition_are_split() -> None:
    row = sample(4).row
    assert can_split(row)
    row.task = "caption"
    assert not can_split(row)
    assert not can_split(IndexRow("k", 0, 0, "", [], 5, 1, task="asr"))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_loader_delivers_every_part_once_and_reports_the_rest(
    tmp_path: Path, num_workers: int
) -> None:
    plain = record(20)
    del plain["segments"]
    samples = [
        Sample("long", record(20), {"0.wav": wav(tone(20, RATE_HZ))}),
        Sample("plain", plain, {"0.wav": wav(tone(20, RATE_HZ))}),
        Sample("short", record(2), {"0.wav": wav(tone(2, RATE_HZ))}),
    ]
    write_shards(samples, tmp_path / "set", tokenizer=TOKENIZER, samples_per_shard=10)
    ledger: list[dict[str, str]] = []
    loader = PlannedLoader(
        DataConfig(
            sources={"a": SourceConfig(path=str(tmp_path / "set"), max_epochs=1)},
            pack_tokens=BUDGET,
            global_batch_packs=2,
            num_workers=num_workers,
        ),
        tokenizer=TOKENIZER,
        spec=SPEC,
        rank=0,
        world_size=1,
        seed=0,
        ledger=lambda **row: ledger.append(row),
    )
    batches = [batch for item in loader.steps() for batch in item.micro_batches]
    assert all(batch.num_tokens <= BUDGET and not batch.bad for batch in batches)
    keys = sorted(key for batch in batches for key in batch.keys)
    number = len([key for key in keys if key.startswith("long-")])
    assert number > 1
    assert keys == [*(f"long-{n:04d}" for n in range(number)), "short"]
    assert [row["key"] for row in ledger] == ["plain"]
    assert ledger[0]["reason"].startswith("over_budget")
    assert ledger[0]["reason"].endswith("without segments")
    json.dumps(loader.state())
    assert sum(len(b.mel_lengths) for b in batches if b.keys) == number + 1
    assert np.all([b.num_target_tokens > 0 for b in batches if b.keys])
