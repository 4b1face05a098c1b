"""A codec for machines without released weights: k-means on stacked mel frames, Griffin-Lim back.

    wave -> mel power, 10 ms frames -> compressed, stacked to a vector per code -> nearest centroid
    codes -> centroids -> mel power -> spectrum (non-negative least squares) -> Griffin-Lim -> wave

Waves are brought to one level first, so that loud and quiet voices share codes; `decode` returns
that level. Power is compressed by a root, not a logarithm: distances between near-silent bands,
which nobody hears, would otherwise take most codes.

The nearest centroid and the sums that a fit needs are computed exactly: features and centroids are
integers of 16 bits, so every product, and the sum of all of them, is a float64 without rounding.
So neither the number of ranks nor the order of the frames changes a centroid or a code.

Griffin-Lim is the fast variant with momentum (Perraudin, Balazs, Soendergaard, 2013).

Letters: S samples, T codes, K codebook, M mel bins, R mel frames per code, D = R * M, L = R * T.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from omni_train.config.errors import ConfigError, DamagedError, DataError, check_fields
from omni_train.data.index import write_atomically
from omni_train.speech.codec import (
    CodecKind,
    Speaker,
    arriving,
    check_codes,
    check_wave,
    refuse_speaker,
)
from omni_train.speech.mel import (
    HOP_SAMPLES,
    MAX_FREQUENCY_HZ,
    NUM_FFT,
    SAMPLE_RATE_HZ,
    SILENCE_SAMPLES,
    log_mel,
    to_16_khz,
)

FRAMES_PER_SECOND = SAMPLE_RATE_HZ // HOP_SAMPLES
CODEC_DIR = "codec"
_SETTINGS_FILE, _WEIGHTS_FILE = "codec.json", "codec.safetensors"
_FORMAT = 1
# Mel power p is kept as round(_STEPS * p ** _ROOT). On the demo's voices (25 Hz, 128 codes), of the
# roots 0.05 to 0.25, and of log-mel itself, 0.1 returned most words.
_ROOT = 0.1
_STEPS = 1 << 13
SQUARED_STEPS = _STEPS**2
_LARGEST = (1 << 15) - 1
_RMS = 0.07
_BLOCK_FRAMES = 8192
_MAX_RATE_HZ = 192_000
_MOMENTUM = 0.99
_PHASE_SEED = 0
_INVERSION_STEPS = 50
_TINY = 1e-10
# Of a stream.
_BLOCKS_PER_SECOND = 3


@dataclass(kw_only=True, slots=True)
class MelKMeansConfig:
    """Sizes of the codec.

    Args:
        frame_rate_hz: codes per second; divides the 100 mel frames of a second.
        codebook_size: number of codes.
        num_mel_bins: mel bins of a frame. Many resolve the harmonics of a voice, and codes go to
            its pitch: of one of the demo's voices at 25 Hz, 256 codes lost 9 % of the words with
            80 bins, 2 % with 24.
        griffin_lim_iterations: rounds of phase estimation when decoding.
    """

    frame_rate_hz: int = 50
    codebook_size: int = 256
    num_mel_bins: int = 24
    griffin_lim_iterations: int = 16

    def __post_init__(self) -> None:
        check_fields(
            self,
            "codec",
            ("frame_rate_hz", self.frame_rate_hz in (10, 20, 25, 50, 100), "must divide 100"),
            ("codebook_size", 2 <= self.codebook_size <= 1 << 15, "must be 2 to 32768"),
            ("num_mel_bins", 20 <= self.num_mel_bins <= 128, "must be 20 to 128"),
            ("griffin_lim_iterations", 1 <= self.griffin_lim_iterations <= 200, "is 1 to 200"),
            remedy="25 Hz with 256 codes and 24 mel bins were measured",
        )

    @property
    def frames_per_code(self) -> int:
        """Mel frames R that one code stands for."""
        return FRAMES_PER_SECOND // self.frame_rate_hz


class MelKMeansCodec:
    """The fitted codec.

    Args:
        config: sizes.
        centroids: int16 [K, D], compressed mel power (see `stacked_mel`).

    Raises:
        ConfigError: centroids of another shape or type.
    """

    sample_rate_hz = SAMPLE_RATE_HZ

    def __init__(self, config: MelKMeansConfig, centroids: Tensor) -> None:
        shape = (config.codebook_size, config.frames_per_code * config.num_mel_bins)
        if tuple(centroids.shape) != shape or centroids.dtype != torch.int16:
            raise ConfigError(
                key="codec.centroids",
                value=f"{centroids.dtype} {tuple(centroids.shape)}",
                rule=f"the settings ask for int16 {shape}",
                remedy="fit the codec anew with the recipe speech_codec",
            )
        self.config, self.centroids = config, centroids
        self.frame_rate_hz, self.codebook_size = config.frame_rate_hz, config.codebook_size

    @property
    def fingerprint(self) -> str:
        """xxh3-64 of the centroids, 16 hex digits: equal for codecs that give equal codes."""
        return str(xxhash.xxh3_64_hexdigest(self.centroids.contiguous().numpy().tobytes()))

    def encode(self, wave: Tensor, sample_rate_hz: int) -> Tensor:
        """Return codes int64 [T] of wave float32 [S], T = its duration in codes, rounded up."""
        return nearest(self.centroids, stacked_mel(wave, sample_rate_hz, self.config)).codes

    def decode(self, codes: Tensor, speaker: Speaker | None = None) -> Tensor:
        """Return float32 [S] at 16 kHz, S = T codes' duration; equal codes give equal waves."""
        refuse_speaker(CodecKind.mel_kmeans, speaker)
        return self._speak(codes, 0)

    def stream(self, codes: Iterable[Tensor], speaker: Speaker | None = None) -> Iterator[Tensor]:
        """Yield pieces of the wave while codes arrive; together they are a whole decode's.

        A block is spoken as soon as the codes after it that shape its sound have arrived.

        Args:
            codes: int64 pieces of any length.
            speaker: None, as for `decode`.
        """
        refuse_speaker(CodecKind.mel_kmeans, speaker)
        reach, block = self.reach_codes, -(-self.frame_rate_hz // _BLOCKS_PER_SECOND)
        spoken = 0
        for heard, more in arriving(codes):
            stop = len(heard) - reach if more else len(heard)
            if stop > spoken and (not more or stop - spoken >= block):
                first = max(spoken - reach, 0)
                wave = self._speak(heard[first : stop + reach], first)
                hop = self.config.frames_per_code * HOP_SAMPLES
                yield wave[(spoken - first) * hop : (stop - first) * hop]
                spoken = stop

    @property
    def reach_codes(self) -> int:
        """Codes to each side that shape the wave of one: Griffin-Lim looks further every round."""
        # A round takes whatever is wrong at a cut two mel frames further; the last overlap one.
        return -(-(2 * self.config.griffin_lim_iterations + 1) // self.config.frames_per_code)

    def _speak(self, codes: Tensor, first: int) -> Tensor:
        """Wave of codes int64 [T], the first of which is number `first` of its speech."""
        check_codes(codes, self.codebook_size)
        bins, frames = self.config.num_mel_bins, self.config.frames_per_code
        values = self.centroids[codes].reshape(-1, bins).T.to(torch.float32) / _STEPS
        power = values.pow(1.0 / _ROOT)
        magnitude = _spectrum(power, bins).sqrt()
        return _griffin_lim(magnitude, self.config.griffin_lim_iterations, first * frames)

    def save(self, folder: str | Path) -> None:
        """Write `codec.safetensors`, then `codec.json` with its hash; both appear whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        data = safetensors.torch.save({"centroids": self.centroids.contiguous()})
        record = {
            "format": _FORMAT,
            "kind": CodecKind.mel_kmeans.name,
            "weights_xxh3": xxhash.xxh3_64_hexdigest(data),
            **asdict(self.config),
        }
        write_atomically(folder / _WEIGHTS_FILE, data)
        write_atomically(folder / _SETTINGS_FILE, (json.dumps(record, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote, from its directory or the run that holds it.

        Raises:
            ConfigError: a file is missing or damaged, or says more or less than `save` does.
        """
        folder = Path(path)
        if (folder / CODEC_DIR).is_dir():
            folder = folder / CODEC_DIR
        try:
            record = json.loads((folder / _SETTINGS_FILE).read_bytes())
            data = (folder / _WEIGHTS_FILE).read_bytes()
            if not isinstance(record, dict):
                raise ValueError(f"{_SETTINGS_FILE} holds no object")
            settings = _settings(record)
            if xxhash.xxh3_64_hexdigest(data) != record["weights_xxh3"]:
                raise ValueError(f"{_WEIGHTS_FILE} is not the file that {_SETTINGS_FILE} names")
            tensors = safetensors.torch.load(data)
            if set(tensors) != {"centroids"}:
                raise ValueError(f"{_WEIGHTS_FILE} holds {sorted(tensors)}, not centroids alone")
            return cls(settings, tensors["centroids"])
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            refused = ConfigError if isinstance(error, OSError) else DamagedError
            raise refused(
                key="codec.path",
                value=str(path),
                rule=f"no usable mel_kmeans codec: {error}",
                remedy="give a finished run of speech_codec",
            ) from error


def _settings(record: dict[str, object]) -> MelKMeansConfig:
    names = {spec.name for spec in fields(MelKMeansConfig)}
    given = {name: value for name, value in record.items() if name in names}
    others = {name: value for name, value in record.items() if name not in names}
    expected = {"format", "kind", "weights_xxh3"}
    if set(given) != names or set(others) != expected:
        raise ValueError(f"settings are {sorted(record)}, not {sorted(names | expected)}")
    if (others["format"], others["kind"]) != (_FORMAT, CodecKind.mel_kmeans.name):
        raise ValueError(f"format {others['format']!r} of {others['kind']!r} is not read here")
    for name, value in given.items():
        if type(value) is not int:
            raise ValueError(f"{name} is {value!r}, no integer")
    return MelKMeansConfig(**given)  # type: ignore[arg-type]


def stacked_mel(wave: Tensor, sample_rate_hz: int, config: MelKMeansConfig) -> Tensor:
    """Return int16 [T, D]: R frames of compressed mel power of wave float32 [S] a row.

    The wave is scaled to one level and followed by silence up to a whole code.

    Raises:
        DataError: `bad_wave`, `non_finite`, `bad_rate`.
    """
    check_wave(wave)
    if not 0 < sample_rate_hz <= _MAX_RATE_HZ:
        raise DataError("bad_rate", f"{sample_rate_hz} Hz is no rate of a wave")
    wave = torch.from_numpy(to_16_khz(wave.to(torch.float32).numpy(), sample_rate_hz))
    wave = wave * (_RMS / max(float(wave.square().mean().sqrt()), _TINY))
    samples_per_code = SAMPLE_RATE_HZ // config.frame_rate_hz
    # The transform reflects the wave at its start, which a shorter one does not allow.
    whole = max(wave.numel(), samples_per_code)
    wave = torch.nn.functional.pad(wave, (0, whole - wave.numel() + -whole % samples_per_code))
    # Undoes Whisper's scaling of the decimal logarithm.
    exponent = _ROOT * (4.0 * log_mel(wave, config.num_mel_bins).to(torch.float64) - 4.0)
    steps = torch.round(_STEPS * torch.pow(10.0, exponent)).clamp_(max=_LARGEST)
    return steps.T.reshape(-1, config.frames_per_code * config.num_mel_bins).to(torch.int16)


@dataclass(frozen=True, slots=True)
class Nearest:
    """Result of a search.

    Args:
        codes: int64 [T], index of the nearest centroid; the lowest of equally near ones.
        distances: int64 [T], squared distance to it in squared steps.
    """

    codes: Tensor
    distances: Tensor


def nearest(centroids: Tensor, frames: Tensor) -> Nearest:
    """Search the nearest of centroids int16 [K, D] for each of frames int16 [T, D], exactly."""
    # Each product is below 2 ** 30 and there are fewer than 2 ** 13 of them: float64 is exact.
    table = centroids.to(torch.float64)
    norms = (table * table).sum(dim=1)
    codes, distances = [], []
    for block in frames.split(_BLOCK_FRAMES):
        rows = block.to(torch.float64)
        score = torch.addmm(norms, rows, table.T, alpha=-2.0)
        found = score.min(dim=1)
        # `min` may return any of several equal ones.
        first = (score == found.values[:, None]).to(torch.uint8).argmax(dim=1)
        codes.append(first)
        distances.append((found.values + (rows * rows).sum(dim=1)).to(torch.int64))
    return Nearest(torch.cat(codes), torch.cat(distances))


@lru_cache(maxsize=2)
def _inversion(num_mel_bins: int) -> tuple[Tensor, Tensor]:
    """Filters [M, F] and their pseudo-inverse [F, M], float32."""
    # Those of log_mel, which a test holds to these.
    table = mel_filter_bank(
        num_frequency_bins=NUM_FFT // 2 + 1,
        num_mel_filters=num_mel_bins,
        min_frequency=0.0,
        max_frequency=MAX_FREQUENCY_HZ,
        sampling_rate=SAMPLE_RATE_HZ,
        norm="slaney",
        mel_scale="slaney",
    )
    filters = torch.from_numpy(table.T.astype(np.float32))
    return filters, torch.linalg.pinv(filters.to(torch.float64)).to(torch.float32)


def _spectrum(power: Tensor, num_mel_bins: int) -> Tensor:
    """Non-negative spectrum [F, L] whose mel power is `power` [M, L], as near as possible.

    Multiplicative updates (Lee and Seung, 2001) from the clamped pseudo-inverse: what starts
    positive stays positive.
    """
    filters, inverse = _inversion(num_mel_bins)
    spectrum = (inverse @ power).clamp_(min=_TINY)
    wanted = filters.T @ power
    gram = filters.T @ filters
    for _ in range(_INVERSION_STEPS):
        spectrum *= wanted / (gram @ spectrum).clamp_(min=_TINY)
    return spectrum.clamp_(min=_TINY)


def _griffin_lim(magnitude: Tensor, iterations: int, first_frame: int) -> Tensor:
    """Wave float32 [160 * L] whose short-time spectrum has nearly the given magnitude [F, L].

    A frame starts from the same random phase wherever the speech is cut; `first_frame` says where.
    """
    generator = torch.Generator().manual_seed(_PHASE_SEED)
    bins, stop = magnitude.shape[0], first_frame + magnitude.shape[1]
    phase = torch.rand(stop, bins, generator=generator)[first_frame:].T * (2 * torch.pi)
    angles = torch.polar(torch.ones_like(phase), phase)
    window = torch.hann_window(NUM_FFT)
    length = magnitude.shape[1] * HOP_SAMPLES

    def to_wave(spectrum: Tensor) -> Tensor:
        # One frame more, of silence, so that the last samples lie under a whole window too.
        padded = torch.nn.functional.pad(spectrum, (0, 1))
        return torch.istft(padded, NUM_FFT, HOP_SAMPLES, window=window, length=length)

    previous = torch.zeros_like(angles)
    for _ in range(iterations):
        wave = to_wave(magnitude * angles)
        padded = torch.nn.functional.pad(wave, (0, SILENCE_SAMPLES))
        rebuilt = torch.stft(padded, NUM_FFT, HOP_SAMPLES, window=window, return_complex=True)
        rebuilt = rebuilt[:, : magnitude.shape[1]]
        angles = rebuilt + _MOMENTUM * (rebuilt - previous)
        angles = angles / angles.abs().clamp_(min=_TINY)
        previous = rebuilt
    wave = to_wave(magnitude * angles)
    return torch.from_numpy(np.clip(wave.numpy(), -1.0, 1.0))
