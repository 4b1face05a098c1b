"""Parts of long clips, and the sound of parts: true times, nothing lost, nothing decoded twice."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from omni_train.config.errors import DataError
from omni_train.data import clip as clip_module
from omni_train.data.chatml import count_text_tokens
from omni_train.data.encode import encode
from omni_train.data.measure import measure
from omni_train.data.media import decode_audio, decode_video, probe
from omni_train.data.split import RATE_HZ, Part, can_split, cut, part_row, split_recording
from omni_train.data.types import MediaKind, ProcessingConfig, RawSample, SoundMismatch
from omni_train.data.video import audio_offset_us, clip_zero_us, frame_times_us, plan_clip
from tests.unit.data.clips import clip, every, tone, wav
from tests.unit.data.samples import CONFIG, SPEC, TOKENIZER, raw_sample

BUDGET = 400
SECONDS = 24.4


def record(seconds: float, kind: str, member: str) -> dict[str, Any]:
    """One word a second."""
    segments = [
        {"start_s": n + 0.2, "end_s": n + 0.9, "text": f"word{n}"} for n in range(int(seconds))
    ]
    content = [{"type": kind, kind: member}, {"type": "text", "text": "which words"}]
    reply = " ".join(s["text"] for s in segments)
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
    return {"messages": messages, "segments": segments, "task": "asr"}


def sample(data: bytes, member: str, seconds: float = SECONDS) -> RawSample:
    kind = "video" if member.endswith(("mp4", "mkv", "webm")) else "audio"
    given = record(seconds, kind, member)
    raw = raw_sample(given["messages"], {member: data})
    raw.record, raw.row.task = given, "asr"
    return raw


def parts_of(raw: RawSample, config: ProcessingConfig = CONFIG) -> list[Part]:
    def count(messages: Any) -> tuple[int, int]:
        return count_text_tokens(messages, TOKENIZER)

    return split_recording(raw.record, raw.row, BUDGET, count, config, SPEC)


def noise(seconds: float, rate_hz: int) -> np.ndarray:
    """A sweep: no stretch of it is like another."""
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    return (0.4 * np.sin(2 * np.pi * (200 + 15 * time) * time)).astype(np.float32)


FILMS = {
    "mp4": {"audio_codec": "aac", "rate_hz": 16_000},
    "mp4 at 44.1 kHz": {"audio_codec": "aac", "rate_hz": 44_100},
    "mp4, sound later": {"audio_codec": "aac", "rate_hz": 48_000, "sound_start_s": 1.37},
    "mkv": {"audio_codec": "aac", "rate_hz": 16_000, "container": "matroska"},
    "webm": {
        "audio_codec": "libopus",
        "rate_hz": 48_000,
        "container": "webm",
        "video_codec": "libvpx",
    },
    "mkv, plain sound": {
        "audio_codec": "pcm_s16le",
        "rate_hz": 22_050,
        "container": "matroska",
        "hole_s": (7.3, 9.1),
    },
}


def film(name: str, seconds: float = SECONDS, times: list[float] | None = None) -> RawSample:
    options = dict(FILMS[name])
    sound = noise(seconds - options.get("sound_start_s", 0.0), options["rate_hz"])
    data = clip(times or every(5, int(seconds * 5)), sound=sound, moving=True, **options)
    suffix = {"matroska": "mkv", "webm": "webm"}.get(options.get("container", ""), "mp4")
    return sample(data, f"0.{suffix}", seconds)


@pytest.mark.parametrize("name", list(FILMS))
def test_parts_of_a_clip_are_all_of_it_at_true_times(name: str) -> None:
    raw = film(name)
    info, parts = raw.row.media[0], parts_of(raw)
    assert can_split(raw.row)
    assert len(parts) >= 3
    assert all(part.start % (2 * RATE_HZ) == 0 for part in parts)
    assert " ".join(part.text for part in parts) == raw.record["messages"][-1]["content"]
    infos = [part_row(raw.row, part).media[0] for part in parts]
    times = np.concatenate([frame_times_us(of_part) for of_part in infos])
    assert times.tolist() == frame_times_us(info).tolist()
    firsts = [of_part.first_sample for of_part in infos]
    ends = [of_part.first_sample + of_part.num_audio_samples for of_part in infos]
    assert firsts == [0, *ends[:-1]]
    assert ends[-1] == info.num_audio_samples
    zero_us = clip_zero_us(info, with_sound=True)
    for part, of_part in zip(parts, infos, strict=True):
        stretch_us = (part.start * 1e6 / RATE_HZ, part.stop * 1e6 / RATE_HZ)
        shown = frame_times_us(of_part) - zero_us
        assert stretch_us[0] <= shown[0]
        assert shown[-1] <= stretch_us[1]
        # The sound begins where the part does, but for one that has not begun yet.
        starts_us = of_part.audio_start_us - zero_us
        assert abs(starts_us - max(stretch_us[0], info.audio_start_us - zero_us)) <= 63
        assert audio_offset_us(of_part) >= 0


@pytest.mark.parametrize("name", list(FILMS))
def test_a_part_of_a_clip_shows_and_says_the_same_as_the_whole(name: str) -> None:
    raw = film(name)
    info, data = raw.row.media[0], next(iter(raw.media.values()))
    whole = decode_audio(data, info)
    frames = decode_video(data, list(range(info.num_frames)), info)
    shown = 0
    for part in parts_of(raw):
        piece = cut(raw, part).row.media[0]
        found = decode_video(data, list(range(piece.num_frames)), piece)
        assert torch.equal(found, frames[shown : shown + piece.num_frames])
        shown += piece.num_frames
        heard = decode_audio(data, piece)
        first = round(piece.first_sample * RATE_HZ / info.sample_rate_hz)
        wanted = whole[first : first + len(heard)]
        # aac draws noise anew after a seek, here where the sound stops; a shift by one sample of
        # the sweep would give 0.05 at every place.
        exact = piece.first_sample * RATE_HZ % info.sample_rate_hz == 0
        assert len(heard) >= len(wanted) >= len(heard) - 1
        assert (heard[: len(wanted)] - wanted).abs().max() < (1e-2 if exact else 0.2)
    assert shown == info.num_frames


@pytest.mark.parametrize("name", [*FILMS, "wav", "flac", "mp3"])
def test_a_part_has_as_many_tokens_as_measured(name: str) -> None:
    if name in FILMS:
        raw = film(name)
    else:
        raw = sample(wav(tone(SECONDS, 22_050), 22_050, container=name.upper()), f"0.{name}")
    parts = parts_of(raw)
    assert len(parts) >= 2
    for part in parts:
        piece = cut(raw, part)
        encoded = encode(piece, TOKENIZER, CONFIG, SPEC)
        measured = measure([piece.row], CONFIG, SPEC)
        assert encoded.num_tokens == int(measured.num_tokens[0]) <= BUDGET
        assert int((encoded.labels >= 0).sum()) == piece.row.num_target_tokens
        assert piece.record["messages"][-1]["content"] == part.text


def test_frames_of_another_rate_stay_in_their_parts() -> None:
    times = [0.0, 0.1, 2.5, 4.1, 4.2, 4.3, 7.9, 8.0, 11.0, 13.0, 15.0, 17.5, 19.9, 20.0, 23.9]
    raw = film("mp4", times=times)
    pieces = [part_row(raw.row, part) for part in parts_of(raw)]
    shown = [t for piece in pieces for t in frame_times_us(piece.media[0])]
    assert np.abs(np.array(shown) / 1e6 - times).max() < 1e-4
    for piece in pieces:
        assert plan_clip(piece.media[0], CONFIG, SPEC).frames


def test_a_clip_whose_sound_goes_on_alone_is_left_out() -> None:
    raw = film("mp4", times=every(5, 10))
    with pytest.raises(DataError, match="only sound or only picture") as caught:
        parts_of(raw)
    assert caught.value.reason == "over_budget"
    trimming = ProcessingConfig(
        video_min_pixels=28 * 28, video_max_pixels=84 * 84, av_mismatch=SoundMismatch.trim
    )
    with pytest.raises(DataError, match="after its picture"):
        parts_of(raw, trimming)


def test_silent_clips_and_clips_of_pictures_are_not_split() -> None:
    raw = film("mp4", seconds=4)
    info = raw.row.media[0]
    info.use_audio = False
    assert not can_split(raw.row)
    info.use_audio, info.has_audio = True, False
    assert not can_split(raw.row)
    info.has_audio, info.parts = True, [object()]
    assert not can_split(raw.row)


@pytest.mark.parametrize("container", ["WAV", "FLAC", "MP3"])
@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 22_050, 44_100])
def test_a_stretch_is_found_to_the_sample(container: str, rate_hz: int) -> None:
    data = wav(noise(20.03, rate_hz), rate_hz, container=container)
    raw = sample(data, f"0.{container.lower()}", 20.03)
    whole = decode_audio(data, raw.row.media[0])
    for start, stop in ((0, 2), (2, 8), (18, 21)):
        part = Part(0, start * RATE_HZ, min(stop * RATE_HZ, len(whole)), "", 1, 1)
        heard = decode_audio(data, part_row(raw.row, part).media[0])
        wanted = whole[part.start : part.stop]
        assert heard.shape == wanted.shape
        if rate_hz == RATE_HZ and container != "MP3":
            assert torch.equal(heard, wanted)
        # The first frames after a seek in an mp3 lack the bits of those before: 0.4 off.
        assert (heard - wanted).abs().max() < 1e-6


def test_a_part_is_not_paid_for_with_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FILMS["mp4"], "codec_options", {"g": "25"})
    raw = film("mp4", seconds=60)
    piece = part_row(raw.row, Part(0, 56 * RATE_HZ, 58 * RATE_HZ, "", 1, 1)).media[0]
    data = raw.media["0.mp4"]
    taken = {"sound": 0, "pictures": 0}
    add, time_of = clip_module._Sound.add, clip_module._time_us

    def count_sound(self: Any, frame: Any) -> None:
        taken["sound"] += frame.samples
        add(self, frame)

    def count_pictures(frame: Any, what: str) -> int:
        taken["pictures"] += what == "picture"
        return time_of(frame, what)

    monkeypatch.setattr(clip_module._Sound, "add", count_sound)
    monkeypatch.setattr(clip_module, "_time_us", count_pictures)
    decode_audio(data, piece)
    decode_video(data, [0, 9], piece)
    assert taken["sound"] <= 3 * RATE_HZ
    assert 2 <= taken["pictures"] <= 2 * raw.row.media[0].keyframe_interval < 300

    sound = wav(noise(600, RATE_HZ))
    given = probe(sound, "0.wav")
    assert given.kind is MediaKind.audio
    read = soundfile.SoundFile.read
    frames = []

    def count_frames(self: Any, size: int, **options: Any) -> Any:
        frames.append(size)
        return read(self, size, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", count_frames)
    row = sample(sound, "0.wav", 600).row
    frames.clear()
    decode_audio(sound, part_row(row, Part(0, 590 * RATE_HZ, 592 * RATE_HZ, "", 1, 1)).media[0])
    assert sum(frames) == 2 * RATE_HZ


def test_a_part_of_a_damaged_or_other_file_is_named() -> None:
    data = wav(noise(20, RATE_HZ))
    row = part_row(sample(data, "0.wav", 20).row, Part(0, 10 * RATE_HZ, 20 * RATE_HZ, "", 1, 1))
    info = row.media[0]
    for wrong, reason in (
        (wav(noise(15, RATE_HZ)), "truncated"),
        (wav(noise(20, 8_000), 8_000), "stale_index"),
        (data[: len(data) // 2], "truncated"),
        (b"RIFF" + bytes(100), "truncated"),
        (b"fLaC" + bytes(100), "corrupt"),
    ):
        with pytest.raises(DataError) as caught:
            decode_audio(wrong, info)
        assert caught.value.reason == reason
    values = noise(20, RATE_HZ)
    values[12 * RATE_HZ] = np.nan
    out = io.BytesIO()
    soundfile.write(out, values, RATE_HZ, format="WAV", subtype="FLOAT")
    with pytest.raises(DataError, match="non_finite"):
        decode_audio(out.getvalue(), info)
