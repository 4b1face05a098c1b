"""The alignment probe: what is asked at which token, and what the three arms have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.demo_content import COLORS
from omni_train.data.alignment import Arm, ProbeMaker
from omni_train.data.encode import encode
from omni_train.data.fetch import fetch
from omni_train.data.source import ShardSet
from omni_train.data.stores import Store
from omni_train.data.tokenizer import encode_text, load_tokenizer
from omni_train.data.types import Batch, EncodedSample, ModelSpec, ProcessingConfig
from omni_train.data.work import PlannedSample
from tests.numerics.samples import small_config

PROCESSING = ProcessingConfig(video_fps=4.0, video_min_pixels=3136)


@pytest.fixture(scope="module")
def spec(corpus: Path) -> ModelSpec:
    return small_config(load_tokenizer(corpus / "tokenizer"))[1]


@pytest.fixture(scope="module")
def clips(corpus: Path) -> list[PlannedSample]:
    shards = ShardSet("av", str(corpus / "train" / "av"))
    rows = [row for row in shards.rows(0) if row.media[0].has_audio][:8]
    return [PlannedSample("av", shards.path_of(0), row, None) for row in rows]


def make(corpus: Path, spec: ModelSpec, arm: Arm) -> ProbeMaker:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    return ProbeMaker(tokenizer, PROCESSING, spec, Store(), arm=arm)


def batch_of(corpus: Path, spec: ModelSpec, arm: Arm, clips: list[PlannedSample]) -> Batch:
    batch: Batch = make(corpus, spec, arm)(clips, lambda number: None)
    assert not batch.bad
    return batch


def color_ids(corpus: Path) -> dict[str, int]:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    return {color: encode_text(tokenizer, color)[0] for color in COLORS}


def test_colours_have_tokens_of_their_own(corpus: Path) -> None:
    assert len(set(color_ids(corpus).values())) == len(COLORS)


@pytest.mark.parametrize("arm", list(Arm))
def test_every_audio_token_is_asked_for_the_colour_at_its_time(
    corpus: Path, spec: ModelSpec, clips: list[PlannedSample], arm: Arm
) -> None:
    ids = color_ids(corpus)
    asked = 0
    for clip in clips:
        batch = batch_of(corpus, spec, arm, [clip])
        meta: dict[str, Any] = fetch(clip.shard, clip.row).record["meta"]
        audio = torch.nonzero(batch.input_ids[0] == spec.tokens.audio).squeeze(1).tolist()
        wanted = {}
        for number, place in enumerate(audio):
            time_s = 0.04 * number + 0.02
            shown = [s["color"] for s in meta["slots"] if s["start_s"] <= time_s < s["end_s"]]
            if shown:
                wanted[place] = ids[shown[0]]
        assert dict(zip(batch.target_index.tolist(), batch.target_ids.tolist(), strict=True)) == (
            wanted
        )
        asked += len(wanted)
    assert asked > 400


def test_the_arms_differ_in_order_and_positions_alone(
    corpus: Path, spec: ModelSpec, clips: list[PlannedSample]
) -> None:
    ours, one_by_one, video_first = (batch_of(corpus, spec, arm, clips) for arm in Arm)
    for other in (one_by_one, video_first):
        assert torch.equal(other.patches, ours.patches)
        assert torch.equal(other.mel_chunks, ours.mel_chunks)
        assert torch.equal(other.target_ids, ours.target_ids)
        assert other.segments.lengths == ours.segments.lengths
        assert torch.equal(other.input_ids.sort().values, ours.input_ids.sort().values)
    assert torch.equal(one_by_one.input_ids, ours.input_ids)
    assert not torch.equal(video_first.input_ids, ours.input_ids)
    for length, start in zip(ours.segments.lengths, _starts(ours.segments.lengths), strict=True):
        span = slice(start, start + length)
        for other in (one_by_one, video_first):
            assert torch.equal(other.position_ids[1:, 0, span], torch.arange(length).expand(3, -1))
        assert not torch.equal(ours.position_ids[1, 0, span], torch.arange(length))
        inner = video_first.input_ids[0, span]
        last_video = int(torch.nonzero(inner == spec.tokens.video).max())
        assert int(torch.nonzero(inner == spec.tokens.audio).min()) > last_video


def _starts(lengths: list[int]) -> list[int]:
    return [sum(lengths[:number]) for number in range(len(lengths))]


def test_our_arm_is_what_training_sees_up_to_the_clips_end(
    corpus: Path, spec: ModelSpec, clips: list[PlannedSample]
) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    whole: EncodedSample = encode(fetch(clips[0].shard, clips[0].row), tokenizer, PROCESSING, spec)
    batch = batch_of(corpus, spec, Arm.tmrope, clips[:1])
    length = batch.num_tokens
    assert torch.equal(batch.input_ids[0], whole.input_ids[:length])
    assert torch.equal(batch.position_ids[1:, 0], whole.position_ids[:, :length])


def test_a_sample_without_a_schedule_is_left_out(corpus: Path, spec: ModelSpec) -> None:
    shards = ShardSet("asr", str(corpus / "train" / "asr"))
    sample = PlannedSample("asr", shards.path_of(0), shards.row(0, 0), None)
    batch = make(corpus, spec, Arm.tmrope)([sample], lambda number: None)
    assert [row[2] for row in batch.bad] == [sample.key]
    assert "no_schedule" in batch.bad[0][3]
