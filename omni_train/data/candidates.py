"""Files of sampled replies and of their scores, as later steps read them.

    DIR/candidates.json, DIR/shard-000000.tar      written by `talker_candidates`
    DIR/ranking.json, DIR/shard-000000.jsonl       written by `omni-train talker rank`
    DIR/listen.jsonl                               written by `omni-train talker pairs`

Not done here: making either (omni_train/preferences).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omni_train.config.errors import DataError
from omni_train.data.index import hash_file
from omni_train.data.tars import read_tar

CANDIDATES_FILE, RANKING_FILE = "candidates.json", "ranking.json"
# Some of the pairs with their waves, a line each.
HEARD_PAIRS_FILE = "listen.jsonl"
# Name of the candidate that is the request's own speech; all others are samples.
RECORDING = "recording"


def read_candidates(tar: Path) -> Iterator[tuple[dict[str, Any], dict[str, bytes]]]:
    """Yield the record and the media of each request of a shard."""
    for key, members in read_tar(tar):
        record = json.loads(members.pop("json"))
        yield {"key": key, **record}, members


def candidate_shards(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """Return what made the candidates of a finished job, and its shards, checked.

    Raises:
        DataError: `missing_manifest` where the job is not finished, `hash_mismatch`.
    """
    path = folder / CANDIDATES_FILE
    if not path.is_file():
        raise DataError("missing_manifest", f"{path} is missing: the job is not finished")
    record = json.loads(path.read_bytes())
    tars = [folder / shard["name"] for shard in record["shards"]]
    for tar, shard in zip(tars, record["shards"], strict=True):
        if not tar.is_file() or hash_file(tar) != shard["xxh3"]:
            raise DataError("hash_mismatch", "not the shard that was made", shard=str(tar))
    return record, tars


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a ranked shard."""
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)
