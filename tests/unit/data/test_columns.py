"""Measuring an index as columns gives the figures of measuring its rows, clips included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from omni_train.data.columns import measure_table
from omni_train.data.index import rows_of, table_of
from omni_train.data.measure import measure
from omni_train.data.types import (
    FrameRate,
    IndexRow,
    MediaInfo,
    MediaKind,
    ProcessingConfig,
    SoundMismatch,
)
from omni_train.data.video import regular_times_us
from tests.unit.data.samples import SPEC

RATES = (0.5, 1.0, 1.99, 2.0, 2.02, 2.05, 5.0, 23.976, 24.0, 25.0, 29.97, 30.0, 60.0, 240.0, 5000.0)


def rows(seed: int, count: int = 250) -> list[IndexRow]:
    rng = np.random.default_rng(seed)
    return [
        IndexRow(f"k{n}", 0, 0, "", media(rng), int(rng.integers(0, 300)), 1) for n in range(count)
    ]


def media(rng: np.random.Generator) -> list[MediaInfo]:
    found = []
    for number in range(int(rng.integers(0, 3))):
        kind = MediaKind(rng.choice(["image", "audio", "video"], p=[0.2, 0.2, 0.6]))
        info = MediaInfo(kind, f"{number}.bin")
        if kind is not MediaKind.audio:
            info.width, info.height = (int(n) for n in rng.integers(1, 2000, 2))
        if kind is not MediaKind.image and (kind is MediaKind.audio or rng.random() < 0.5):
            info.has_audio = True
            info.sample_rate_hz = int(rng.choice([8_000, 44_100, 48_000]))
            info.num_audio_samples = int(rng.integers(0, 40 * info.sample_rate_hz))
            info.use_audio = kind is MediaKind.audio or bool(rng.random() < 0.7)
        if kind is MediaKind.video:
            info.num_frames = int(
                rng.choice([1, 2, 3, 7, 100, 3_000, 36_000]) + rng.integers(0, 40)
            )
            info.fps = float(rng.choice(RATES))
            info.first_frame_us = int(rng.integers(0, 10**6))
            if rng.random() < 0.2:
                times = regular_times_us(info.num_frames, info.fps) + info.first_frame_us
                info.frame_times_us = (times // 1_000 * 1_000).tolist()
        found.append(info)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"video_fps": 1.0, "video_max_frames": 7},
        {"video_fps": 30.0, "video_max_frames": 3},
        {"video_max_pixels": 28 * 28, "video_min_pixels": 56 * 56},
        {"video_rate": FrameRate.budget, "video_max_tokens": 500},
        {"av_mismatch": SoundMismatch.trim},
        {"av_mismatch": SoundMismatch.drop},
    ],
    ids=str,
)
def test_columns_give_what_rows_give(settings: dict[str, Any]) -> None:
    config = ProcessingConfig(**settings)
    for seed in range(2):
        given = rows(seed)
        table = table_of(given)
        asked: list[int] = []

        def take(
            numbers: list[int], table: Any = table, asked: list[int] = asked
        ) -> list[IndexRow]:
            asked += numbers
            return rows_of(table.take(numbers))

        found, wanted = measure_table(table, config, SPEC, take), measure(given, config, SPEC)
        assert found.num_tokens.tolist() == wanted.num_tokens.tolist()
        for name in ("vision_cost", "audio_cost", "llm_cost"):
            assert np.allclose(getattr(found, name), getattr(wanted, name), rtol=1e-12)
        filmed = [n for n, row in enumerate(given) if any(m.num_frames > 1 for m in row.media)]
        if config.video_rate is FrameRate.fixed and config.av_mismatch is SoundMismatch.keep:
            # Rows whose clips are irregular, or too many frames to be sure; not the rest.
            assert 0 < len(asked) < 0.75 * len(filmed)


def test_an_index_of_steady_clips_makes_no_row() -> None:
    clip = MediaInfo(
        MediaKind.video, "0.mp4", width=640, height=360, num_frames=300, fps=30.0, has_audio=True
    )
    clip.num_audio_samples, clip.sample_rate_hz = 480_000, 48_000
    given = [IndexRow("a", 0, 0, "", [clip], 20, 1), IndexRow("b", 0, 0, "", [], 20, 1)]

    def never(numbers: list[int]) -> list[IndexRow]:
        raise AssertionError(numbers)

    found = measure_table(table_of(given), ProcessingConfig(), SPEC, never)
    assert found.num_tokens.tolist() == measure(given, ProcessingConfig(), SPEC).num_tokens.tolist()
