"""The reference's log-probabilities of a pair set: computed once, kept, refused for another model.

    DIR/reference.json                  hash of the reference, hashes of the sets
    DIR/<source>/shard-000000.parquet   a row for each pair: sizes, two log-probabilities, reason

So no reference model is in memory while training. The models are plain replicas; ranks share the
pairs of a shard, and a shard's file appears whole, so an interrupted pass goes on.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedTokenizerFast

from omni_train.config.errors import DataError
from omni_train.data.claim import claim
from omni_train.data.fetch import fetch
from omni_train.data.index import write_atomically
from omni_train.data.loader import source_hashes
from omni_train.data.pairs import EncodedPair, PairFacts, PairTable, collate_pairs, encode_pair
from omni_train.data.source import ShardSet
from omni_train.data.speech_config import SpeechDataConfig
from omni_train.data.stores import Store
from omni_train.data.tokenizer import tokenizer_hash
from omni_train.engine.distributed import barrier, gather_json
from omni_train.engine.fingerprint import flatten, plain
from omni_train.engine.hashing import weights_hash
from omni_train.engine.run import Run
from omni_train.models.talker import thinker_states
from omni_train.objectives.preference import answer_logprobs
from omni_train.speech.speaking import Replicas, one_thread

REFERENCE_FILE = "reference.json"
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("num_tokens", pa.int64()),
        ("num_positions", pa.int64()),
        ("chosen", pa.float64()),
        ("rejected", pa.float64()),
        ("reason", pa.string()),
    ]
)
_UNUSABLE = PairFacts(num_tokens=0, num_positions=0, chosen=0.0, rejected=0.0)


def keep_reference(
    data: SpeechDataConfig,
    replicas: Replicas,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    run: Run,
) -> PairTable:
    """Score all pairs of the sources that are not scored yet; return what is known of all.

    Pairs that cannot be used are in the ledger; all ranks must call.

    Args:
        data: sources and budgets.
        replicas: the reference, plain, on this rank's device.
        tokenizer: the model's.
        folder: where it is kept; all ranks must see it.
        run: ranks, events, ledger.

    Raises:
        ConfigError: the folder holds the log-probabilities of another reference, or of other sets.
    """
    identity = {
        "reference": weights_hash([replicas.thinker, replicas.talker]),
        "sources": source_hashes(data),
        "tokenizer": tokenizer_hash(tokenizer),
        "processing": json.dumps(flatten(plain(data.processing)), sort_keys=True),
    }
    claim(
        folder / REFERENCE_FILE,
        identity,
        run,
        key="reference_dir",
        rule="its log-probabilities are of another reference",
        remedy="start from the model that they were computed with, or give another directory",
    )
    scorer = _Scorer(data, replicas, tokenizer)
    table: dict[str, list[list[PairFacts]]] = {}
    scored = 0
    for name, config in data.sources.items():
        source = ShardSet(name, config.path, data.fetch)
        table[name] = []
        for number, shard in enumerate(source.manifest.shards):
            path = folder / name / f"{Path(shard.name).stem}.parquet"
            # All ranks must look before any of them writes.
            missing = not path.is_file()
            barrier()
            if missing:
                with one_thread(run.world.device):
                    own = scorer.rows(source, number, run.world.rank, run.world.size)
                rows = sorted(
                    (r for rank in gather_json(own) for r in rank), key=lambda r: r["row"]
                )
                if run.is_main:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(path, _parquet(rows))
                scored += len(rows)
                barrier()
            table[name].append(_read(path, name, shard.name, run))
    run.event("reference", reference=identity["reference"], pairs_scored=scored, folder=str(folder))
    return table


class _Scorer:
    """Runs the reference over pairs, several in a pack."""

    def __init__(
        self, data: SpeechDataConfig, replicas: Replicas, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        self._data, self._replicas, self._tokenizer = data, replicas, tokenizer
        self._store = Store(data.fetch)

    def rows(self, source: ShardSet, number: int, rank: int, size: int) -> list[dict[str, Any]]:
        """Return the rows of this rank's share of a shard."""
        rows: list[dict[str, Any]] = []
        pack: list[tuple[dict[str, Any], EncodedPair]] = []
        for row, pair in self._read(source, number, rank, size, rows):
            if pack and not self._fits([*(p for _, p in pack), pair]):
                rows += self._score(pack)
                pack = []
            pack.append((row, pair))
        return rows + self._score(pack)

    def _read(
        self, source: ShardSet, number: int, rank: int, size: int, rows: list[dict[str, Any]]
    ) -> Iterator[tuple[dict[str, Any], EncodedPair]]:
        """Yield this rank's pairs; rows of those that cannot be used are added to `rows`."""
        shard, models = source.path_of(number), self._replicas
        spec, talker = models.thinker.spec, models.talker.spec
        for place, row in list(enumerate(source.rows(number)))[rank::size]:
            made: dict[str, Any] = {"row": place, "key": row.key, "reason": ""}
            try:
                raw = fetch(shard, row, self._store, codes=True)
                pair = encode_pair(raw, self._tokenizer, self._data.processing, spec, talker)
            except DataError as error:
                reason = f"{error.reason}: {error.detail}"
                rows.append(made | asdict(_UNUSABLE) | {"reason": reason})
            else:
                yield made, pair

    def _fits(self, pairs: list[EncodedPair]) -> bool:
        tokens = sum(pair.encoded.num_tokens for pair in pairs)
        positions = sum(pair.layout.num_positions for pair in pairs)
        return tokens <= self._data.pack_tokens and positions <= self._data.pack_positions

    @torch.no_grad()
    def _score(self, pack: list[tuple[dict[str, Any], EncodedPair]]) -> list[dict[str, Any]]:
        if not pack:
            return []
        models, pairs = self._replicas, [pair for _, pair in pack]
        facts = [
            replace(
                _UNUSABLE,
                num_tokens=pair.encoded.num_tokens,
                num_positions=pair.layout.num_positions,
            )
            for pair in pairs
        ]
        batch = collate_pairs(pairs, facts, models.thinker.spec, models.talker.spec)
        batch = batch.to(models.talker.codec_head.weight.device)
        assert batch.thinker is not None, "pairs come with their dialogues"
        states = thinker_states(models.thinker, batch.thinker)
        answers = answer_logprobs(models.talker.logprobs(states, batch.talker), batch.pairs)
        found = answers.view(-1, 2).tolist()
        return [
            row | asdict(replace(fact, chosen=chosen, rejected=rejected))
            for (row, _), fact, (chosen, rejected) in zip(pack, facts, found, strict=True)
        ]


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _read(path: Path, source: str, shard: str, run: Run) -> list[PairFacts]:
    """What is known of a shard's pairs; the ledger gets those that cannot be used."""
    facts = []
    for row in pq.read_table(io.BytesIO(path.read_bytes())).to_pylist():
        if reason := row.pop("reason"):
            run.ledger(source=source, shard=shard, key=row["key"], reason=reason)
        del row["key"]
        facts.append(PairFacts(**row))
    return facts
