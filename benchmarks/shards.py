"""Large sets of samples in little time: one real tar, many times over."""

from __future__ import annotations

import os
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
    own_keys: bool = True,
) -> Path:
    """Write shards of short dialogues below `root`; return their directory.

    The index of shard 12 calls its samples s012-0000 and so on; the tars, which are read by offset,
    are one file under many names. Without `own_keys` the indexes are one file too.
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
    index = root / "one" / "shard-000000.parquet"
    rows = read_index(index)
    infos = []
    (root / "set").mkdir()
    for number in range(num_shards):
        name = f"shard-{number:06d}"
        os.link(root / "one" / shard.name, root / "set" / f"{name}.tar")
        path = root / "set" / f"{name}.parquet"
        if own_keys:
            for count, row in enumerate(rows):
                row.key = f"s{number:03d}-{count:04d}"
            write_index(path, rows)
        else:
            os.link(index, path)
        infos.append(
            ShardInfo(
                name=f"{name}.tar",
                num_samples=samples_per_shard,
                bytes=shard.bytes,
                xxh3=shard.xxh3,
                index_xxh3=hash_file(path) if own_keys else shard.index_xxh3,
            )
        )
    manifest = Manifest(tokenizer_hash=tokenizer_hash(tokenizer), shards=tuple(infos))
    write_manifest(root / "set", manifest)
    return root / "set"
