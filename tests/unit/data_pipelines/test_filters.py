"""Quality scores against what the media were made to hold, and decisions by limits."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import soundfile

from data_pipelines.filters import (
    av_mismatch_s,
    content_hash,
    measure_quality,
    repeated_ngram_share,
    sound_shares,
    words_of,
)
from omni_train.config.errors import ConfigError, DataError
from omni_train.data.filters import Counted, FilterConfig, count, decide
from omni_train.data.index import table_of
from omni_train.data.media import probe
from omni_train.data.types import IndexRow, MediaInfo, MediaKind

AUDIO, IMAGE, VIDEO = MediaKind.audio, MediaKind.image, MediaKind.video


def wav(wave: np.ndarray) -> bytes:
    sink = io.BytesIO()
    soundfile.write(sink, wave.astype(np.float32), 16000, format="WAV", subtype="FLOAT")
    return sink.getvalue()


def row(key: str, *media: MediaInfo, **facts: Any) -> IndexRow:
    values = {"content_hash": key, "quality": {}, **facts}
    return IndexRow(key, 0, 1, "", list(media), 10, 5, **values)


def sound(seconds: float) -> MediaInfo:
    return MediaInfo(AUDIO, "0.wav", duration_us=round(seconds * 1e6), has_audio=True)


def picture(width: int, height: int) -> MediaInfo:
    return MediaInfo(IMAGE, "0.png", width=width, height=height)


def test_shares_of_a_sound_made_for_it() -> None:
    tone = 0.5 * np.sin(np.arange(16000) / 5)
    loud = tone.copy()
    loud[:1600] = 1.0
    data = wav(np.concatenate([loud, np.zeros(16000), tone]))
    clipping, silence = sound_shares(data, probe(data, "0.wav"))
    assert clipping == pytest.approx(1600 / 48000)
    assert silence == pytest.approx(1 / 3, abs=0.01)


def test_scores_of_a_sample() -> None:
    data = wav(0.5 * np.sin(np.arange(32000) / 5))
    info = probe(data, "0.wav")
    reply = {"role": "assistant", "content": "one two three four five six"}
    quality = measure_quality({"messages": [reply]}, [info], {"0.wav": data})
    assert quality["words_per_second"] == pytest.approx(3.0)
    assert quality["repeated_ngram_share"] == 0.0
    assert "av_mismatch_s" not in quality
    assert "words_per_second" not in measure_quality({"messages": [reply]}, [], {})


def test_words_and_repeats() -> None:
    assert words_of("Don't STOP, now!") == ["don't", "stop", "now"]
    assert words_of("\u4f60\u597d ok") == ["\u4f60", "\u597d", "ok"]
    assert repeated_ngram_share(words_of("a b c d " * 4)) == pytest.approx(1 - 4 / 13)


def test_sound_and_picture_apart() -> None:
    clip = MediaInfo(
        VIDEO, "0.mp4", num_frames=4, fps=2.0, has_audio=True, audio_start_us=100_000,
        num_audio_samples=24000, sample_rate_hz=16000,
    )  # fmt: skip
    assert av_mismatch_s(clip) == pytest.approx(0.4)


def test_content_hash_ignores_the_wording_and_nothing_else() -> None:
    def record(prompt: str, reply: str, **more: Any) -> dict[str, Any]:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        return {"messages": turns, **more}

    asr = {"asked": {"task": "asr"}}
    base = content_hash(record("Write.", "apple", **asr), row("a", sound(1)))
    assert base == content_hash(record("Listen.", "apple", **asr), row("b", sound(1)))
    assert base != content_hash(record("Write.", "pear", **asr), row("a", sound(1)))
    other = MediaInfo(AUDIO, "0.wav", xxh3="1")
    assert base != content_hash(record("Write.", "apple", **asr), row("a", other))
    plain = content_hash(record("Is it red?", "yes"), row("a"))
    assert plain != content_hash(record("Is it blue?", "yes"), row("a"))


@pytest.mark.parametrize(
    ("limit", "kept", "dropped"),
    [
        ({"min_duration_s": 1.0}, row("a", sound(1)), row("b", sound(0.9))),
        ({"max_duration_s": 1.0}, row("a", sound(1), picture(9, 9)), row("b", sound(1.1))),
        ({"min_pixels": 100}, row("a", picture(10, 10), sound(1)), row("b", picture(9, 10))),
        ({"max_pixels": 100}, row("a", picture(10, 10)), row("b", picture(1, 1), picture(11, 10))),
        ({"max_aspect": 2.0}, row("a", picture(20, 10)), row("b", picture(10, 21))),
        ({"languages": ["en"]}, row("a", language="en"), row("b")),
        *(
            ({f"max_{name}": 0.5}, row("a", quality={name: 0.5}), row("b", quality={name: 0.6}))
            for name in ("clipping_share", "silence_share", "repeated_ngram_share")
        ),
        ({"max_av_mismatch_s": 0.5}, row("a"), row("b", quality={"av_mismatch_s": 0.6})),
        (
            {"min_words_per_second": 1.0},
            row("a", quality={"words_per_second": 1.0}),
            row("b", quality={"words_per_second": 0.9}),
        ),
        ({"drop_duplicates": True}, row("a"), row("a")),
    ],
)
def test_each_limit(limit: dict[str, Any], kept: IndexRow, dropped: IndexRow) -> None:
    table = table_of([kept, dropped])
    assert decide(table, FilterConfig(**limit)).tolist() == ["", next(iter(limit))]
    assert decide(table, FilterConfig()).tolist() == ["", ""]
    narrow = table_of([dropped, kept]).slice(1)
    assert decide(narrow, FilterConfig(**limit)).tolist() == [""]


def test_duplicates_across_shards_and_counts() -> None:
    seen: set[str] = set()
    config = FilterConfig(drop_duplicates=True, max_duration_s=3600)
    first = table_of([row("x", sound(7200)), row("a", sound(3600))])
    second = table_of([row("a", sound(1800)), row("x", sound(60))])
    assert decide(first, config, seen=seen).tolist() == ["max_duration_s", ""]
    decisions = decide(second, config, seen=seen)
    # What was dropped before does not make its copy a duplicate.
    assert decisions.tolist() == ["drop_duplicates", ""]
    assert count(second, decisions)["drop_duplicates"] == Counted(1, 0.5)


def test_what_was_not_measured_cannot_be_limited() -> None:
    rows = table_of([row("a"), row("b", content_hash="")])
    assert decide(rows, FilterConfig(min_duration_s=1.0)).tolist() == ["", ""]
    with pytest.raises(DataError, match="not_measured") as caught:
        decide(rows, FilterConfig(max_silence_share=0.5))
    assert caught.value.key == rows.column("key")[1].as_py()


def test_the_first_limit_that_is_broken_is_the_reason() -> None:
    config = FilterConfig(min_duration_s=1.0, max_aspect=2.0, languages=["en"])
    rows = [row("a", sound(0.5), picture(9, 90)), row("b", picture(9, 90)), row("c", language="de")]
    assert decide(table_of(rows), config).tolist() == ["min_duration_s", "max_aspect", "languages"]
    assert decide(table_of([]), config).tolist() == []


@pytest.mark.parametrize(
    "limit",
    [
        {"min_duration_s": 2.0, "max_duration_s": 1.0},
        {"max_silence_share": 50.0},
        {"max_aspect": 0.5},
    ],
)
def test_limits_that_make_no_sense(limit: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        FilterConfig(**limit)
