"""Scores sampled speech on held-out dialogues: what a recogniser hears, and whose voice it is.

    shards -> Utterance -> codes (speech/speaking.py) -> wave -> recogniser -> SpokenScore -> event

    predictions-<task>.jsonl   a line for every sample: text, heard, WER, pauses, voice, codes
    audio/<task>/              waves of the first texts, each with an `audio` event

Utterances are dealt to ranks one by one and all arithmetic on a CPU has one thread, so neither the
codes nor the scores depend on the number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import soundfile
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from omni_train.config.errors import ConfigError, DataError, check_at_least
from omni_train.data.fetch import fetch
from omni_train.data.source import ShardSet
from omni_train.data.speech import encode_spoken
from omni_train.data.tokenizer import tokenizer_hash
from omni_train.data.types import IndexRow, ProcessingConfig
from omni_train.engine.distributed import gather_json
from omni_train.engine.run import Run, write_text_atomically
from omni_train.evaluation.metrics import Normalizer
from omni_train.evaluation.references import References
from omni_train.evaluation.round_trip import read_recording
from omni_train.evaluation.tts import (
    Failure,
    SpokenScore,
    bootstrap_interval,
    score_reply,
    summarize,
)
from omni_train.speech.asr import AsrConfig, Recognizer, build_recognizer
from omni_train.speech.codec import (
    Codec,
    CodecConfig,
    Speaker,
    check_codebook,
    find_voice,
    load_codec,
    load_voices,
)
from omni_train.speech.mel import SAMPLE_RATE_HZ, to_16_khz
from omni_train.speech.pauses import PauseConfig, PauseErrors
from omni_train.speech.sampling import SampledSpeech, SamplingConfig
from omni_train.speech.similarity import SimilarityConfig, Voices, known_voices
from omni_train.speech.speaking import Replicas, Utterance, one_thread, speak, to_wave

AUDIO_DIR = "audio"


@dataclass(kw_only=True, slots=True)
class SpeechTask:
    """Spoken replies to a set of held-out dialogues.

    Args:
        path: directory of shards with spoken replies; their codes are not looked at.
        codec: turns codes into waves.
        asr: recogniser.
        sampling: how codes are drawn.
        normalizer: how texts are folded before they are compared.
        pauses: what counts as a pause.
        voices: recordings to compare voices with, if any.
        references: directory of shards with codes; every reply then continues another utterance of
            its voice from there. Empty: the speaker's token alone says whose voice it is.
        keep_waves: texts, from the start of the index, whose first sample is kept as a file.
        limit: dialogues from the start of the index; 0 takes all.
    """

    path: str
    codec: CodecConfig
    asr: AsrConfig
    sampling: SamplingConfig
    normalizer: Normalizer = Normalizer.seed_tts
    pauses: PauseConfig = field(default_factory=PauseConfig)
    voices: SimilarityConfig = field(default_factory=SimilarityConfig)
    references: str = ""
    keep_waves: int = 5
    limit: int = 0

    def __post_init__(self) -> None:
        check_at_least(
            self,
            "speech.*",
            keep_waves=0,
            limit=0,
            remedy="0 keeps no wave, and takes all dialogues",
        )


@dataclass(slots=True)
class _Judge:
    """What scores waves on this rank."""

    name: str
    task: SpeechTask
    recognizer: Recognizer
    voices: Voices | None
    voice_accuracy: float
    codec: Codec
    speakers: dict[str, Speaker] | None
    run: Run


def evaluate_speech(
    name: str,
    task: SpeechTask,
    replicas: Replicas,
    tokenizer: PreTrainedTokenizerFast,
    processing: ProcessingConfig,
    run: Run,
    *,
    saved_as: str = "",
) -> dict[str, float]:
    """Sample, hear and score one task; one `evaluation` event.

    Args:
        name: of the task, in events, files and the keys of the noise.
        replicas: plain models on this rank's device.
        processing: how media become tokens, as in training.
        saved_as: name in events and files, where the same task is spoken twice.

    Returns:
        The figures of the event, the same on every rank.

    Raises:
        DataError: `no_samples`, `no_speech` where a dialogue asks for no speech.
        ConfigError: other tokenizer, or a voice that the codec or the recordings do not have.
    """
    source = ShardSet(name, task.path)
    source.check_tokenizer(tokenizer_hash(tokenizer))
    places = [(s, row) for s, count in enumerate(source.counts) for row in range(count)]
    numbered = list(enumerate(places[: task.limit or None]))
    mine = numbered[run.world.rank :: run.world.size]
    num_codes = replicas.talker.spec.num_codes
    with one_thread(run.world.device):
        judge = _make_judge(saved_as or name, task, num_codes, run)
        texts = [_text(source, place) for _, place in mine]
        references = References(task.references, num_codes) if task.references else None
        utterances = _utterances(
            source, [p for _, p in mine], references, replicas, tokenizer, processing
        )
        spoken = speak(replicas, utterances, task.sampling)
        rows = [
            row
            for (number, place), text, samples in zip(mine, texts, spoken, strict=True)
            for row in _judged(judge, number, source.row(*place), text, samples)
        ]
    every = [row for rank in gather_json(rows) for row in rank]
    every.sort(key=lambda row: (row["number"], row["sample"]))
    return _report(judge, every)


def _make_judge(name: str, task: SpeechTask, num_codes: int, run: Run) -> _Judge:
    codec, speakers = load_codec(task.codec, run.world.device), load_voices(task.codec)
    check_codebook(codec, num_codes, key=f"speech.{name}.codec.path")
    recognizer = build_recognizer(task.asr, str(run.world.device))
    # Where the voice is in the codes, the codec changes it: recordings go through it too.
    voices, accuracy = _read_voices(task.voices, run, codec if speakers is None else None)
    return _Judge(name, task, recognizer, voices, accuracy, codec, speakers, run)


def _text(source: ShardSet, place: tuple[int, int]) -> str:
    row = source.row(*place)
    if row.speech is None:
        raise DataError("no_speech", "the dialogue's last turn is not spoken", key=row.key)
    return row.speech.text


def _utterances(
    source: ShardSet,
    places: Sequence[tuple[int, int]],
    references: References | None,
    replicas: Replicas,
    tokenizer: PreTrainedTokenizerFast,
    processing: ProcessingConfig,
) -> Iterator[Utterance]:
    none = torch.empty(0, dtype=torch.int64)
    for shard, row in places:
        raw = fetch(source.path_of(shard), source.row(shard, row))
        made = encode_spoken(
            raw,
            tokenizer,
            processing,
            replicas.thinker.spec,
            codes=none,
            reference=None if references is None else references.choose(raw.row),
        )
        yield Utterance(f"{source.name}/{raw.row.key}", made.encoded, made.reply)


def _judged(
    judge: _Judge, number: int, index_row: IndexRow, text: str, samples: list[SampledSpeech]
) -> Iterator[dict[str, Any]]:
    """Yield a JSON-able row for each sample of one text."""
    place = f"speech.{judge.name}.codec.path"
    voice = find_voice(judge.speakers, index_row.speaker, key=place)
    for sample, speech in enumerate(samples):
        wave = to_wave(judge.codec, speech.codes, voice)
        # Recogniser and comparison of voices take the same rate.
        heard = to_16_khz(wave.numpy(), judge.codec.sample_rate_hz)
        score = score_reply(
            text,
            heard,
            SAMPLE_RATE_HZ,
            ended=speech.ended,
            recognizer=judge.recognizer,
            normalizer=judge.task.normalizer,
            pauses=judge.task.pauses,
        )
        row = {"number": number, "sample": sample, "key": index_row.key, "text": text}
        row |= {"speaker": index_row.speaker, "wer": score.wer, **asdict(score)}
        row["failure"] = score.failure.name if score.failure else None
        row |= _whose(judge, index_row.speaker, torch.from_numpy(heard))
        row |= {"ended": speech.ended, "codes": speech.codes}
        if sample == 0 and number < judge.task.keep_waves and len(wave):
            row["wave"] = _keep(judge, index_row.key, wave)
        yield row


def _whose(judge: _Judge, speaker: str, wave: Tensor) -> dict[str, Any]:
    """Similarity of a wave at 16 kHz to the voice that was asked for, and the nearest of all."""
    if judge.voices is None or not len(wave):
        return {}
    found = judge.voices.similarities(wave)
    if speaker not in found:
        raise ConfigError(
            key=f"speech.{judge.name}.voices.path",
            value=judge.task.voices.path,
            rule=f"has no recording of {speaker!r}, only of {', '.join(sorted(found))}",
            remedy="give recordings of every voice that is asked for, or leave voices out",
        )
    nearest = max(found, key=lambda name: found[name])
    return {"similarity": found[speaker], "nearest": nearest}


def _keep(judge: _Judge, key: str, wave: Tensor) -> str:
    """Write a wave; return its path in the run directory."""
    path = judge.run.dir / AUDIO_DIR / judge.name / f"{key}.wav"
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave.numpy(), judge.codec.sample_rate_hz, subtype="PCM_16")
    return str(path.relative_to(judge.run.dir))


def _read_voices(
    config: SimilarityConfig, run: Run, codec: Codec | None
) -> tuple[Voices | None, float]:
    """Known voices, and the share of other recordings of them that the measure gets right.

    Args:
        codec: recordings go through it; None takes them as they are.
    """
    if not config.path:
        return None, 0.0
    waves: dict[str, list[Tensor]] = {}
    source = ShardSet("voices", config.path)
    for shard, count in enumerate(source.counts):
        for number in range(count):
            row = source.row(shard, number)
            of = waves.setdefault(row.speaker, [])
            if len(of) < 2 * config.per_voice:
                wave = read_recording(source.path_of(shard), row)[1]
                if codec is not None:
                    wave = codec.decode(codec.encode(wave, SAMPLE_RATE_HZ))
                of.append(wave)
    known = {name: of[: config.per_voice] for name, of in waves.items()}
    others = [(name, wave) for name, of in waves.items() for wave in of[config.per_voice :]]
    if not others:
        raise ConfigError(
            key="speech.*.voices.per_voice",
            value=config.per_voice,
            rule="no recording is left to tell how often the measure is right",
            remedy="lower it, or give more recordings of each voice",
        )
    voices = known_voices(config, known, run.world.device)
    return voices, sum(voices.nearest(wave) == name for name, wave in others) / len(others)


def _report(judge: _Judge, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Write the rows and the events; return the figures."""
    task, run = judge.task, judge.run
    figures = summarize([_score_of(row) for row in rows])
    by_text: dict[int, list[float]] = {}
    for row in rows:
        by_text.setdefault(row["number"], []).append(row["wer"])
    # Samples of one text are no independent draws.
    low, high = bootstrap_interval([sum(of) / len(of) for of in by_text.values()])
    figures |= {"low": low, "high": high}
    known = [row for row in rows if "nearest" in row]
    if known:
        figures["similarity"] = sum(row["similarity"] for row in known) / len(known)
        # A reply without sound is in no voice.
        figures["nearest_share"] = sum(r["nearest"] == r["speaker"] for r in known) / len(rows)
        figures["voice_accuracy"] = judge.voice_accuracy
    if run.is_main:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text_atomically(run.dir / f"predictions-{judge.name}.jsonl", lines)
    for row in rows:
        if "wave" in row:
            shown = ("key", "speaker", "text", "heard", "wer", "wave")
            run.event("audio", task=judge.name, **{field: row[field] for field in shown})
    run.event(
        "evaluation",
        task=judge.name,
        metric="spoken_wer",
        value=figures["wer"],
        num_texts=len(by_text),
        num_samples=len(rows),
        figures=figures,
        # What the scores depend on besides the weights and the data.
        normalizer=task.normalizer.name,
        asr=task.asr.kind.name,
        sampling=asdict(task.sampling),
    )
    run.say(
        f"{judge.name}: WER {figures['wer']:.3f} ({low:.3f} to {high:.3f}) on {len(by_text)} texts"
    )
    return figures


def _score_of(row: dict[str, Any]) -> SpokenScore:
    """The score that a row was made from; the kind of failure by its name."""
    pauses = row["pauses"]
    return SpokenScore(
        reference=row["reference"],
        heard=row["heard"],
        errors=row["errors"],
        units=row["units"],
        pauses=None if pauses is None else PauseErrors(**pauses),
        words_per_s=row["words_per_s"],
        failure=Failure[row["failure"]] if row["failure"] else None,
    )
