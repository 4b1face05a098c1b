"""The mel_kmeans codec: exact search, the same codes everywhere, and words that come back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jiwer
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from data_pipelines.demo_content import VOCABULARY
from data_pipelines.voices import SAMPLE_RATE_HZ, speak
from omni_train.config.errors import ConfigError, DataError
from omni_train.speech.asr import PocketSphinxRecognizer
from omni_train.speech.codec import CodecConfig, Speaker, dump_codes, load_codec, parse_codes
from omni_train.speech.codec_fit import starting_centroids
from omni_train.speech.mel import _filters
from omni_train.speech.mel_kmeans import MelKMeansCodec, MelKMeansConfig, nearest, stacked_mel

CONFIG = MelKMeansConfig(frame_rate_hz=25, codebook_size=64)
TEXTS = ("river doctor", "happy paper thousand", "monday summer", "window", "purple seven apple")


@pytest.fixture(scope="module")
def frames() -> Tensor:
    waves = [torch.from_numpy(speak(text, "en-us")) for text in (*TEXTS, " ".join(VOCABULARY))]
    return torch.cat([stacked_mel(wave, SAMPLE_RATE_HZ, CONFIG) for wave in waves])


@pytest.fixture(scope="module")
def codec(frames: Tensor) -> MelKMeansCodec:
    return MelKMeansCodec(CONFIG, starting_centroids(frames, 64, seed=0))


def test_filters_are_those_of_log_mel() -> None:
    table = mel_filter_bank(201, 80, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney")
    assert np.array_equal(table.T.astype(np.float32), _filters(80).numpy())


def test_nearest_is_exact_whatever_the_batch(frames: Tensor) -> None:
    extreme = torch.full((2, frames.shape[1]), 32_767, dtype=torch.int16)
    table = torch.cat([frames[:40], frames[3:5], extreme, -extreme])
    rows = torch.cat([frames, extreme])
    found = nearest(table, rows)
    # NumPy on whole numbers, which cannot round.
    differences = rows.numpy().astype(np.int64)[:, None] - table.numpy().astype(np.int64)[None]
    distances = (differences**2).sum(axis=2)
    assert np.array_equal(found.codes.numpy(), distances.argmin(axis=1))
    assert np.array_equal(found.distances.numpy(), distances.min(axis=1))
    for size in (1, 7):
        parts = torch.cat([nearest(table, block).codes for block in rows.split(size)])
        assert torch.equal(parts, found.codes)


def test_starting_centroids_are_frames_and_differ(frames: Tensor) -> None:
    chosen = starting_centroids(frames, 64, seed=0)
    assert torch.equal(chosen, starting_centroids(frames, 64, seed=0))
    assert not torch.equal(chosen, starting_centroids(frames, 64, seed=1))
    assert len(torch.unique(chosen, dim=0)) == 64
    assert nearest(frames, chosen).distances.max() == 0
    with pytest.raises(ConfigError, match="only 3 different"):
        starting_centroids(frames[:3].repeat(5, 1), 4, seed=0)


@pytest.mark.parametrize(("seconds", "codes"), [(1.0, 25), (1.001, 26), (0.0001, 1)])
def test_number_of_codes_is_the_duration_rounded_up(
    codec: MelKMeansCodec, seconds: float, codes: int
) -> None:
    wave = torch.sin(torch.arange(round(seconds * 16_000)) * 0.1)
    found = codec.encode(wave, 16_000)
    assert (found.dtype, found.shape) == (torch.int64, (codes,))
    assert codec.decode(found).shape == (codes * 640,)


def test_level_and_rate_of_a_wave_change_little(codec: MelKMeansCodec) -> None:
    wave = torch.from_numpy(speak(TEXTS[1], "en-us"))
    codes = codec.encode(wave, 16_000)
    assert (codec.encode(0.25 * wave, 16_000) == codes).float().mean() > 0.97
    doubled = torch.from_numpy(np.repeat(wave.numpy(), 2))
    assert codec.encode(doubled, 32_000).shape == codes.shape


def test_decoding_repeats(codec: MelKMeansCodec) -> None:
    codes = codec.encode(torch.from_numpy(speak(TEXTS[0], "en-us")), 16_000)
    assert torch.equal(codec.decode(codes), codec.decode(codes))


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_a_stream_is_the_whole_decode(codec: MelKMeansCodec, piece: int) -> None:
    codes = codec.encode(torch.from_numpy(speak(" ".join(VOCABULARY[:6]), "en-us")), 16_000)
    assert len(codes) > 4 * codec.reach_codes
    whole = codec.decode(codes)
    blocks = list(codec.stream(codes.split(piece)))
    assert len(blocks) > 3 or piece == 1000
    together = torch.cat(blocks)
    assert together.shape == whole.shape
    # Products of other shapes may round differently.
    torch.testing.assert_close(together, whole, rtol=0, atol=1e-5)
    assert whole.abs().max() > 0.2


def test_a_stream_speaks_before_the_codes_end(codec: MelKMeansCodec) -> None:
    taken: list[Tensor] = []

    def counted() -> Iterator[Tensor]:
        for piece in torch.arange(64).repeat(4).split(1):
            taken.append(piece)
            yield piece

    stream = codec.stream(counted())
    first = next(stream)
    assert len(taken) == len(first) // 640 + codec.reach_codes
    assert sum(map(len, stream)) + len(first) == 256 * 640
    assert list(codec.stream([])) == []


def test_words_come_back(codec: MelKMeansCodec) -> None:
    recognizer = PocketSphinxRecognizer(VOCABULARY)
    waves = [torch.from_numpy(speak(text, "en-us")) for text in TEXTS]
    heard = [
        recognizer.transcribe(codec.decode(codec.encode(wave, 16_000)).numpy()).text
        for wave in waves
    ]
    assert jiwer.wer(list(TEXTS), heard) <= 0.1
    # The words are in the codes, not in the decoder: others say something else.
    shifted = (codec.encode(waves[1], 16_000) + 7) % 64
    assert recognizer.transcribe(codec.decode(shifted).numpy()).text != TEXTS[1]


def test_what_cannot_be_used_is_refused(codec: MelKMeansCodec) -> None:
    speaker = Speaker("x", torch.zeros(1, 192), torch.zeros(1, 400, 80))
    with pytest.raises(ConfigError, match="cannot use a speaker"):
        codec.decode(torch.tensor([1]), speaker)
    for wrong in (torch.tensor([64]), torch.tensor([-1]), torch.tensor([]), torch.tensor([0.5])):
        with pytest.raises(DataError, match="bad_codes"):
            codec.decode(wrong)
    for wave, reason in (
        (torch.zeros(2, 9), "bad_wave"),
        (torch.tensor([torch.nan]), "non_finite"),
    ):
        with pytest.raises(DataError, match=reason):
            codec.encode(wave, 16_000)
    with pytest.raises(DataError, match="bad_rate"):
        codec.encode(torch.ones(9), 0)


def test_saved_and_loaded_strictly(codec: MelKMeansCodec, tmp_path: Path) -> None:
    codec.save(tmp_path / "codec")
    for path in (tmp_path, tmp_path / "codec"):
        loaded = load_codec(CodecConfig(path=str(path)))
        assert isinstance(loaded, MelKMeansCodec)
        assert (loaded.config, loaded.fingerprint) == (codec.config, codec.fingerprint)
    settings, weights = (tmp_path / "codec" / f"codec.{end}" for end in ("json", "safetensors"))
    good, data = json.loads(settings.read_text()), weights.read_bytes()
    for change in (
        {"extra": 1},
        {"format": 2},
        {"kind": "token2wav"},
        {"codebook_size": 65},
        {"frame_rate_hz": 25.0},
        {"frame_rate_hz": True},
        {"frame_rate_hz": 50},
    ):
        settings.write_text(json.dumps({**good, **change}))
        with pytest.raises(ConfigError, match=r"codec\.path"):
            MelKMeansCodec.load(tmp_path)
    settings.write_text(json.dumps(good))
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ConfigError, match="is not the file"):
        MelKMeansCodec.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"frame_rate_hz": 30}, {"codebook_size": 1}, {"num_mel_bins": 10}],
)
def test_settings_are_checked(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"codec\."):
        MelKMeansConfig(**change)


def numpy_file(array: np.ndarray, **options: bool) -> bytes:
    import io

    sink = io.BytesIO()
    np.save(sink, array, **options)
    return sink.getvalue()


def test_codes_as_files() -> None:
    codes = torch.tensor([0, 5, 63])
    assert torch.equal(parse_codes(dump_codes(codes), 64), codes)
    assert torch.equal(
        parse_codes(numpy_file(np.array([1, 2], np.uint16)), 64), torch.tensor([1, 2])
    )
    huge = dump_codes(codes).replace(b"(3,)", b"(9999999999,)", 1)
    for data in (
        b"",
        b"\x93NUMPY",
        huge,
        dump_codes(codes)[:-1],
        dump_codes(codes) + b"x",
        numpy_file(np.array([64])),
        numpy_file(np.array([-1])),
        numpy_file(np.array([2**64 - 1], np.uint64)),
        numpy_file(np.zeros((2, 2), np.int64)),
        numpy_file(np.zeros(2)),
        numpy_file(np.zeros(0, np.int64)),
        numpy_file(np.array([{}], dtype=object), allow_pickle=True),
        numpy_file(np.zeros(400_000, np.int8)),
    ):
        with pytest.raises(DataError, match="bad_codes"):
            parse_codes(data, 64)
