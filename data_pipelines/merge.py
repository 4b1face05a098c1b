"""Joins the parts of `prepare` into one set: `rejected.jsonl`, then the manifest."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.prepare import CHUNK_FIELDS, FOLDER, SETTINGS, Part, chunk_record, read_record
from omni_train.config.errors import DataError
from omni_train.data.index import Manifest, ShardInfo, write_atomically, write_manifest

REJECTED = "rejected.jsonl"
_PART = re.compile(r"part-(\d+)-of-(\d+)\.json")


@dataclass(frozen=True, slots=True)
class Merged:
    """A finished set.

    Args:
        num_shards, num_samples: in it.
        rejected: rows without a sample, by reason.
    """

    num_shards: int
    num_samples: int
    rejected: dict[str, int]


def merge(out_dir: Path) -> Merged:
    """Write `rejected.jsonl` and `manifest.json` of a set whose parts are all done.

    Raises:
        FileNotFoundError: names the parts that are missing, or the chunks.
        DataError: `part_mismatch` where the parts were counted differently.
    """
    numbers = _all_chunks(out_dir)
    missing = [f"{number:06d}" for number in numbers if not chunk_record(out_dir, number).is_file()]
    if missing:
        raise FileNotFoundError(f"{out_dir / FOLDER} lacks the chunks {', '.join(missing[:10])}")
    records = [read_record(chunk_record(out_dir, number), *CHUNK_FIELDS) for number in numbers]
    rows: list[dict[str, Any]] = [row for record in records for row in record["rejected"]]
    lines = [json.dumps(row, ensure_ascii=True) + "\n" for row in rows]
    write_atomically(out_dir / REJECTED, "".join(lines).encode())
    shards = tuple(ShardInfo(**record["shard"]) for record in records if record["shard"])
    settings = read_record(out_dir / FOLDER / SETTINGS, "tokenizer_hash")
    manifest = Manifest(tokenizer_hash=settings["tokenizer_hash"], shards=shards)
    write_manifest(out_dir, manifest)
    reasons = Counter(row["reason"] for row in rows)
    return Merged(len(shards), manifest.num_samples, dict(sorted(reasons.items())))


def _all_chunks(out_dir: Path) -> range:
    """Return the numbers of all chunks, after seeing that every part has made its own."""
    found: dict[int, set[int]] = {}
    for path in out_dir.glob("part-*-of-*.json"):
        match = _PART.fullmatch(path.name)
        if match:
            found.setdefault(int(match[2]), set()).add(int(match[1]))
    if not found:
        raise FileNotFoundError(f"no part-*-of-*.json in {out_dir}; run data prepare first")
    # Of several ways to share the work, one that is complete.
    for of, parts in sorted(found.items()):
        if parts >= set(range(of)):
            return _same_count(out_dir, of)
    of, parts = max(found.items(), key=lambda item: (len(item[1]) / item[0], item[0]))
    missing = [Part(number, of).file_name for number in range(of) if number not in parts]
    raise FileNotFoundError(f"{out_dir} lacks {', '.join(missing)}; run these parts first")


def _same_count(out_dir: Path, of: int) -> range:
    paths = [out_dir / Part(number, of).file_name for number in range(of)]
    counts = {path.name: read_record(path, "num_chunks")["num_chunks"] for path in paths}
    if len(set(counts.values())) != 1:
        remedy = "run all of them again on the same source"
        raise DataError("part_mismatch", f"the parts saw different sources: {counts}; {remedy}")
    return range(next(iter(counts.values())))
