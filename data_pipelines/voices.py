"""Synthetic speech by espeak-ng, the same for the same text in every process and call order.

Done here: text to a wave at 16 kHz, silence at both ends cut. Not done here: judging whether a
voice is understood (demo_corpus.py measures that with a recogniser).

espeak-ng keeps state in the library's globals (the phase of its pitch flutter, the noise
generator, the Klatt filter's memory) and has no call that resets all of it; even initialising it
again does not. So the shared library is loaded afresh for each utterance and unloaded after it.
"""

from __future__ import annotations

import ctypes
import threading
from _ctypes import dlclose
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import espeakng_loader
import numpy as np
import soxr
from numpy.typing import NDArray

from omni_train.config.errors import ConfigError

SAMPLE_RATE_HZ = 16_000
KEPT_SILENCE_S = 0.03
# Quieter than this share of the peak counts as silence at the ends.
_SILENCE = 0.01

_AUDIO_OUTPUT_SYNCHRONOUS = 2
_PARAMETER_RATE = 1
_CHARS_UTF8 = 1
_RANDOM_SEED = 1
# The British voice answers to the name of its file only.
_BASES = {"en-us": "en-us", "en-gb": "gmw/en"}

_SynthCallback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@dataclass(slots=True)
class _Sink:
    """Where the callback leaves the samples of the utterance that is being spoken."""

    parts: list[bytes] = field(default_factory=list)


_lock = threading.Lock()
_sink = _Sink()


def _receive(wave: Any, num_samples: int, events: int | None) -> int:
    if wave and num_samples > 0:
        _sink.parts.append(ctypes.string_at(wave, num_samples * 2))
    return 0


# Kept for the life of the process: the library holds only its address.
_receiver = _SynthCallback(_receive)


def speak(text: str, voice: str, words_per_minute: int = 160) -> NDArray[np.float32]:
    """Speak a text; equal arguments give equal samples, in any process and order of calls.

    Calls from several threads wait for one another.

    Args:
        text: English words.
        voice: `en-us` or `en-gb`, with a variant of espeak-ng's after a plus sign: `en-us+f2`.
        words_per_minute: espeak-ng's rate, 80 to 450.

    Returns:
        float32 [S], mono at 16 kHz, with 30 ms kept before and after the sound.

    Raises:
        ConfigError: an unknown voice, a rate outside the range, or a text without any sound.
    """
    base = _voice_name(voice)
    if not 80 <= words_per_minute <= 450:
        raise ConfigError(
            key="words_per_minute",
            value=words_per_minute,
            rule="espeak-ng speaks 80 to 450 words per minute",
            remedy="160 is recognised well",
        )
    with _lock:
        pcm, rate_hz = _synthesize(text, base, words_per_minute)
    wave = np.frombuffer(pcm, dtype="<i2").astype(np.float32) / 32768.0
    if not wave.any():
        raise ConfigError(
            key="text", value=text, rule="the text has no sound", remedy="give at least one word"
        )
    return _cut_silence(soxr.resample(wave, rate_hz, SAMPLE_RATE_HZ, quality="HQ"))


def _voice_name(voice: str) -> str:
    """Name under which espeak-ng finds the voice; it ignores an unknown variant without a word."""
    base, plus, variant = voice.partition("+")
    known = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    if base not in _BASES or (plus and not (variant.isalnum() and (known / variant).is_file())):
        raise ConfigError(
            key="voice",
            value=voice,
            rule=f"a voice is one of {', '.join(_BASES)}, with +VARIANT where one is wanted",
            remedy=f"variants are the names in {known.name} of espeak-ng's data: m1, f2, klatt ...",
        )
    return _BASES[base] + plus + variant


def _synthesize(text: str, voice: str, words_per_minute: int) -> tuple[bytes, int]:
    """Return 16-bit samples and their rate in Hz; see the module's text for the fresh library."""
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        _sink.parts = []
        data_path = espeakng_loader.get_data_path().encode()
        rate_hz = int(library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path, 0))
        if rate_hz <= 0:
            raise RuntimeError(f"espeak_Initialize gave {rate_hz} for {data_path!r}")
        library.espeak_SetSynthCallback(_receiver)
        _check(library.espeak_SetVoiceByName(voice.encode()), f"voice {voice}")
        _check(library.espeak_SetParameter(_PARAMETER_RATE, words_per_minute, 0), "rate")
        # Initialising seeds the noise with the time of day.
        _check(library.espeak_ng_SetRandSeed(ctypes.c_long(_RANDOM_SEED)), "seed")
        encoded = text.encode()
        size = ctypes.c_size_t(len(encoded) + 1)
        _check(library.espeak_Synth(encoded, size, 0, 0, 0, _CHARS_UTF8, None, None), "text")
        _check(library.espeak_Synchronize(), "end of text")
        library.espeak_Terminate()
    finally:
        dlclose(library._handle)
    return b"".join(_sink.parts), rate_hz


def _check(status: int, what: str) -> None:
    if status != 0:
        raise RuntimeError(f"espeak-ng refused the {what} with status {status}")


def _cut_silence(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cut what is quiet before and after the sound, but for 30 ms."""
    loud = np.flatnonzero(np.abs(wave) > _SILENCE * np.abs(wave).max())
    keep = round(KEPT_SILENCE_S * SAMPLE_RATE_HZ)
    padded = np.pad(wave, keep)
    return np.ascontiguousarray(padded[loud[0] : loud[-1] + 1 + 2 * keep], dtype=np.float32)
