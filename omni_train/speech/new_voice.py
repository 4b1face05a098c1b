"""What the released decoder must know of a new speaker: a mel of it, and its embedding.

    recording -> ref_mel [1, L, 80]      log-mel at 100 frames a second
    cond [1, C]                          given in a file, copied from a known speaker, or fitted

What made the released `cond` is not public (RECIPE.md section 5). Fitting follows the gradient of
the flow-matching loss through the frozen DiT, on codes of the new voice and the sound they stand
for. The mel is ours too: 24 kHz, hop 240, 1024-point FFT, Slaney's filters, natural logarithm.

Letters: L mel frames, M = 80 bins, C numbers of an embedding, S samples.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from omni_train.config.errors import ConfigError
from omni_train.engine.distributed import barrier
from omni_train.engine.run import Run
from omni_train.models.talker_layout import TalkerSpec
from omni_train.speech.codec import CodecConfig, CodecKind, load_codec, parse_codes
from omni_train.speech.token2wav import SPEAKERS_FILE, Token2WavCodec, load_speakers

_RATE_HZ, _HOP, _FFT, _BINS = 24_000, 240, 1024, 80
# Seconds of a recording that are kept, as in the release.
_REFERENCE_S = 4.0
_FLOOR = 1e-5
_FIT_LR = 1e-2


class CondSource(Enum):
    """Where a speaker's embedding is from."""

    given = "given"
    copied = "copied"
    fitted = "fitted"


@dataclass(kw_only=True, slots=True)
class VoiceConfig:
    """One new speaker.

    Args:
        recording: sound file of the speaker, some seconds long.
        cond: where its embedding is from.
        given: `.npy` with the embedding [C]; with cond=given.
        known: name of the speaker whose embedding is copied, or that fitting starts from.
        codes: `.npy` with the recording's codes; with cond=fitted.
        fit_steps: updates of a fit.
    """

    recording: str
    cond: CondSource = CondSource.copied
    given: str = ""
    known: str = ""
    codes: str = ""
    fit_steps: int = 100

    def __post_init__(self) -> None:
        given, fitted = self.cond is CondSource.given, self.cond is CondSource.fitted
        for name, wrong in (
            ("given", bool(self.given) != given),
            ("known", bool(self.known) == given),
            ("codes", bool(self.codes) != fitted),
            ("fit_steps", self.fit_steps < 1),
        ):
            if wrong:
                raise ConfigError(
                    key=f"decoder.voices.*.{name}",
                    value=getattr(self, name),
                    rule=f"cond={self.cond.name}: given needs `given`, the others `known`, and "
                    "fitted `codes` too; fit_steps is at least 1",
                    remedy="set what belongs to it, and leave the rest out",
                )


@dataclass(kw_only=True, slots=True)
class DecoderConfig:
    """The released decoder and the voices that it gets.

    Args:
        path: directory of the released model, with `spk_dict.pt`; empty where codes hold the voice.
        voices: by the name of the new speaker.
    """

    path: str = ""
    voices: dict[str, VoiceConfig] = field(default_factory=dict)


def write_voices(config: DecoderConfig, spec: TalkerSpec, run: Run) -> None:
    """Write `spk_dict.pt` of the run: all voices of before, unchanged, and the new ones.

    Rank 0 makes it; all ranks must call.

    Args:
        config: decoder and voices.
        spec: of the Talker, for the speakers' tokens.
        run: directory.

    Raises:
        ConfigError: a file that a voice names cannot be used.
    """
    path = run.dir / SPEAKERS_FILE
    if run.is_main and not path.exists():
        decoder = load_codec(
            CodecConfig(path=config.path, kind=CodecKind.token2wav), run.world.device
        )
        assert isinstance(decoder, Token2WavCodec), "the kind was given"
        source = Path(config.path) / SPEAKERS_FILE
        # Checks what is in it, too.
        known = load_speakers(source)
        table: dict[str, Any] = torch.load(source, map_location="cpu", weights_only=True)
        for name, voice in config.voices.items():
            mel = reference_mel(voice.recording)
            if voice.cond is not CondSource.given and voice.known not in known:
                raise _wrong(name, "known", voice.known, "no such speaker in spk_dict.pt")
            if voice.cond is CondSource.given:
                cond = _given(name, voice, next(iter(known.values())).cond.shape[1])
            else:
                cond = known[voice.known].cond.clone()
            if voice.cond is CondSource.fitted:
                codes = _codes(name, voice, decoder)
                cond, first, last = fit_cond(decoder, codes, mel, cond, steps=voice.fit_steps)
                run.event("voice_fit", voice=name, loss_first=first, loss_last=last)
            token = spec.speakers[name]
            table[name] = {"bos_token": token, "cond": cond, "ref_mel": mel}
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        torch.save(table, temporary)
        temporary.replace(path)
    barrier()
    run.event("voices", file=SPEAKERS_FILE, new=sorted(config.voices))


def reference_mel(recording: str) -> Tensor:
    """Return float32 [1, L, M] of the first four seconds of a sound file.

    Raises:
        ConfigError: it cannot be read, or is too short for a frame.
    """
    try:
        wave, rate_hz = soundfile.read(recording, dtype="float32", always_2d=True)
    except (OSError, soundfile.SoundFileError) as error:
        raise _wrong("*", "recording", recording, f"no readable sound: {error}") from error
    mono = soxr.resample(wave.mean(axis=1), rate_hz, _RATE_HZ, quality="HQ")
    return log_mel_24k(torch.from_numpy(mono[: round(_REFERENCE_S * _RATE_HZ)]))[None]


def log_mel_24k(wave: Tensor) -> Tensor:
    """Return log-mel float32 [L, M] of wave float32 [S] at 24 kHz, L = S // 240."""
    if wave.numel() < _FFT:
        raise _wrong("*", "recording", wave.numel(), "shorter than one window of 43 ms")
    filters = mel_filter_bank(
        num_frequency_bins=_FFT // 2 + 1,
        num_mel_filters=_BINS,
        min_frequency=0.0,
        max_frequency=_RATE_HZ / 2,
        sampling_rate=_RATE_HZ,
        norm="slaney",
        mel_scale="slaney",
    )
    window = torch.hann_window(_FFT)
    spectrum = torch.stft(wave.float(), _FFT, _HOP, window=window, return_complex=True).abs()
    mel = torch.from_numpy(filters).float().T @ spectrum
    return mel.clamp(min=_FLOOR).log().T[: wave.numel() // _HOP].contiguous()


def fit_cond(
    decoder: Token2WavCodec, codes: Tensor, mel: Tensor, start: Tensor, *, steps: int, seed: int = 0
) -> tuple[Tensor, float, float]:
    """Return the embedding [1, C] under which the decoder turns codes into a mel best.

    Args:
        decoder: frozen.
        codes: int64 [T] of the sound.
        mel: float32 [1, L, M] of the same sound; also the reference.
        start: embedding [1, C] to start from.
        steps: updates.
        seed: of times and noise.

    Returns:
        The embedding, and the loss under the same noise before and after.
    """
    frames = min(mel.shape[1], decoder.mel_frames(codes))
    codes, target = codes[: -(-frames // decoder.frames_per_code)], mel[:, :frames]
    short = decoder.mel_frames(codes) - frames
    target = torch.nn.functional.pad(target, (0, 0, 0, short))
    cond = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([cond], lr=_FIT_LR)

    def loss(generator: torch.Generator) -> Tensor:
        noise = torch.randn(target.shape, generator=generator)
        time = torch.rand(1, generator=generator)
        state = (1 - time) * noise + time * target
        found = decoder.flow(state, codes, cond, mel, time)
        return torch.nn.functional.mse_loss(found, target - noise)

    def judged() -> float:
        with torch.no_grad():
            found = [loss(torch.Generator().manual_seed(seed + 1 + i)) for i in range(8)]
        return float(torch.stack(found).mean())

    before, generator = judged(), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(generator).backward()
        optimizer.step()
    return cond.detach(), before, judged()


def _given(name: str, voice: VoiceConfig, size: int) -> Tensor:
    try:
        values = np.load(voice.given, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _wrong(name, "given", voice.given, f"no NumPy file: {error}") from error
    if values.size != size or not np.isfinite(values.astype(np.float64)).all():
        raise _wrong(name, "given", voice.given, f"the decoder takes {size} finite numbers")
    return torch.from_numpy(values.astype(np.float32)).view(1, size)


def _codes(name: str, voice: VoiceConfig, decoder: Token2WavCodec) -> Tensor:
    try:
        return parse_codes(Path(voice.codes).read_bytes(), decoder.codebook_size)
    except (OSError, ValueError) as error:
        raise _wrong(name, "codes", voice.codes, f"no codes of this decoder: {error}") from error


def _wrong(voice: str, key: str, value: object, rule: str) -> ConfigError:
    return ConfigError(
        key=f"decoder.voices.{voice}.{key}", value=value, rule=rule, remedy="give another file"
    )
