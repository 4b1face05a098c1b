"""Preference pairs in the data path: source, worker and loader of a stage that learns from them.

    bytes -> dialogue, chosen codes, rejected codes -> PairLayout -> PairBatch

A pair set is made by `omni-train talker pairs`: the chosen codes are the dialogue's speech, the
rejected ones and a reference's stand in its record. Sizes and the reference's log-probabilities are
those of a `PairTable` (pair_reference.py), so the plan opens no shard. Not done here: the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from omni_train.config.errors import DataError
from omni_train.data.collate import collate
from omni_train.data.config import DataConfig
from omni_train.data.fetch import fetch
from omni_train.data.loader import BYTES_PER_TOKEN, PlannedLoader, build_loader
from omni_train.data.measure import Costs, charge_talker
from omni_train.data.source import ShardSet, ShardSource
from omni_train.data.speech import ReferenceSpeech, encode_spoken, read_codes
from omni_train.data.speech_config import SpeechDataConfig
from omni_train.data.speech_loader import BYTES_PER_POSITION
from omni_train.data.split import Part
from omni_train.data.stores import Store
from omni_train.data.types import EncodedSample, ModelSpec, ProcessingConfig, RawSample
from omni_train.data.work import Bad, PackMaker, PlannedSample
from omni_train.engine.run import Run
from omni_train.models.talker_layout import TalkerSpec, lay_out
from omni_train.models.talker_pairs import PairBatch, PairLayout, pack_pairs
from omni_train.objectives.preference import PairTargets
from omni_train.speech.codec import check_codes

# Reason of a pair that the reference could not read; the ledger has its own.
BAD_PAIR = "bad_pair"


@dataclass(frozen=True, slots=True)
class PairFacts:
    """What is known of a pair once the reference has read it.

    Args:
        num_tokens: Thinker tokens of the dialogue.
        num_positions: Talker positions of prompt and both answers; 0 where it cannot be used.
        chosen, rejected: summed log-probability of each answer under the reference.
    """

    num_tokens: int
    num_positions: int
    chosen: float
    rejected: float


# By source, shard number and row.
PairTable = Mapping[str, Sequence[Sequence[PairFacts]]]


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A pair, encoded and laid out."""

    encoded: EncodedSample
    layout: PairLayout


def encode_pair(
    raw: RawSample,
    tokenizer: PreTrainedTokenizerFast,
    config: ProcessingConfig,
    spec: ModelSpec,
    talker: TalkerSpec,
) -> EncodedPair:
    """Return a pair that was fetched with its codes.

    Raises:
        DataError: `no_pair` where the record holds none; as `encode_spoken` and `lay_out`.
    """
    codes = read_codes(raw, talker.num_codes)
    rejected = _codes_of(raw.record.get("rejected_codes"), talker.num_codes)
    reference = None
    if (found := raw.record.get("reference")) is not None:
        if not isinstance(found, dict) or not isinstance(found.get("text"), str):
            raise DataError("no_pair", "the reference has no text")
        heard = _codes_of(found.get("codes"), talker.num_codes)
        reference = ReferenceSpeech(found["text"], heard)
    spoken = encode_spoken(raw, tokenizer, config, spec, codes=codes, reference=reference)
    return EncodedPair(spoken.encoded, PairLayout(lay_out(spoken.reply, talker), rejected))


def _codes_of(values: Any, num_codes: int) -> Tensor:
    whole = isinstance(values, list) and all(type(value) is int for value in values)
    if not whole or not values:
        raise DataError("no_pair", "the record has no list of rejected codes")
    codes = torch.tensor(values, dtype=torch.int64)
    check_codes(codes, num_codes)
    return codes


def collate_pairs(
    pairs: Sequence[EncodedPair],
    facts: Sequence[PairFacts],
    spec: ModelSpec,
    talker: TalkerSpec,
    *,
    bad: list[Bad] | None = None,
) -> PairBatch:
    """Return the micro-batch of some pairs.

    Args:
        pairs: in the order of the pack.
        facts: of each, for the reference's log-probabilities.
        spec, talker: of the models.
        bad: see `SpeechBatch`.
    """
    encoded = [pair.encoded for pair in pairs]
    lengths = [sample.num_tokens for sample in encoded]
    batch, answers = pack_pairs([pair.layout for pair in pairs], lengths, talker)
    sizes = torch.bincount(answers, minlength=2 * len(pairs)) if pairs else torch.zeros(0)
    reference = [value for fact in facts for value in (fact.chosen, fact.rejected)]
    return PairBatch(
        talker=batch,
        thinker=collate(encoded, spec),
        keys=[sample.key for sample in encoded],
        bad=bad or [],
        pairs=PairTargets(answers, sizes.float(), torch.tensor(reference, dtype=torch.float32)),
    )


class PairSource(ShardSource):
    """A set of pairs as an endless stream.

    Args:
        name, config, spec, tokenizer: as for every source.
        table: sizes of all pairs.
    """

    def __init__(
        self,
        name: str,
        config: DataConfig,
        spec: ModelSpec,
        tokenizer: PreTrainedTokenizerFast,
        *,
        table: PairTable,
    ) -> None:
        assert isinstance(config, SpeechDataConfig), "pairs have a budget of positions"
        self._settings, self._facts = config, table[name]
        super().__init__(name, config, spec, tokenizer)

    @property
    def limits(self) -> str:
        """What a pair that fits no pack is over."""
        return f"{super().limits}, or data.pack_positions={self._settings.pack_positions}"

    def _costs(self, number: int) -> Costs:
        costs = replace(super()._costs(number))
        facts = self._facts[number]
        tokens = np.array([fact.num_tokens for fact in facts], dtype=np.int64)
        positions = np.array([fact.num_positions for fact in facts], dtype=np.int64)
        charge_talker(
            costs,
            tokens,
            positions,
            token_budget=self._settings.pack_tokens,
            position_budget=self._settings.pack_positions,
        )
        return costs

    def _cut(self, number: int, costs: Costs) -> list[tuple[int, Part]]:
        return []

    def _decides(self, number: int) -> bool:
        return True

    def _leave_out(self, number: int, seen: set[str]) -> None:
        self._number = number
        super()._leave_out(number, seen)

    def _refuse(self, table: pa.Table, reasons: NDArray[np.object_]) -> None:
        unread = np.array([not fact.num_positions for fact in self._facts[self._number]])
        reasons[(reasons == "") & unread] = BAD_PAIR


@dataclass(frozen=True, slots=True)
class _Ready:
    """A pair of a pack with what is known of it."""

    pair: EncodedPair
    facts: PairFacts

    @property
    def key(self) -> str:
        """Key of the pair."""
        return self.pair.encoded.key


@dataclass(kw_only=True, slots=True)
class PairMaker(PackMaker):
    """Fetches, encodes and packs pairs.

    Args:
        talker: ids, codes and speakers of the Talker.
        table: the reference's log-probabilities, by source and key.
    """

    talker: TalkerSpec
    table: dict[tuple[str, str], PairFacts]

    def _encode(self, sample: PlannedSample) -> _Ready:
        raw = fetch(sample.shard, sample.row, self.store, codes=True)
        pair = encode_pair(raw, self.tokenizer, self.config, self.spec, self.talker)
        return _Ready(pair, self.table[sample.source, sample.key])

    def _collate(self, encoded: list[Any], bad: list[Bad]) -> PairBatch:
        ready: list[_Ready] = encoded
        pairs, facts = [sample.pair for sample in ready], [sample.facts for sample in ready]
        return collate_pairs(pairs, facts, self.spec, self.talker, bad=bad)


def build_pair_loader(
    config: SpeechDataConfig,
    tokenizer: PreTrainedTokenizerFast,
    spec: ModelSpec,
    talker: TalkerSpec,
    run: Run,
    table: PairTable,
) -> PlannedLoader:
    """Return the loader of a stage that learns from pairs; it gives a `PairBatch` for each pack.

    Args:
        config: sources and both budgets.
        tokenizer, spec: of the Thinker.
        talker: of the Talker.
        run: its rank, seed and ledger.
        table: what the reference found (pair_reference.py).
    """
    by_key = {
        (name, row.key): fact
        for name in config.sources
        for shard, facts in enumerate(table[name])
        for row, fact in zip(
            ShardSet(name, config.sources[name].path, config.fetch).rows(shard), facts, strict=True
        )
    }
    make = PairMaker(
        tokenizer,
        config.processing,
        spec,
        Store(config.fetch),
        config.worker_memory_bytes,
        talker=talker,
        table=by_key,
    )
    positions_per_token = -(-config.pack_positions // config.pack_tokens)
    return build_loader(
        config,
        tokenizer,
        spec,
        run,
        source_type=partial(PairSource, table=table),
        make=make,
        bytes_per_token=BYTES_PER_TOKEN + positions_per_token * BYTES_PER_POSITION,
    )
