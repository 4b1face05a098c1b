"""A set of 100,000 samples in little time: one real tar, copied, each copy with keys of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from data_pipelines.shards import Sample, write_shards
from omni_train.data.index import (
    Manifest,
    ShardInfo,
    hash_file,
    read_index,
    write_index,
    write_manifest,
)
from omni_train.data.tokenizer import tokenizer_hash


def write_copies(
    root: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_shards: int = 100,
    samples_per_shard: int = 1000,
) -> Path:
    """Write shards of short dialogues below `root`; return their directory.

    The index of shard 12 calls its samples s012-0000 and so on; the tars, which are read by offset,
    all have those of the first one.
    """
    rng = np.random.default_rng(0)
    samples = []
    for number in range(samples_per_shard):
        words = " ".join(["word"] * int(np.clip(rng.lognormal(2.5, 0.8), 1, 100)))
        messages = [
            {"role": "user", "content": "which word"},
            {"role": "assistant", "content": words},
        ]
        samples.append(Sample(f"s{number:04d}", {"messages": messages}))
    size = {"tokenizer": tokenizer, "samples_per_shard": samples_per_shard}
    shard = write_shards(samples, root / "one", **size).shards[0]
    rows = read_index(root / "one" / "shard-000000.parquet")
    infos = []
    (root / "set").mkdir()
    for number in range(num_shards):
        name = f"shard-{number:06d}"
        shutil.copyfile(root / "one" / shard.name, root / "set" / f"{name}.tar")
        for count, row in enumerate(rows):
            row.key = f"s{number:03d}-{count:04d}"
        path = root / "set" / f"{name}.parquet"
        write_index(path, rows)
        infos.append(
            ShardInfo(
                name=f"{name}.tar",
                num_samples=samples_per_shard,
                bytes=shard.bytes,
                xxh3=shard.xxh3,
                index_xxh3=hash_file(path),
            )
        )
    manifest = Manifest(tokenizer_hash=tokenizer_hash(tokenizer), shards=tuple(infos))
    write_manifest(root / "set", manifest)
    return root / "set"
