"""Sampled replies to a set of requests, as shards: several ranks, restartable, nothing twice.

    requests -> share of a rank, one shard's worth at a time -> codes -> waves -> shard

    DIR/job.json              what makes the samples; another job is refused
    DIR/shard-000000.tar      a request a sample: its dialogue and media, and of each candidate
                              `<name>.codes.npy` and `<name>.wav`
    DIR/shard-000000.json     keys, hash, requests that could not be used; written after the tar
    DIR/candidates.json       all shards; written last

Requests are dealt to ranks in chunks that become shards; a chunk's codes do not depend on the rank,
so after a restart, on any number of ranks, only missing shards are made. Not done here: hearing the
waves (ranking.py).
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import soundfile
import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from omni_train.config.errors import ConfigError, DataError
from omni_train.data.candidates import CANDIDATES_FILE, RECORDING
from omni_train.data.chatml import split_reply
from omni_train.data.claim import claim
from omni_train.data.fetch import fetch
from omni_train.data.index import MANIFEST_NAME, hash_file, write_atomically
from omni_train.data.source import ShardSet
from omni_train.data.speech import ReferenceSpeech, encode_spoken, read_codes
from omni_train.data.tars import Sample, write_tar
from omni_train.data.tokenizer import tokenizer_hash
from omni_train.data.types import ProcessingConfig, RawSample
from omni_train.engine.distributed import barrier, gather_json
from omni_train.engine.hashing import weights_hash
from omni_train.engine.run import Run
from omni_train.evaluation.references import References
from omni_train.models.talker_layout import lay_out
from omni_train.speech.codec import (
    CODES_SUFFIX,
    Codec,
    CodecConfig,
    Speaker,
    check_codebook,
    dump_codes,
    find_voice,
    load_codec,
    load_voices,
)
from omni_train.speech.sampling import SampledSpeech, SamplingConfig
from omni_train.speech.speaking import Replicas, Utterance, one_thread, speak, to_wave

JOB_FILE = "job.json"


@dataclass(kw_only=True, slots=True)
class CandidateConfig:
    """What is asked for, and how it is sampled.

    Args:
        path: directory of shards: dialogues that end in a reply, each with its speaker.
        codec: turns codes into waves.
        sampling: how codes are drawn; `num_samples` of each request.
        references: directory of shards with codes; every reply then continues another utterance of
            its voice from there.
        recordings: keep the request's own speech as a candidate too; its codes are needed.
        requests_per_shard: what is made again where a job is interrupted, at most.
        limit: requests from the start of the index; 0 takes all.
    """

    path: str
    codec: CodecConfig
    sampling: SamplingConfig
    references: str = ""
    recordings: bool = False
    requests_per_shard: int = 16
    limit: int = 0

    def __post_init__(self) -> None:
        for name, least in (("requests_per_shard", 1), ("limit", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    key=f"requests.{name}",
                    value=getattr(self, name),
                    rule=f"must be at least {least}",
                    remedy="leave it out for the default",
                )


@dataclass(slots=True)
class _Request:
    """A dialogue to be answered, with the reply's text.

    Args:
        raw: the dialogue; with its codes where recordings are kept.
        text: of the reply.
        utterance: as the model reads it.
        reference: speech that it continues.
    """

    raw: RawSample
    text: str
    utterance: Utterance
    reference: ReferenceSpeech | None


@dataclass(slots=True)
class _Job:
    """What a rank works with."""

    config: CandidateConfig
    source: ShardSet
    replicas: Replicas
    tokenizer: PreTrainedTokenizerFast
    processing: ProcessingConfig
    references: References | None
    codec: Codec
    voices: dict[str, Speaker] | None
    identity: dict[str, Any]

    @property
    def num_codes(self) -> int:
        """Size of the model's codebook."""
        return self.replicas.talker.spec.num_codes


def sample_candidates(
    config: CandidateConfig,
    replicas: Replicas,
    tokenizer: PreTrainedTokenizerFast,
    processing: ProcessingConfig,
    folder: Path,
    run: Run,
) -> int:
    """Make the shards that are missing; return the number of candidates in all of them.

    Requests that cannot be used are in the ledger; all ranks must call.

    Args:
        config: requests, codec, sampling.
        replicas: plain models on this rank's device.
        tokenizer: the model's.
        processing: how media become tokens, as in training.
        folder: of the shards; all ranks must see it.
        run: ranks, events, ledger.

    Raises:
        ConfigError: another tokenizer, codec, voice or job.
        DataError: `no_samples` where no request can be used.
    """
    with one_thread(run.world.device):
        job = _open(config, replicas, tokenizer, processing, run)
        claim(
            folder / JOB_FILE,
            job.identity,
            run,
            key="run.dir",
            rule="holds candidates of another job",
            remedy="choose another run directory, or remove this one",
        )
        places = [(s, r) for s, count in enumerate(job.source.counts) for r in range(count)]
        places = places[: config.limit or None]
        size = config.requests_per_shard
        chunks = [places[start : start + size] for start in range(0, len(places), size)]
        made = 0
        for number, chunk in enumerate(chunks):
            tar = folder / f"shard-{number:06d}.tar"
            if number % run.world.size == run.world.rank and not _finished(tar):
                _write_shard(job, chunk, tar)
                made += 1
                run.say(f"shard {number + 1} of {len(chunks)}")
    made = sum(gather_json(made))
    barrier()
    found = [_sidecar(folder / f"shard-{number:06d}.tar") for number in range(len(chunks))]
    total = sum(len(shard["candidates"]) for shard in found)
    if not total:
        raise DataError("no_samples", f"no request of {config.path} can be used")
    for row in (row for shard in found for row in shard["rejected"]):
        run.ledger(source="requests", **row)
    if run.is_main:
        shards = [{k: shard[k] for k in ("name", "xxh3", "requests")} for shard in found]
        record = {**job.identity, "shards": shards, "num_candidates": total}
        write_atomically(folder / CANDIDATES_FILE, _json(record))
    run.event("candidates", shards_made=made, shards=len(chunks), candidates=total)
    return total


def _open(
    config: CandidateConfig,
    replicas: Replicas,
    tokenizer: PreTrainedTokenizerFast,
    processing: ProcessingConfig,
    run: Run,
) -> _Job:
    source = ShardSet("requests", config.path)
    source.check_tokenizer(tokenizer_hash(tokenizer))
    num_codes = replicas.talker.spec.num_codes
    codec, voices = load_codec(config.codec, run.world.device), load_voices(config.codec)
    check_codebook(codec, num_codes, key="requests.codec.path")
    identity = {
        "model": weights_hash([replicas.thinker, replicas.talker]),
        "requests": xxhash.xxh3_64_hexdigest(source.root.read_all(MANIFEST_NAME)),
        "sampling": asdict(config.sampling),
        "codec": {"kind": config.codec.kind.name, "codebook_size": codec.codebook_size},
        "references": config.references,
        "recordings": config.recordings,
        "requests_per_shard": config.requests_per_shard,
        "limit": config.limit,
        "tokenizer": tokenizer_hash(tokenizer),
    }
    references = References(config.references, num_codes) if config.references else None
    return _Job(
        config, source, replicas, tokenizer, processing, references, codec, voices, identity
    )


def _finished(tar: Path) -> bool:
    return tar.is_file() and tar.with_suffix(".json").is_file()


def _sidecar(tar: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(tar.with_suffix(".json").read_bytes())
    return record


def _write_shard(job: _Job, places: list[tuple[int, int]], tar: Path) -> None:
    """Sample one chunk of requests and write its tar, then what it holds."""
    requests: list[_Request] = []
    rejected: list[dict[str, str]] = []
    for shard, number in places:
        row = job.source.row(shard, number)
        name = job.source.manifest.shards[shard].name
        try:
            requests.append(_read(job, shard, number))
        except DataError as error:
            reason = f"{error.reason}: {error.detail}"
            rejected.append({"shard": name, "key": row.key, "reason": reason})
    names: list[str] = []
    spoken = speak(job.replicas, (r.utterance for r in requests), job.config.sampling)
    answered = zip(requests, spoken, strict=True)
    write_tar(tar, (_sample(job, request, samples, names) for request, samples in answered))
    keys = [request.raw.row.key for request in requests]
    record = {"name": tar.name, "xxh3": hash_file(tar), "requests": keys, "candidates": names}
    write_atomically(tar.with_suffix(".json"), _json({**record, "rejected": rejected}))


def _read(job: _Job, shard: int, number: int) -> _Request:
    raw = fetch(
        job.source.path_of(shard), job.source.row(shard, number), codes=job.config.recordings
    )
    reference = None if job.references is None else job.references.choose(raw.row)
    made = encode_spoken(
        raw,
        job.tokenizer,
        job.processing,
        job.replicas.thinker.spec,
        codes=torch.empty(0, dtype=torch.int64),
        reference=reference,
    )
    # What cannot be laid out is refused here, before anything is sampled.
    lay_out(made.reply, job.replicas.talker.spec)
    if job.config.recordings:
        read_codes(raw, job.num_codes)
    text = split_reply(raw.record["messages"])[1]
    key = f"{job.source.name}/{raw.row.key}"
    return _Request(raw, text, Utterance(key, made.encoded, made.reply), reference)


def _sample(job: _Job, request: _Request, samples: list[SampledSpeech], names: list[str]) -> Sample:
    """The tar's sample of a request; names of its candidates are added to `names`."""
    row, record = request.raw.row, request.raw.record
    voice = find_voice(job.voices, row.speaker, key="requests.codec.path")
    spoken = {f"sample-{i}": (s.codes, s.ended) for i, s in enumerate(samples)}
    own = row.speech.member if row.speech is not None else ""
    if job.config.recordings:
        spoken[RECORDING] = (read_codes(request.raw, job.num_codes).tolist(), True)
    media = {name: data for name, data in request.raw.media.items() if name != own}
    listed = []
    for name, (codes, ended) in spoken.items():
        listed.append({"name": name, "ended": ended, "num_codes": len(codes)})
        names.append(f"{row.key}/{name}")
        if codes:
            wave = to_wave(job.codec, codes, voice)
            media[f"{name}{CODES_SUFFIX}"] = dump_codes(torch.tensor(codes))
            media[f"{name}.wav"] = _wav(wave, job.codec.sample_rate_hz)
    reply = {"role": "assistant", "content": [{"type": "text", "text": request.text}]}
    made: dict[str, Any] = {
        **record,
        "messages": [*record["messages"][:-1], reply],
        "speaker": row.speaker,
        "text": request.text,
        "candidates": listed,
        "sampling": job.identity["sampling"],
        "seed": job.config.sampling.seed,
        "model": job.identity["model"],
    }
    if request.reference is not None:
        codes = request.reference.codes.tolist()
        made["reference"] = {"text": request.reference.text, "codes": codes}
    return Sample(row.key, made, media)


def _wav(wave: Tensor, sample_rate_hz: int) -> bytes:
    sink = io.BytesIO()
    soundfile.write(sink, wave.numpy(), sample_rate_hz, format="WAV", subtype="PCM_16")
    return sink.getvalue()


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
