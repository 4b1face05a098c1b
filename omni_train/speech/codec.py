"""Speech codecs: what all of them offer, which there are, and codes as files.

    mel_kmeans   ours: encodes and decodes; the voice is in the codes (mel_kmeans.py)
    token2wav    the released decoder: decodes, in the voice it is given (token2wav.py)

Letters: S samples of a wave, T codes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from omni_train.config.errors import ConfigError, DataError

CODES_SUFFIX = ".codes.npy"
# Beside the shards of a set to which codes were added: of which codec they are.
CODES_FILE = "codes.json"
# Two hours at 50 codes a second; a file that declares more is not speech of one sample.
MAX_CODES = 360_000
_MAX_HEADER_BYTES = 4096
_MAX_ITEM_BYTES = 8


@dataclass(frozen=True, slots=True)
class Speaker:
    """A voice for a decoder that takes one (RECIPE.md section 5).

    Args:
        name: for messages.
        cond: float32 [1, C], the speaker's embedding; C is 192 in the release.
        ref_mel: float32 [1, L, M], log-mel of a reference; L frames of M = 80 bins.
    """

    name: str
    cond: Tensor
    ref_mel: Tensor


class Codec(Protocol):
    """Waves to codes and back.

    Attributes:
        sample_rate_hz: of the waves that `decode` returns.
        frame_rate_hz: codes per second.
        codebook_size: codes are 0 .. codebook_size - 1.
    """

    sample_rate_hz: int
    frame_rate_hz: int
    codebook_size: int

    @property
    def fingerprint(self) -> str:
        """Equal for codecs that give equal codes; empty for one that gives none."""
        ...

    def encode(self, wave: Tensor, sample_rate_hz: int) -> Tensor:
        """Return codes int64 [T] of wave float32 [S].

        Raises:
            ConfigError: the codec has no encoder.
            DataError: `bad_wave`, `non_finite`, `bad_rate`.
        """
        ...

    def decode(self, codes: Tensor, speaker: Speaker | None = None) -> Tensor:
        """Return a wave float32 [S] at `sample_rate_hz` of codes int64 [T].

        Raises:
            ConfigError: a speaker was given to a codec that cannot use one, or none was given to
                a codec that needs one.
            DataError: `bad_codes`.
        """
        ...

    def stream(self, codes: Iterable[Tensor], speaker: Speaker | None = None) -> Iterator[Tensor]:
        """Yield pieces of the wave while int64 pieces of the codes arrive; raises as `decode`."""
        ...


class CodecKind(Enum):
    """Implementations."""

    mel_kmeans = "mel_kmeans"
    token2wav = "token2wav"


@dataclass(kw_only=True, slots=True)
class CodecConfig:
    """Which codec.

    Args:
        path: `mel_kmeans`: the run of `speech_codec` or its `codec` directory; `token2wav`: a
            directory of the released model.
        kind: implementation.
    """

    path: str
    kind: CodecKind = CodecKind.mel_kmeans

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError(
                key="codec.path",
                value=self.path,
                rule="a codec is read from a directory",
                remedy="give the run directory of speech_codec, or of a released model",
            )


def load_codec(config: CodecConfig, device: torch.device | None = None) -> Codec:
    """Read a codec.

    Args:
        config: which, and where.
        device: where a network computes; the CPU where left out.

    Raises:
        ConfigError: nothing usable at `config.path`.
    """
    if config.kind is CodecKind.mel_kmeans:
        from omni_train.speech.mel_kmeans import MelKMeansCodec

        return MelKMeansCodec.load(config.path)
    from omni_train.speech.token2wav import Token2WavCodec

    return Token2WavCodec.load(config.path, device)


def load_voices(config: CodecConfig) -> dict[str, Speaker] | None:
    """Return the voices a codec can speak in, by name; None where the voice is in its codes.

    Raises:
        ConfigError: `spk_dict.pt` is missing beside a decoder that needs it, or damaged.
    """
    if config.kind is CodecKind.mel_kmeans:
        return None
    from omni_train.speech.token2wav import SPEAKERS_FILE, load_speakers

    return load_speakers(Path(config.path) / SPEAKERS_FILE)


def find_voice(voices: dict[str, Speaker] | None, name: str, *, key: str) -> Speaker | None:
    """Return the voice that a codec speaks in; None where the voice is in its codes.

    Args:
        voices: of `load_voices`.
        name: of the speaker.
        key: setting that names the codec, for the message.

    Raises:
        ConfigError: the decoder has no such voice.
    """
    if voices is None:
        return None
    if name not in voices:
        raise ConfigError(
            key=key,
            value=", ".join(sorted(voices)),
            rule=f"its decoder has no voice {name!r}",
            remedy="add the voice to its spk_dict.pt",
        )
    return voices[name]


def check_codebook(codec: Codec, num_codes: int, *, key: str) -> None:
    """Refuse a codec that is not the model's.

    Args:
        codec: that decodes what the model samples.
        num_codes: of the model.
        key: setting that names the codec, for the message.

    Raises:
        ConfigError: they have different numbers of codes.
    """
    if num_codes != codec.codebook_size:
        raise ConfigError(
            key=key,
            value=f"a codebook of {codec.codebook_size}",
            rule=f"the Talker has {num_codes} codes",
            remedy="give the codec that its training data were encoded with",
        )


def arriving(codes: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Yield all codes int64 [T] so far after each piece, and whether more may come.

    The last item says that none will; there is none where no code came at all.
    """
    heard = torch.empty(0, dtype=torch.int64)
    for piece in codes:
        heard = torch.cat([heard, piece])
        yield heard, True
    if len(heard):
        yield heard, False


def check_wave(wave: Tensor) -> None:
    """Refuse what no codec can encode.

    Raises:
        DataError: `bad_wave` where it is not [S] with S > 0, `non_finite`.
    """
    if wave.ndim != 1 or not wave.numel():
        raise DataError("bad_wave", f"a wave is [S] with S > 0, not {tuple(wave.shape)}")
    if not bool(torch.isfinite(wave).all()):
        raise DataError("non_finite", "the wave holds NaN or infinity")


def check_codes(codes: Tensor, codebook_size: int) -> None:
    """Refuse codes that lie outside a codebook.

    Raises:
        DataError: `bad_codes` for another shape or type, none at all, or a code out of range.
    """
    if codes.ndim != 1 or codes.dtype != torch.int64 or not codes.numel():
        raise DataError(
            "bad_codes", f"codes are int64 [T] with T > 0, not {codes.dtype} {tuple(codes.shape)}"
        )
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= codebook_size:
        raise DataError("bad_codes", f"codes {low} to {high} in a codebook of {codebook_size}")


def refuse_speaker(kind: CodecKind, speaker: Speaker | None) -> None:
    """Raise where a codec whose codes hold the voice is told to use another one."""
    if speaker is not None:
        raise ConfigError(
            key="speaker",
            value=speaker.name,
            rule=f"{kind.name} cannot use a speaker: the voice is in its codes",
            remedy="leave the speaker out, or use a codec with a speaker-conditioned decoder",
        )


def dump_codes(codes: Tensor) -> bytes:
    """Return a `.codes.npy` member: codes int64 [T] as int32."""
    sink = io.BytesIO()
    np.save(sink, codes.numpy().astype("<i4"), allow_pickle=False)
    return sink.getvalue()


def parse_codes(data: bytes, codebook_size: int) -> Tensor:
    """Return codes int64 [T] of a `.codes.npy` member, ours or foreign.

    The header is read before anything is allocated, so a file cannot ask for more memory than
    its own bytes.

    Args:
        data: a NumPy file of one integer vector.
        codebook_size: codes must lie below it.

    Raises:
        DataError: `bad_codes` for anything else.
    """
    if len(data) > MAX_CODES * _MAX_ITEM_BYTES + _MAX_HEADER_BYTES:
        raise DataError("bad_codes", f"{len(data)} bytes are more than {MAX_CODES} codes")
    source = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(source)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
        if read is None:
            raise DataError("bad_codes", f"NumPy file of version {version}, not (1, 0)")
        shape, _, dtype = read(source, max_header_size=_MAX_HEADER_BYTES)
        if dtype.kind not in "iu" or len(shape) != 1:
            raise DataError("bad_codes", f"codes are an integer vector, not {dtype} {shape}")
        if not 0 < shape[0] <= MAX_CODES or source.tell() + shape[0] * dtype.itemsize != len(data):
            raise DataError("bad_codes", f"{shape[0]} codes of {dtype} in {len(data)} bytes")
        codes = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError("bad_codes", f"no NumPy file: {error}") from error
    if int(codes.max()) >= codebook_size:
        raise DataError("bad_codes", f"code {codes.max()} in a codebook of {codebook_size}")
    tensor = torch.from_numpy(codes.astype(np.int64))
    check_codes(tensor, codebook_size)
    return tensor
