"""`measure` against what encoding really produces, on random samples of real media."""

from dataclasses import replace

import numpy as np
import pytest

from omni_train.data.encode import encode
from omni_train.data.measure import (
    AUDIO_COST_PER_CONV_FRAME,
    TOKENS_WHERE_ATTENTION_EQUALS_MATMUL,
    VISION_COST_PER_PATCH,
    measure,
)
from omni_train.data.types import IndexRow, MediaInfo, MediaKind
from tests.unit.data.clips import clip, every, tone, wav
from tests.unit.data.samples import CONFIG, SPEC, TOKENIZER, png, raw_sample

WORDS = ["apple", "banana", "garden", "window", "yellow", "monday", "summer", "winter"]


def random_media(rng):
    """Bytes and item of one random medium."""
    kind = ["image", "audio", "video"][rng.integers(0, 3)]
    rate_hz = int(rng.choice([8_000, 16_000, 22_050, 44_100, 48_000]))
    if kind == "image":
        return kind, ".png", png(*(int(n) for n in rng.integers(5, 300, 2))), {}
    if kind == "audio":
        length = int(rng.integers(rate_hz // 20, rate_hz))
        return kind, ".wav", wav(rng.uniform(-0.1, 0.1, length), rate_hz), {}
    times = every(float(rng.choice([0.7, 1.0, 2.0, 2.5, 4.0, 12.5])), int(rng.integers(1, 14)))
    if rng.random() < 0.3:
        times = np.sort(rng.uniform(0, 4, len(times))).tolist()
    sound = None if rng.random() < 0.3 else tone(float(rng.uniform(0.05, 3.0)), 48_000)
    container = str(rng.choice(["mp4", "matroska"]))
    size = (2 * int(rng.integers(10, 60)), 2 * int(rng.integers(10, 60)))
    data = clip(times, sound=sound, rate_hz=48_000, size=size, container=container)
    more = {"audio_in_video": False} if rng.random() < 0.2 else {}
    return kind, ".mp4" if container == "mp4" else ".mkv", data, more


def random_sample(rng):
    items, media = [], {}
    for number in range(rng.integers(0, 4)):
        kind, suffix, data, more = random_media(rng)
        media[f"{number}{suffix}"] = data
        items.append({"type": kind, kind: f"{number}{suffix}", **more})
        if rng.random() < 0.5:
            items.append({"type": "text", "text": " ".join(rng.choice(WORDS, 3))})
    items.append({"type": "text", "text": "which word?"})
    reply = {"role": "assistant", "content": " ".join(rng.choice(WORDS, rng.integers(1, 8)))}
    return raw_sample([{"role": "user", "content": items}, reply], media)


def test_measure_equals_encode():
    rng = np.random.default_rng(11)
    config = replace(CONFIG, video_max_frames=7)
    raws = [random_sample(rng) for _ in range(80)]
    costs = measure([raw.row for raw in raws], config, SPEC)
    assert costs.num_tokens.dtype == np.int64
    kinds = set()
    for i, raw in enumerate(raws):
        encoded = encode(raw, TOKENIZER, config, SPEC)
        assert encoded.num_tokens == costs.num_tokens[i]
        assert len(encoded.patches) * VISION_COST_PER_PATCH == pytest.approx(costs.vision_cost[i])
        conv = sum((length + 1) // 2 for length in encoded.mel_lengths.tolist())
        assert conv * AUDIO_COST_PER_CONV_FRAME == pytest.approx(costs.audio_cost[i])
        kinds |= {(info.kind, info.has_audio, info.use_audio) for info in raw.row.media}
    assert len(kinds) == 6  # pictures, sound, clips with and without sound, and with it left out


def test_clip_whose_sound_is_too_short_counts_as_silent():
    data = clip(every(2.0, 4), sound=np.full(100, 0.1, np.float32), container="matroska",
                audio_codec="pcm_s16le")  # fmt: skip
    messages = [{"role": "user", "content": [{"type": "video", "video": "0.mkv"}]}]
    raw = raw_sample(messages, {"0.mkv": data})
    assert raw.row.media[0].has_audio
    encoded = encode(raw, TOKENIZER, CONFIG, SPEC)
    assert len(encoded.mel_lengths) == 0
    assert encoded.num_tokens == measure([raw.row], CONFIG, SPEC).num_tokens[0]


def test_text_and_no_rows():
    rows = [IndexRow("a", 0, 0, "", [], 17, 3), IndexRow("b", 0, 0, "", [], 70_700, 3)]
    costs = measure(rows, CONFIG, SPEC)
    assert costs.num_tokens.tolist() == [17, 70_700]
    assert costs.vision_cost.tolist() == costs.audio_cost.tolist() == [0.0, 0.0]
    expected = 70_700 * (1 + 70_700 / TOKENS_WHERE_ATTENTION_EQUALS_MATMUL)
    assert costs.llm_cost[1] == pytest.approx(expected)
    assert 1.9 < costs.llm_cost[1] / 70_700 < 2.1
    empty = measure([], CONFIG, SPEC)
    assert len(empty.num_tokens) == len(empty.llm_cost) == 0


def test_rows_that_encode_refuses_are_measured():
    media = [
        MediaInfo(MediaKind.audio, "0.wav", num_audio_samples=10, sample_rate_hz=16_000),
        MediaInfo(MediaKind.image, "1.png", width=5_000, height=3),
    ]
    costs = measure([IndexRow("a", 0, 0, "", media, 5, 0)], CONFIG, SPEC)
    assert costs.num_tokens[0] > 5
