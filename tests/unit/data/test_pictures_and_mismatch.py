"""Clips given as pictures, and clips whose sound and picture end apart: exact token counts."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_pipelines.shards import Sample, write_shards
from omni_train.config.errors import DataError
from omni_train.data.chatml import media_pieces
from omni_train.data.encode import encode
from omni_train.data.fetch import fetch
from omni_train.data.image import patchify, resize
from omni_train.data.index import index_path, read_index
from omni_train.data.measure import measure
from omni_train.data.media import decode_image, probe_pictures
from omni_train.data.types import FrameRate, SoundMismatch
from tests.unit.data.clips import clip, every, tone, wav
from tests.unit.data.samples import CONFIG, SPEC, TOKENIZER, png, raw_sample


def user(**item):
    question = [{"type": "video", **item}, {"type": "text", "text": "what?"}]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]


def through_a_shard(tmp_path, messages, media):
    """Write a sample, read it back by its index."""
    write_shards([Sample("s", {"messages": messages}, media)], tmp_path, tokenizer=TOKENIZER,
                 samples_per_shard=1)  # fmt: skip
    shard = tmp_path / "shard-000000.tar"
    rows = read_index(index_path(shard))
    return fetch(shard, rows[0])


def pictures(count, height=60, width=90):
    return {f"0.f{n:03d}.png": png(height, width, n) for n in range(count)}


@pytest.mark.parametrize("with_sound", [False, True])
def test_pictures_are_a_clip(tmp_path, with_sound):
    media = pictures(8)
    item = {"video": list(media), "fps": 2.0}
    if with_sound:
        media["0.wav"] = wav(tone(4.0, 16_000))
        item["audio"] = "0.wav"
    raw = through_a_shard(tmp_path, user(**item), media)
    info = raw.row.media[0]
    assert (info.num_frames, info.fps, info.duration_us) == (8, 2.0, 4_000_000)
    assert [place.member for place in info.parts] == list(media)
    assert raw.media == media
    sample = encode(raw, TOKENIZER, CONFIG, SPEC)
    assert sample.num_tokens == measure([raw.row], CONFIG, SPEC).num_tokens[0]
    grid = sample.grid_thw[0].tolist()
    frames = torch.cat([decode_image(data) for data in list(media.values())[:8]])
    expected, _ = patchify(resize(frames, grid[1] * 14, grid[2] * 14), SPEC)
    assert torch.equal(sample.patches, expected)
    tokens = SPEC.tokens
    assert int((sample.input_ids == tokens.audio).sum()) == (100 if with_sound else 0)
    time = sample.position_ids[0][sample.input_ids == tokens.video]
    assert sorted(set((time - time.min()).tolist())) == [0, 25, 50, 75]


def test_times_of_pictures_are_the_given_ones(tmp_path):
    media = pictures(4)
    messages = user(video=list(media), times_s=[0.0, 0.5, 3.2, 3.6])
    raw = through_a_shard(tmp_path, messages, media)
    sample = encode(raw, TOKENIZER, CONFIG, SPEC)
    time = sample.position_ids[0][sample.input_ids == SPEC.tokens.video]
    assert sorted(set((time - time.min()).tolist())) == [0, 80]
    assert len(sample.mel_lengths) == 0


def test_fast_pictures_are_thinned_and_fit_a_budget(tmp_path):
    media = pictures(30)
    raw = through_a_shard(tmp_path, user(video=list(media), fps=10.0), media)
    assert encode(raw, TOKENIZER, CONFIG, SPEC).grid_thw[0, 0] == 3
    tight = replace(CONFIG, video_rate=FrameRate.budget, video_max_tokens=8)
    sample = encode(raw, TOKENIZER, tight, SPEC)
    assert sample.num_tokens == measure([raw.row], tight, SPEC).num_tokens[0]
    assert 0 < int((sample.input_ids == SPEC.tokens.video).sum()) <= 8


def test_measure_equals_encode_for_pictures(tmp_path):
    rng = np.random.default_rng(2)
    for number in range(12):
        count = int(rng.integers(1, 9))
        media = pictures(count, *(int(n) for n in rng.integers(20, 120, 2)))
        item = {"video": list(media), "times_s": np.sort(rng.uniform(0, 4, count)).tolist()}
        if number % 2:
            media["0.wav"] = wav(tone(float(rng.uniform(0.02, 4.0)), 16_000))
            item |= {"audio": "0.wav", "audio_in_video": bool(rng.random() < 0.5) or None}
        item = {key: value for key, value in item.items() if value is not None}
        raw = through_a_shard(tmp_path / str(number), user(**item), media)
        sample = encode(raw, TOKENIZER, CONFIG, SPEC)
        assert sample.num_tokens == measure([raw.row], CONFIG, SPEC).num_tokens[0]


@pytest.mark.parametrize(
    "item",
    [
        {"video": []},
        {"video": ["a.png"], "fps": 0},
        {"video": ["a.png"], "fps": True},
        {"video": ["a.png"], "fps": float("nan")},
        {"video": ["a.png"]},
        {"video": ["a.png"], "fps": 2.0, "times_s": [0.0]},
        {"video": ["a.png", "b.png"], "times_s": [0.0]},
        {"video": ["a.png", "b.png"], "times_s": [1.0, 0.0]},
        {"video": ["a.png"], "times_s": [-1.0]},
        {"video": ["a.png"], "times_s": "0"},
        {"video": ["a.png", 3], "fps": 2.0},
        {"video": ["a.png"], "fps": 2.0, "audio": 3},
    ],
    ids=lambda item: json.dumps(item),
)
def test_pictures_that_are_no_clip(item):
    with pytest.raises(DataError) as caught:
        media_pieces(user(**item))
    assert caught.value.reason == "bad_messages"


def test_pictures_that_do_not_fit_together():
    def probing(media, **item):
        with pytest.raises(DataError) as caught:
            probe_pictures(media_pieces(user(video=list(media)[:2], **item))[0], media)
        return caught.value.reason

    assert probing({"a.png": png(20, 30), "b.png": png(30, 20)}, fps=2.0) == "bad_header"
    assert probing({"a.png": png(20, 30), "b.wav": wav(tone(1.0, 16_000))}, fps=2.0) == (
        "kind_mismatch"
    )
    media = {"a.png": png(20, 30), "b.png": png(20, 30)}
    assert probing({**media, "c.png": png(9, 9)}, fps=2.0, audio="c.png") == "kind_mismatch"


def test_dialogue_that_names_other_pictures_than_the_index(tmp_path):
    media = pictures(4)
    raw = through_a_shard(tmp_path, user(video=list(media), fps=2.0), media)
    raw.record["messages"] = user(video=list(media)[:3], fps=2.0)
    with pytest.raises(DataError, match="stale_index"):
        encode(raw, TOKENIZER, CONFIG, SPEC)


# Picture of 2.0 s (four frames at 2 per second, so two patches) and sound of another length.


@pytest.mark.parametrize(
    ("sound_s", "keep", "trim"),
    [
        # (patches in time, tokens of sound) of 40 ms, to the tolerance of 0.5 s.
        (1.0, (2, 25), (1, 25)),
        (1.9, (2, 47), (2, 47)),
        (2.1, (2, 52), (2, 52)),
        (9.0, (2, 225), (2, 50)),
    ],
)
def test_sound_and_picture_of_other_lengths(sound_s, keep, trim):
    data = clip(every(2.0, 4), sound=tone(sound_s, 16_000), container="matroska",
                audio_codec="pcm_s16le")  # fmt: skip
    raw = raw_sample(user(video="0.mkv"), {"0.mkv": data})
    for policy, (patches, sound) in [(SoundMismatch.keep, keep), (SoundMismatch.trim, trim)]:
        config = replace(CONFIG, av_mismatch=policy)
        sample = encode(raw, TOKENIZER, config, SPEC)
        found = int((sample.input_ids == SPEC.tokens.audio).sum())
        assert (int(sample.grid_thw[0, 0]), found) == (patches, sound)
        area = int(sample.grid_thw[0, 1:].prod()) // 4
        inside = patches * area + sound + 4
        assert sample.num_tokens == raw.row.num_text_tokens + inside
        assert sample.num_tokens == measure([raw.row], config, SPEC).num_tokens[0]
    config = replace(CONFIG, av_mismatch=SoundMismatch.drop)
    if abs(sound_s - 2.0) < 0.5:
        assert encode(raw, TOKENIZER, config, SPEC).num_tokens == sample.num_tokens
        return
    with pytest.raises(DataError) as caught:
        encode(raw, TOKENIZER, config, SPEC)
    assert caught.value.reason == "av_mismatch"
    assert f"{sound_s - 2.0:+.3f}" in caught.value.detail


def test_trimmed_sound_is_the_start_of_the_whole_one():
    data = clip(every(2.0, 4), sound=tone(9.0, 16_000), container="matroska",
                audio_codec="pcm_s16le")  # fmt: skip
    raw = raw_sample(user(video="0.mkv"), {"0.mkv": data})
    trimmed = encode(raw, TOKENIZER, replace(CONFIG, av_mismatch=SoundMismatch.trim), SPEC)
    assert trimmed.mel_lengths.tolist() == [200]
    short = clip(every(2.0, 4), sound=tone(9.0, 16_000)[:32_000], container="matroska",
                 audio_codec="pcm_s16le")  # fmt: skip
    other = encode(raw_sample(user(video="0.mkv"), {"0.mkv": short}), TOKENIZER, CONFIG, SPEC)
    assert torch.equal(trimmed.mel, other.mel)
    assert torch.equal(trimmed.position_ids, other.position_ids)
