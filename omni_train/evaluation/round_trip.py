"""What a codec does to speech: word error rates by voice, before and after, on held-out shards.

Samples are dealt to ranks in the order of the index, so the figures do not depend on their number.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from omni_train.config.errors import ConfigError, DataError
from omni_train.data.chatml import split_reply
from omni_train.data.fetch import fetch
from omni_train.data.media import decode_audio
from omni_train.data.source import ShardSet
from omni_train.data.types import IndexRow, MediaKind, RawSample
from omni_train.engine.distributed import gather_json
from omni_train.engine.run import Run
from omni_train.evaluation.metrics import Normalizer, normalize
from omni_train.evaluation.tts import count_errors
from omni_train.speech.asr import AsrConfig, Recognizer, build_recognizer
from omni_train.speech.codec import Codec
from omni_train.speech.mel import SAMPLE_RATE_HZ


@dataclass(kw_only=True, slots=True)
class RoundTripConfig:
    """Held-out speech with its text.

    Args:
        path: directory of shards: one sound file a sample, its words as the reply.
        asr: recogniser.
        normalizer: how texts are folded before they are compared.
        limit: samples from the start of the index; 0 takes all.
        max_wer: largest word error rate of any voice after the codec; the run fails above it.
    """

    path: str
    asr: AsrConfig
    normalizer: Normalizer = Normalizer.basic
    limit: int = 0
    max_wer: float = 1.0

    def __post_init__(self) -> None:
        if self.limit < 0 or self.max_wer <= 0:
            raise ConfigError(
                key="check.limit" if self.limit < 0 else "check.max_wer",
                value=self.limit if self.limit < 0 else self.max_wer,
                rule="a limit is not negative, an error rate that is allowed is positive",
                remedy="leave it out for the default",
            )


@dataclass(slots=True)
class _Counts:
    """Word errors by voice; `words` the reference words."""

    words: Counter[str] = field(default_factory=Counter)
    raw: Counter[str] = field(default_factory=Counter)
    decoded: Counter[str] = field(default_factory=Counter)
    samples: Counter[str] = field(default_factory=Counter)


def check_round_trip(codec: Codec, config: RoundTripConfig, run: Run) -> dict[str, float]:
    """Return the word error rate after the codec by voice; one `evaluation` event each.

    The event also has `raw`, the rate of the same recogniser on the waves as they are.

    Raises:
        DataError: `no_samples`, `codec_wer` where a voice is over `max_wer`.
    """
    source = ShardSet("check", config.path)
    places = [(s, row) for s, count in enumerate(source.counts) for row in range(count)]
    recognizer = build_recognizer(config.asr)
    own = _Counts()
    for shard, number in places[: config.limit or None][run.world.rank :: run.world.size]:
        row = source.row(shard, number)
        _score(own, source.path_of(shard), row, codec, config, recognizer)
    total = _Counts()
    for part in gather_json([own.words, own.raw, own.decoded, own.samples]):
        for counter, values in zip(
            (total.words, total.raw, total.decoded, total.samples), part, strict=True
        ):
            counter.update(values)
    if not total.words:
        raise DataError("no_samples", f"no speech in {config.path}")
    rates = {voice: total.decoded[voice] / total.words[voice] for voice in sorted(total.words)}
    for voice, rate in rates.items():
        raw = total.raw[voice] / total.words[voice]
        run.event(
            "evaluation",
            task=f"round_trip {voice}",
            metric="wer",
            value=rate,
            raw=raw,
            voice=voice,
            num_samples=total.samples[voice],
            normalizer=config.normalizer.name,
            asr=config.asr.kind.name,
        )
        run.say(f"voice {voice}: WER {rate:.3f} after the codec, {raw:.3f} before")
    worst = max(rates, key=lambda voice: rates[voice])
    if rates[worst] > config.max_wer:
        raise DataError(
            "codec_wer", f"voice {worst} has WER {rates[worst]:.3f}, check.max_wer={config.max_wer}"
        )
    return rates


def read_recording(shard: str, row: IndexRow) -> tuple[RawSample, Tensor]:
    """Return a sample and its one sound file as float32 [S] at 16 kHz.

    Raises:
        DataError: `bad_messages` where it has none or several, and what reading finds.
    """
    sounds = [info for info in row.media if info.kind is MediaKind.audio]
    if len(sounds) != 1:
        raise DataError("bad_messages", f"{len(sounds)} sound files, not one", key=row.key)
    raw = fetch(shard, row)
    return raw, decode_audio(raw.media[sounds[0].member], sounds[0])


def _score(
    counts: _Counts,
    shard: str,
    row: IndexRow,
    codec: Codec,
    config: RoundTripConfig,
    recognizer: Recognizer,
) -> None:
    raw, wave = read_recording(shard, row)
    reference = normalize(split_reply(raw.record["messages"])[1], config.normalizer)
    if not reference:
        raise DataError("empty_reference", "the reply has no word to compare", key=row.key)
    back = codec.decode(codec.encode(wave, SAMPLE_RATE_HZ))
    for heard, counter in ((wave, counts.raw), (back, counts.decoded)):
        text = normalize(recognizer.transcribe(heard.numpy()).text, config.normalizer)
        errors, units = count_errors(reference, text, config.normalizer)
        counter[row.speaker] += errors
    counts.words[row.speaker] += units
    counts.samples[row.speaker] += 1
