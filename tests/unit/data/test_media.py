"""Decoding and probing of real files, written by the test, whole and broken."""

import io
import resource
from dataclasses import replace

import av
import numpy as np
import pytest
import soundfile
import soxr
import torch
from PIL import Image

from omni_train.config.errors import DataError
from omni_train.data import clip as clip_module
from omni_train.data import media as media_module
from omni_train.data.media import (
    decode_audio,
    decode_image,
    decode_video,
    num_samples_16k,
    probe,
)
from omni_train.data.types import MediaKind
from omni_train.data.video import frame_times_us
from tests.unit.data.clips import clip, every, tone, wav


def reason(function, *args):
    with pytest.raises(DataError) as caught:
        function(*args)
    return caught.value.reason


# Sound files


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000])
def test_any_rate_becomes_16_khz_of_the_promised_length(rate_hz):
    time = np.arange(round(0.733 * rate_hz)) / rate_hz
    wave = 0.5 * np.sin(2 * np.pi * 1_000 * time)
    data = wav(wave, rate_hz)
    info = probe(data, "0.wav")
    assert (info.kind, info.sample_rate_hz, info.num_channels) == (MediaKind.audio, rate_hz, 1)
    assert info.num_audio_samples == len(wave)
    assert abs(info.duration_us - 733_000) < 1_000
    out = decode_audio(data, info)
    assert out.dtype == torch.float32
    assert len(out) == num_samples_16k(len(wave), rate_hz)
    spectrum = np.abs(np.fft.rfft(out.numpy()))
    assert abs(np.argmax(spectrum) * 16_000 / len(out) - 1_000) < 3
    assert abs(out.abs().max() - 0.5) < 0.03


def test_length_rule_is_exact_for_odd_lengths():
    rng = np.random.default_rng(0)
    for rate_hz in (8_000, 11_025, 24_000, 44_100, 48_000):
        for length in rng.integers(3, 5_000, 20).tolist():
            data = wav(rng.uniform(-0.5, 0.5, length), rate_hz)
            assert len(decode_audio(data, probe(data, "a.wav"))) == num_samples_16k(length, rate_hz)
    lengths, rates = np.array([44_100, 7]), np.array([44_100, 48_000])
    assert num_samples_16k(lengths, rates).tolist() == [16_000, 2]


@pytest.mark.parametrize("rate_hz", [8_000, 22_050, 44_100, 48_000])
def test_sound_of_many_blocks_equals_one_call_of_the_resampler(rate_hz, monkeypatch):
    monkeypatch.setattr(media_module, "_READ_FRAMES", 4_096)
    wave = np.random.default_rng(0).integers(-9_000, 9_000, 3 * rate_hz + 77).astype(np.int16)
    data = wav(wave, rate_hz)
    expected = soxr.resample(wave / np.float32(32_768), rate_hz, 16_000, quality="HQ")
    info = probe(data, "0.wav")
    out = decode_audio(data, info)
    assert len(out) == num_samples_16k(len(wave), rate_hz)
    common = min(len(out), len(expected))
    assert np.array_equal(out[:common].numpy(), expected[:common])


@pytest.mark.parametrize("container", ["FLAC", "MP3"])
@pytest.mark.parametrize("rate_hz", [16_000, 44_100])
def test_sound_of_many_blocks_equals_one_read(container, rate_hz, monkeypatch):
    time = np.arange(5 * rate_hz) / rate_hz
    data = wav(0.4 * np.sin(2 * np.pi * (200 + 90 * time) * time), rate_hz, container=container)
    info = probe(data, f"0.{container.lower()}")
    expected, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    if rate_hz != 16_000:
        expected = soxr.resample(expected, rate_hz, 16_000, quality="HQ")
    monkeypatch.setattr(media_module, "_READ_FRAMES", 4_096)
    # libsndfile's own seek to the start turns the last bit of some samples.
    assert np.abs(decode_audio(data, info).numpy() - expected[: 5 * 16_000]).max() < 1e-6


def test_stereo_is_averaged_and_16_khz_is_untouched():
    left, right = tone(0.2, 16_000), np.zeros(3_200, np.float32)
    data = wav(np.stack([left, right], axis=1))
    info = probe(data, "0.wav")
    assert info.num_channels == 2
    np.testing.assert_allclose(decode_audio(data, info).numpy(), left / 2, atol=1e-4)


@pytest.mark.parametrize("container", ["FLAC", "MP3"])
def test_flac_and_mp3(container):
    wave = tone(1.0, 16_000)
    data = wav(wave, container=container)
    info = probe(data, f"0.{container.lower()}")
    assert info.has_audio
    out = decode_audio(data, info).numpy()
    assert abs(len(out) - 16_000) <= (0 if container == "FLAC" else 1_152)
    assert abs(int(np.abs(out).argmax()) - 8_000) < 60


@pytest.mark.parametrize("container", ["WAV", "FLAC", "MP3"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_cut_sound_files_are_refused(container, share):
    noise = np.random.default_rng(1).uniform(-0.5, 0.5, 16_000)
    data = wav(noise, container=container)
    cut = data[: int(len(data) * share)]
    assert reason(probe, cut, f"0.{container.lower()}") in ("truncated", "corrupt")
    if container == "WAV":
        assert reason(probe, cut, "0.wav") == "truncated"


def test_odd_last_byte_of_a_wav_is_missed_too():
    assert reason(probe, wav(tone(0.1, 16_000))[:-1], "0.wav") == "truncated"


def test_cut_file_with_the_whole_files_index_row():
    noise = np.random.default_rng(1).uniform(-0.5, 0.5, 16_000)
    info = probe(wav(noise), "0.wav")
    shorter = wav(noise[:8_000])
    assert reason(decode_audio, shorter, info) == "truncated"
    assert reason(decode_audio, wav(noise, 8_000), info) == "stale_index"


def test_empty_non_finite_and_lying_sound():
    assert reason(probe, wav(np.zeros(0)), "0.wav") == "empty_audio"
    out = io.BytesIO()
    bad = np.array([0.0, np.nan, 0.1] * 100, np.float32)
    soundfile.write(out, bad, 16_000, format="WAV", subtype="FLOAT")
    assert reason(probe, out.getvalue(), "0.wav") == "non_finite"
    header = bytearray(wav(tone(0.1, 16_000)))
    header[24:28] = (1).to_bytes(4, "little")
    assert reason(probe, bytes(header), "0.wav") == "bad_header"
    header[24:28] = (16_000).to_bytes(4, "little")
    header[40:44] = (0xFFFFFFFF).to_bytes(4, "little")
    assert reason(probe, bytes(header), "0.wav") == "truncated"
    assert reason(probe, b"", "0.wav") == "corrupt"
    assert reason(probe, b"no sound at all", "0.wav") == "corrupt"
    assert reason(probe, wav(tone(0.1, 16_000), container="AIFF"), "0.wav") == "bad_container"
    assert reason(probe, b"x", "0.txt") == "unknown_media"


def test_long_silence_is_refused_from_its_header():
    silence = wav(np.zeros(2 * 3_600 * 8_000, np.int16), 8_000, container="FLAC")
    assert len(silence) < 1_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert reason(probe, silence, "0.flac") == "too_long"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


# Pictures


def encoded(pixels, file_format, **options):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, file_format, **options)
    return out.getvalue()


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_pictures(file_format):
    pixels = np.zeros((30, 50, 3), np.uint8)
    pixels[:15, :25] = (200, 30, 40)
    data = encoded(pixels, file_format)
    info = probe(data, f"0.{file_format.lower()}")
    assert (info.kind, info.width, info.height) == (MediaKind.image, 50, 30)
    frame = decode_image(data)
    assert frame.shape == (1, 3, 30, 50)
    assert frame.dtype == torch.uint8
    assert np.abs(frame[0, :, 5, 5].numpy().astype(int) - (200, 30, 40)).max() < 12


def test_exif_orientation_turns_the_picture():
    pixels = np.zeros((30, 50, 3), np.uint8)
    pixels[:, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    info = probe(encoded(pixels, "JPEG", exif=exif), "0.jpg")
    assert (info.width, info.height) == (30, 50)
    frame = decode_image(encoded(pixels, "PNG", exif=exif))
    assert frame[0, 0, :8].min() == 255
    assert frame[0, 0, 12:].max() == 0


def test_grey_transparent_and_16_bit_pictures_become_rgb():
    ramp = np.arange(0, 65_536, 1_024, dtype=np.uint16).reshape(8, 8)
    assert decode_image(encoded(ramp, "PNG"))[0, 1].flatten().tolist() == list(range(0, 256, 4))
    rgba = np.full((4, 4, 4), 128, np.uint8)
    assert decode_image(encoded(rgba, "PNG")).shape == (1, 3, 4, 4)
    assert decode_image(encoded(rgba[..., 0], "PNG"))[0, :, 0, 0].tolist() == [128] * 3


def test_bad_pictures(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for file_format in ("PNG", "JPEG", "WEBP"):
        data = encoded(noise, file_format)
        assert reason(decode_image, data[: len(data) // 2]) in ("truncated", "corrupt")
    assert reason(decode_image, encoded(noise, "JPEG")[:-400]) == "truncated"
    assert reason(decode_image, encoded(noise, "BMP")) == "bad_container"
    assert reason(decode_image, b"") == "bad_container"
    monkeypatch.setattr(media_module, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    assert reason(decode_image, encoded(noise, "PNG")) == "too_large"


# Clips


@pytest.mark.parametrize("fps", [1.0, 2.0, 2.5, 4.0, 24.0])
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_regular_clips(fps, container):
    times = every(fps, 9)
    data = clip(times, sound=tone(2.0, 16_000), container=container)
    info = probe(data, "0.mp4")
    assert (info.num_frames, info.width, info.height) == (9, 64, 48)
    assert abs(info.fps - fps) < 0.03
    assert info.has_audio
    assert info.audio_start_us == 0
    rounding = 1 if container == "mp4" else 500
    expected = np.array(times) * 1e6
    assert np.abs(frame_times_us(info) - expected).max() <= rounding
    assert (info.frame_times_us == []) == (container == "mp4" or fps != 24.0)
    frames = decode_video(data, [0, 3, 8], info)
    assert frames.shape == (3, 3, 48, 64)
    greys = frames[:, :, 20:28, 40:60].float().mean((1, 2, 3))
    assert np.abs(greys.numpy() - [0, 60, 160]).max() < 6


def test_irregular_frames_keep_their_times():
    times = [0.0, 0.1, 0.73, 1.9, 2.0, 4.04]
    info = probe(clip(times), "0.mp4")
    assert np.abs(np.array(info.frame_times_us) - np.array(times) * 1e6).max() <= 6
    assert info.first_frame_us == 0
    assert not info.has_audio
    assert info.sample_rate_hz == 0


CONTAINERS = [
    ("mp4", "libx264", "aac", 16_000),
    ("mp4", "libx264", "aac", 44_100),
    ("matroska", "libx264", "aac", 16_000),
    ("matroska", "libx264", "libopus", 48_000),
    ("webm", "libvpx-vp9", "libopus", 48_000),
]


@pytest.mark.parametrize(("container", "video", "audio", "rate_hz"), CONTAINERS)
@pytest.mark.parametrize(("first_frame_s", "sound_s"), [(0.0, 0.0), (0.0, 0.5), (0.8, 0.0)])
def test_streams_that_start_apart(container, video, audio, rate_hz, first_frame_s, sound_s):
    """The click in the middle of the sound must be where it was put, whatever the priming."""
    data = clip(
        [first_frame_s + t for t in every(2.0, 4)],
        sound=tone(1.0, rate_hz),
        rate_hz=rate_hz,
        sound_start_s=sound_s,
        container=container,
        video_codec=video,
        audio_codec=audio,
    )
    info = probe(data, "0.mp4")
    assert abs(info.first_frame_us - first_frame_s * 1e6) <= 1_000
    wave = decode_audio(data, info).numpy()
    assert len(wave) == num_samples_16k(info.num_audio_samples, info.sample_rate_hz)
    click_s = info.audio_start_us / 1e6 + int(np.abs(wave).argmax()) / 16_000
    assert abs(click_s - (sound_s + 0.5)) < 0.005
    assert abs(info.audio_start_us / 1e6 - sound_s) < 0.07  # priming may be kept, at its own time


def test_hole_in_the_sound_becomes_silence():
    sound = tone(2.048, 16_000)
    options = {"container": "matroska", "audio_codec": "pcm_s16le"}
    data = clip(every(2.0, 4), sound=sound, hole_s=(0.5, 0.9), **options)
    info = probe(data, "0.mkv")
    wave = decode_audio(data, info).numpy()
    assert abs(len(wave) - len(sound)) < 20
    assert np.abs(wave[8_300:13_800]).max() == 0.0
    assert np.abs(wave[6_000:8_000]).max() > 0.04
    assert abs(int(np.flatnonzero(np.abs(wave) > 0.5)[0]) - len(sound) // 2) < 20


def test_empty_sound_stream_counts_as_silent():
    info = probe(clip(every(2.0, 4), sound=np.zeros(0, np.float32)), "0.mp4")
    assert not info.has_audio
    assert info.num_audio_samples == 0
    assert info.duration_us == 2_000_000


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_applied(rotation):
    data = clip(every(2.0, 2), rotation=rotation)
    info = probe(data, "0.mp4")
    assert (info.width, info.height) == ((64, 48) if rotation == 180 else (48, 64))
    frame = decode_video(data, [0], info)[0].float().mean(0)
    assert tuple(frame.shape) == (info.height, info.width)
    edges = {"top": frame[:8], "bottom": frame[-8:], "left": frame[:, :8], "right": frame[:, -8:]}
    brightest = max(edges, key=lambda side: float(edges[side].mean()))
    # FFmpeg's display rotation counts counter-clockwise: the bright left side goes down first.
    assert brightest == {90: "bottom", 180: "right", 270: "top"}[rotation]


def test_frames_can_be_resized_while_decoding():
    data = clip(every(2.0, 4))
    info = probe(data, "0.mp4")
    assert decode_video(data, [1, 2], info, size=(28, 56)).shape == (2, 3, 28, 56)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["mp4", "faststart", "matroska", "webm"])
def test_cut_clips_are_refused(kind, share):
    data = clip(
        every(10.0, 30),
        sound=tone(3.0, 48_000),
        rate_hz=48_000,
        container="mp4" if kind == "faststart" else kind,
        video_codec="libvpx-vp9" if kind == "webm" else "libx264",
        audio_codec="libopus" if kind == "webm" else "aac",
        faststart=kind == "faststart",
    )
    probe(data, "0.mp4")
    assert reason(probe, data[: int(len(data) * share)], "0.mp4") == "truncated"


def test_frames_that_the_header_promises_but_are_not_there():
    """A moov box that says eight frames, cut out of the file and patched up to look whole."""
    data = clip(every(2.0, 8), faststart=True)
    at = data.index(b"mdat") - 4
    keep = len(data) - at - 200
    lying = data[:at] + keep.to_bytes(4, "big") + data[at + 4 : at + keep]
    assert reason(probe, lying, "0.mp4") in ("truncated", "corrupt")


def test_index_row_of_another_clip():
    short, long = clip(every(2.0, 4)), clip(every(2.0, 9))
    info = probe(long, "0.mp4")
    assert reason(decode_video, short, [0, 8], info) == "truncated"
    moved = replace(info, first_frame_us=40_000)
    assert reason(decode_video, long, [0, 8], moved) == "stale_index"


def test_codec_and_caps(monkeypatch):
    data = clip(every(2.0, 4), sound=tone(1.0, 16_000))
    avi = clip(every(2.0, 4), container="avi")
    assert reason(probe, avi, "0.mp4") == "bad_container"
    ffv1 = clip(every(2.0, 4), container="matroska", video_codec="ffv1")
    assert reason(probe, ffv1, "0.mkv") == "bad_codec"
    assert reason(decode_video, ffv1, [0], probe(data, "0.mp4")) == "bad_codec"
    ac3 = clip(every(2.0, 4), sound=tone(1.0, 48_000), rate_hz=48_000, audio_codec="ac3")
    assert reason(probe, ac3, "0.mp4") == "bad_codec"
    monkeypatch.setattr(clip_module, "MAX_FRAME_PIXELS", 64 * 48 - 1)
    assert reason(probe, data, "0.mp4") == "too_large"
    monkeypatch.setattr(clip_module, "MAX_FRAME_PIXELS", 64 * 48)
    monkeypatch.setattr(clip_module, "MAX_CLIP_FRAMES", 3)
    assert reason(probe, data, "0.mp4") == "too_long"
    monkeypatch.setattr(clip_module, "MAX_CLIP_S", 1)
    assert reason(probe, data, "0.mp4") == "too_long"


def test_sound_only_file_is_no_clip():
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        audio = file.add_stream("aac", rate=16_000)
        audio.layout = "mono"
        for start in range(0, 16_000, 1_024):
            part = av.AudioFrame.from_ndarray(
                tone(1.0, 16_000)[None, start : start + 1_024], format="fltp", layout="mono"
            )
            part.sample_rate = 16_000
            file.mux(audio.encode(part))
        file.mux(audio.encode(None))
    assert reason(probe, out.getvalue(), "0.mp4") == "no_video"


def test_list_of_other_files_is_not_followed(tmp_path):
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(clip(every(2.0, 4)))
    evil = f"ffconcat version 1.0\nfile '{secret}'\n".encode()
    path = tmp_path / "0.mp4"
    path.write_bytes(evil)
    with av.open(str(path), options={"safe": "0"}) as container:  # the danger is real
        assert len(list(container.decode(video=0))) == 4
    assert reason(probe, evil, "0.mp4") == "bad_container"
    assert reason(decode_video, evil, [0], probe(secret.read_bytes(), "0.mp4")) == "bad_container"
    # Even behind bytes that look like a clip, the demuxer is fixed and nothing else is opened.
    disguised = b"\x00\x00\x00\x08ftyp\x00\x00\x00\x08moov" + evil
    assert reason(probe, disguised, "0.mp4") in ("corrupt", "truncated", "no_video")


MEMBERS = ["0.wav", "0.flac", "0.mp3", "0.png", "0.jpg", "0.mp4", "0.webm"]


@pytest.mark.parametrize("member", MEMBERS)
def test_damaged_bytes_never_raise_anything_else(member):
    """Flipped bits give a DataError or a readable file, which then decodes by its own row."""
    rng = np.random.default_rng(5)
    noise = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
    whole = {
        "0.wav": lambda: wav(tone(0.2, 16_000)),
        "0.flac": lambda: wav(tone(0.2, 16_000), container="FLAC"),
        "0.mp3": lambda: wav(tone(0.2, 16_000), container="MP3"),
        "0.png": lambda: encoded(noise, "PNG"),
        "0.jpg": lambda: encoded(noise, "JPEG"),
        "0.mp4": lambda: clip(every(4.0, 6), sound=tone(1.0, 16_000)),
        "0.webm": lambda: clip(every(4.0, 6), container="webm", video_codec="libvpx-vp9"),
    }[member]()
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 20)):
            data[place] = rng.integers(0, 256)
        try:
            info = probe(bytes(data), member)
            if info.has_audio:
                decode_audio(bytes(data), info)
            if info.kind is MediaKind.video:
                decode_video(bytes(data), [0], info)
        except DataError:
            refused += 1
    assert refused > 0
