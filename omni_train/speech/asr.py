"""Speech to text by a recogniser that the project did not train.

    Recognizer               what every backend offers: wave -> Transcript
    PocketSphinxRecognizer   a small closed vocabulary on CPU, no model beyond the package's own
    WhisperRecognizer        Whisper through transformers, from a directory
    ParaformerRecognizer     funasr's Paraformer, for Chinese; an extra
    build_recognizer         the one that the config names

Not done here: error rates (evaluation), pauses. Each backend is imported when its recogniser is
made, so that this module costs nothing without it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from omni_train.config.errors import ConfigError, DataError, check_fields
from omni_train.engine.foreign import refuse_pickles

SAMPLE_RATE_HZ = 16_000
_PADDING_S = 0.3
# About -61 dBFS. Without a noise floor, the digital silence around the words takes part in the
# cepstral mean with the logarithm of nothing, and half the words of a good voice are lost.
_NOISE_FLOOR = 30.0 / 32768.0
_NOISE_SEED = 0
# Chance of silence between words; with the package's 0.005 a soft last vowel ends in no result.
_SILENCE = 0.1
_FRAMES_PER_SECOND = 100
_WORD = re.compile(r"[a-z][a-z']*")


@dataclass(frozen=True, slots=True)
class Word:
    """A recognised word and where it lies in the wave, in seconds."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Transcript:
    """What was heard; `text` is the words with single blanks between, empty for silence."""

    text: str
    words: list[Word]


class Recognizer(Protocol):
    """A backend; the same wave gives the same transcript whatever was heard before."""

    def transcribe(self, wave: NDArray[np.float32]) -> Transcript:
        """Return what is said in `wave`, float32 [S] at 16 kHz, mono, -1 to 1."""
        ...


class PocketSphinxRecognizer:
    """Any sequence of words of a closed vocabulary, by PocketSphinx and its own en-us model.

    Args:
        vocabulary: lower-case English words that the package's dictionary holds.

    Raises:
        ConfigError: an empty vocabulary, or a word that the dictionary lacks.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        import pocketsphinx

        words = sorted(set(vocabulary))
        if not words or not all(_WORD.fullmatch(word) for word in words):
            raise _vocabulary_error(vocabulary, "words are lower-case letters; one at least")
        self._decoder = pocketsphinx.Decoder(
            lm=None, cmn="batch", silprob=_SILENCE, loglevel="FATAL"
        )
        unknown = [word for word in words if self._decoder.lookup_word(word) is None]
        if unknown:
            raise _vocabulary_error(unknown, "PocketSphinx has no pronunciation for these words")
        grammar = f"#JSGF V1.0; grammar words; public <words> = ( {' | '.join(words)} )+ ;"
        # From memory: a grammar file would be shared by processes that write it at once.
        self._decoder.add_jsgf_string("words", grammar)
        self._decoder.activate_search("words")

    def transcribe(self, wave: NDArray[np.float32]) -> Transcript:
        """Return the words of `wave`, float32 [S] at 16 kHz, mono, -1 to 1.

        0.3 s of faint noise are put around it; the times are those of `wave` itself.

        Raises:
            DataError: `bad_wave` for another shape, `non_finite` for NaN or infinity.
        """
        _check(wave)
        # The front end keeps its noise estimate from wave to wave: start it anew. With cmn=batch
        # and full_utt the cepstral mean is that of this wave alone.
        self._decoder.reinit_feat()
        self._decoder.start_utt()
        self._decoder.process_raw(_pcm(wave), no_search=False, full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        if hypothesis is None or not hypothesis.hypstr:
            return Transcript("", [])
        end_s = len(wave) / SAMPLE_RATE_HZ
        return Transcript(hypothesis.hypstr, [_word(s, end_s) for s in self._spoken()])

    def _spoken(self) -> list[tuple[str, int, int]]:
        """Words with first and last frame; silence and sentence marks are left out."""
        segments = [(s.word, s.start_frame, s.end_frame) for s in self._decoder.seg()]
        # `garden(2)` is another pronunciation of garden.
        words = [(text.partition("(")[0], first, last) for text, first, last in segments]
        return [(text, first, last) for text, first, last in words if _WORD.fullmatch(text)]


class WhisperRecognizer:
    """Whisper through transformers, greedy, with word times from its cross attention.

    Args:
        path: directory with config, tokenizer, feature extractor and safetensors; nothing is
            downloaded. Its generation config names the alignment heads.
        language: such as `en` or `zh`; empty for a model of one language.
        device: where it computes, such as `cuda`.

    Raises:
        ConfigError: no such model there.
    """

    def __init__(self, path: str, language: str = "", device: str = "cpu") -> None:
        from transformers import WhisperForConditionalGeneration, WhisperProcessor, pipeline

        refuse_pickles(Path(path), key="asr.path")
        try:
            processor = WhisperProcessor.from_pretrained(path, local_files_only=True)
            model: Any = WhisperForConditionalGeneration.from_pretrained(
                path, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise _model_error(path, f"no Whisper model: {error}") from error
        if getattr(model.generation_config, "alignment_heads", None) is None:
            raise _model_error(path, "generation_config.json names no alignment_heads")
        self._options: dict[str, Any] = {"num_beams": 1, "do_sample": False}
        if language:
            self._options |= {"language": language, "task": "transcribe"}
        self._pipeline: Any = pipeline(
            "automatic-speech-recognition",
            model=model.eval(),
            tokenizer=processor.tokenizer,
            feature_extractor=processor.feature_extractor,
            device=device,
        )

    def transcribe(self, wave: NDArray[np.float32]) -> Transcript:
        """Return the words of `wave`, float32 [S] at 16 kHz, mono, -1 to 1.

        Raises:
            DataError: as for PocketSphinx.
        """
        _check(wave)
        heard = self._pipeline(
            {"raw": wave.astype(np.float32), "sampling_rate": SAMPLE_RATE_HZ},
            return_timestamps="word",
            generate_kwargs=dict(self._options),
        )
        end_s = len(wave) / SAMPLE_RATE_HZ
        words = []
        for chunk in heard["chunks"]:
            start, end = chunk["timestamp"]
            # Whisper may leave the last word open.
            first = min(max(start or 0.0, 0.0), end_s)
            last = end_s if end is None else min(max(end, first), end_s)
            if chunk["text"].strip():
                words.append(Word(chunk["text"].strip(), first, last))
        return Transcript(" ".join(heard["text"].split()), words)


class ParaformerRecognizer:
    """Paraformer by funasr: Chinese, with times of characters.

    Args:
        path: directory of the model; nothing is downloaded.

    Raises:
        ConfigError: funasr is not installed.
    """

    def __init__(self, path: str) -> None:
        try:
            from funasr import AutoModel  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise ConfigError(
                key="asr.kind",
                value=AsrKind.paraformer.name,
                rule="needs the package funasr, which is not installed",
                remedy="pip install funasr, or set asr.kind=whisper",
            ) from error
        self._model: Any = AutoModel(model=path, disable_update=True, disable_pbar=True)

    def transcribe(self, wave: NDArray[np.float32]) -> Transcript:
        """Return the characters of `wave`, float32 [S] at 16 kHz, mono, -1 to 1.

        Raises:
            DataError: as for PocketSphinx.
        """
        _check(wave)
        heard = self._model.generate(input=wave.astype(np.float32))[0]
        units = heard["text"].split()
        times = heard.get("timestamp") or []
        pairs = zip(units, times, strict=False)
        return Transcript(
            " ".join(units), [Word(text, start / 1e3, end / 1e3) for text, (start, end) in pairs]
        )


class AsrKind(Enum):
    """Backends."""

    pocketsphinx = "pocketsphinx"
    whisper = "whisper"
    paraformer = "paraformer"


@dataclass(kw_only=True, slots=True)
class AsrConfig:
    """Which recogniser.

    Args:
        kind: backend.
        vocabulary: PocketSphinx alone: the words that can be said.
        path: Whisper and Paraformer: directory of the model.
        language: Whisper alone: such as `en`; empty for a model of one language.
    """

    kind: AsrKind
    vocabulary: list[str] = field(default_factory=list)
    path: str = ""
    language: str = ""

    def __post_init__(self) -> None:
        closed = self.kind is AsrKind.pocketsphinx
        own = f"asr.kind={self.kind.name}"
        check_fields(
            self,
            "asr",
            (
                "vocabulary",
                bool(self.vocabulary) == closed,
                f"is for pocketsphinx, and needed there; {own}",
            ),
            ("path", bool(self.path) != closed, f"is for the other kinds, and needed there; {own}"),
            (
                "language",
                not self.language or self.kind is AsrKind.whisper,
                f"is for whisper alone; {own}",
            ),
            remedy="set or remove it, or choose another asr.kind",
        )


def build_recognizer(config: AsrConfig, device: str = "cpu") -> Recognizer:
    """Make the recogniser that a config names.

    Raises:
        ConfigError: its package, model or words are missing.
    """
    if config.kind is AsrKind.pocketsphinx:
        return PocketSphinxRecognizer(config.vocabulary)
    if config.kind is AsrKind.whisper:
        return WhisperRecognizer(config.path, config.language, device)
    return ParaformerRecognizer(config.path)


def _check(wave: NDArray[np.float32]) -> None:
    if wave.ndim != 1 or not len(wave):
        raise DataError("bad_wave", f"a wave is [S] with S > 0, not {wave.shape}")
    if not np.isfinite(wave).all():
        raise DataError("non_finite", "the wave holds NaN or infinity")


def _model_error(path: str, rule: str) -> ConfigError:
    return ConfigError(
        key="asr.path", value=path, rule=rule, remedy="give a directory of a released model"
    )


def _pcm(wave: NDArray[np.float32]) -> bytes:
    padded = np.pad(wave.astype(np.float64), round(_PADDING_S * SAMPLE_RATE_HZ))
    noise = np.random.default_rng(_NOISE_SEED).normal(0.0, _NOISE_FLOOR, len(padded))
    scaled = np.clip(np.rint((padded + noise) * 32768.0), -32768, 32767)
    return scaled.astype("<i2").tobytes()


def _word(segment: tuple[str, int, int], end_s: float) -> Word:
    text, first, last = segment
    start = first / _FRAMES_PER_SECOND - _PADDING_S
    end = (last + 1) / _FRAMES_PER_SECOND - _PADDING_S
    return Word(text, min(max(start, 0.0), end_s), min(max(end, 0.0), end_s))


def _vocabulary_error(value: Sequence[str], rule: str) -> ConfigError:
    return ConfigError(
        key="vocabulary",
        value=list(value),
        rule=rule,
        remedy="use words of pocketsphinx's en-us dictionary",
    )
