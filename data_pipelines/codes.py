"""Adds speech codes to a set of shards: a new set with a `.codes.npy` beside every spoken reply.

    source set, checked -> worker processes, one shard at a time -> new shards, indexes -> manifest

    reply.wav -> reply.codes.npy    int32 [T], by the codec that `codes.json` of the new set names

All other members are copied as they are; a sound that is only heard has no codes. A shard appears
whole, its index after it, the manifest last: the same command again goes on with the shards that
are missing, and gives the same bytes as an uninterrupted run on any number of processes, and
machines (`part`). Not done here: fitting a codec.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from data_pipelines.prepare import Part
from data_pipelines.shards import Sample, index_tar, write_tar
from omni_train.config.errors import ConfigError, DataError
from omni_train.data.chatml import codes_member, spoken_member
from omni_train.data.index import (
    Manifest,
    ShardInfo,
    describe_shard,
    hash_file,
    index_path,
    read_manifest,
    read_table,
    write_atomically,
    write_manifest,
)
from omni_train.data.media import decode_audio, probe
from omni_train.data.tars import read_tar
from omni_train.data.tokenizer import load_tokenizer, tokenizer_hash
from omni_train.speech.codec import (
    CODES_FILE,
    Codec,
    CodecConfig,
    CodecKind,
    dump_codes,
    load_codec,
)
from omni_train.speech.mel import SAMPLE_RATE_HZ

# Of the locks of those who work on a set.
FOLDER = "codes"


def add_codes(
    source: str | Path,
    out_dir: str | Path,
    codec: CodecConfig,
    *,
    tokenizer_dir: str,
    part: Part | None = None,
    num_workers: int = 2,
    report: Callable[[str], None] | None = None,
) -> Manifest | None:
    """Write the new set, or what is missing of it, and return its manifest.

    Args:
        source: directory of the shards, with index and manifest.
        out_dir: directory that is made, or that an earlier call of the same settings began.
        codec: encodes the sound of every spoken reply.
        tokenizer_dir: the tokenizer that the source's index was made with.
        part: only these shards, and no manifest; a call without finds them done.
        num_workers: processes; 0 works in this one. Changes no byte.
        report: is called with one line per finished shard.

    Raises:
        ConfigError: another tokenizer or codec than before, or a codec that cannot encode.
        DataError: a damaged shard; `no_speech` where the set has no spoken reply; `bad_codes` where
            one has codes already; and what decoding a sound finds.
    """
    source, out_dir = Path(source), Path(out_dir)
    manifest = read_manifest(source)
    expected = tokenizer_hash(load_tokenizer(tokenizer_dir))
    if manifest.tokenizer_hash != expected:
        raise ConfigError(
            key="tokenizer",
            value=tokenizer_dir,
            rule=f"the index of {source} was made with tokenizer {manifest.tokenizer_hash}",
            remedy="give that tokenizer, or index the shards again",
        )
    if not any(_speaks(index_path(source / shard.name)) for shard in manifest.shards):
        raise DataError("no_speech", f"no dialogue of {source} has a spoken reply")
    out_dir.mkdir(parents=True, exist_ok=True)
    _claim(out_dir, source, codec)
    chosen = manifest.shards if part is None else manifest.shards[part.number :: part.of]
    missing = [shard for shard in chosen if not _finished(out_dir, shard)]
    jobs = [(source / shard.name, out_dir, shard.xxh3, codec, tokenizer_dir) for shard in missing]
    for number, name in enumerate(_run(jobs, num_workers), 1):
        if report is not None:
            report(f"[{number}/{len(jobs)}] {name}")
    if part is not None:
        return None
    shards = [
        describe_shard(out_dir / shard.name, num_samples=shard.num_samples)
        for shard in manifest.shards
    ]
    made = Manifest(tokenizer_hash=expected, shards=tuple(shards))
    write_manifest(out_dir, made)
    return made


def _speaks(index: Path) -> bool:
    """Whether a shard has a spoken reply."""
    speech = read_table(index, columns=["speech"]).column("speech")
    return speech.null_count < len(speech)


def _run(jobs: list[tuple[Any, ...]], num_workers: int) -> Iterator[str]:
    if num_workers == 0:
        yield from map(_write_shard, jobs)
        return
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_write_shard, jobs)


def _claim(out_dir: Path, source: Path, config: CodecConfig) -> None:
    """Write down whose codes these are, or refuse to mix them with others."""
    codec = load_codec(config)
    record = {
        "source_manifest": hash_file(source / "manifest.json"),
        "codec": config.kind.name,
        "fingerprint": codec.fingerprint,
        "frame_rate_hz": codec.frame_rate_hz,
        "codebook_size": codec.codebook_size,
    }
    path = out_dir / CODES_FILE
    if path.exists():
        if json.loads(path.read_bytes()) != record:
            raise ConfigError(
                key="out_dir",
                value=str(out_dir),
                rule="holds codes of another codec or of other shards",
                remedy="choose another directory, or remove this one",
            )
        return
    # Hidden are the unfinished files of others who begin now.
    if any(path.name != FOLDER and not path.name.startswith(".") for path in out_dir.iterdir()):
        raise ConfigError(
            key="out_dir",
            value=str(out_dir),
            rule=f"holds other files and no {CODES_FILE}",
            remedy="choose an empty directory",
        )
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())


def _finished(out_dir: Path, shard: ShardInfo) -> bool:
    """Whether a shard was written: its index comes after it."""
    return (out_dir / shard.name).is_file() and index_path(out_dir / shard.name).is_file()


@lru_cache(maxsize=1)
def _codec(kind: CodecKind, path: str) -> Codec:
    return load_codec(CodecConfig(path=path, kind=kind))


def _write_shard(job: tuple[Path, Path, str, CodecConfig, str]) -> str:
    """Write one shard and its index; return its name."""
    tar, out_dir, digest, config, tokenizer_dir = job
    if hash_file(tar) != digest:
        raise DataError("hash_mismatch", "not the shard of the manifest", shard=str(tar))
    codec = _codec(config.kind, config.path)
    target = out_dir / tar.name
    write_tar(target, (_with_codes(sample, codec, tar) for sample in read_tar(tar)))
    index_tar(target, load_tokenizer(tokenizer_dir))
    return tar.name


def _with_codes(sample: tuple[str, dict[str, bytes]], codec: Codec, tar: Path) -> Sample:
    key, members = sample
    media = {name: data for name, data in members.items() if name != "json"}
    record = json.loads(members["json"])
    try:
        if (sound := spoken_member(record["messages"])) is not None:
            name = codes_member(sound)
            if name in media:
                raise DataError("bad_codes", f"there is {name!r} already")
            wave = decode_audio(media[sound], probe(media[sound], sound))
            media[name] = dump_codes(codec.encode(wave, SAMPLE_RATE_HZ))
    except DataError as error:
        raise error.at(shard=str(tar), key=key) from error
    return Sample(key, record, media)
