"""A set of shards with spoken replies as the plan sees it: two lengths, references, repeats.

Beside what every source does: samples without codes are left out, the size of a sample respects
the Talker's budget too, a reference is chosen for each and counted, and rare pairs of word and
speaker come more often. All of it follows from the index; no codes are read here.

Letters: R rows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from omni_train.data.balance import Cell, Utterance, count_cells, most_by_word, repeats_of
from omni_train.data.config import DataConfig
from omni_train.data.measure import (
    Costs,
    charge_talker,
    talker_positions,
)
from omni_train.data.source import MAX_COUNTED_SHARDS, ShardSource, Stretch
from omni_train.data.speech_config import Balance, ReferenceChoice, SpeechDataConfig
from omni_train.data.split import Part, joint_of
from omni_train.data.tokenizer import encode_text
from omni_train.data.types import ModelSpec, SampleRef
from omni_train.data.work import PlannedSample

NO_CODES = "no_codes"
NO_REFERENCE = "no_reference"
# A reply is never its own reference.
_LEAST_REPLIES = 2

Int64Array = NDArray[np.int64]


@dataclass(slots=True)
class _Spoken:
    """What the index of one shard says of its replies, R rows.

    Args:
        num_reply_tokens, num_codes: int64 [R]; 0 where nothing is spoken.
        keys, texts, languages, speakers: of each row.
    """

    num_reply_tokens: Int64Array
    num_codes: Int64Array
    keys: list[str]
    texts: list[str]
    languages: list[str]
    speakers: list[str]

    def by_speaker(self, rows: Int64Array) -> dict[str, Int64Array]:
        """Those of some rows that can be the reference of another, by their speaker."""
        found: dict[str, list[int]] = {}
        for row in rows[self.num_codes[rows] > self.num_reply_tokens[rows]].tolist():
            found.setdefault(self.speakers[row], []).append(row)
        return {speaker: np.array(members) for speaker, members in found.items()}

    def utterance(self, row: int) -> Utterance:
        """Text, language and speaker of a row."""
        return self.texts[row], self.languages[row], self.speakers[row]


class SpeechSource(ShardSource):
    """A set of shards as an endless stream of spoken replies.

    Args:
        name: of the source.
        config: with the Talker's budget, references and balance.
        spec, tokenizer: as for every source.

    In the stream, rows from the shard's number of samples on are repeats; `window` names each by
    the row that it repeats. Nothing is split.
    """

    columns = (
        "key",
        "language",
        "speaker",
        "speech.num_codes",
        "speech.num_reply_tokens",
        "speech.text",
    )

    def __init__(
        self, name: str, config: DataConfig, spec: ModelSpec, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        assert isinstance(config, SpeechDataConfig), "spoken replies have settings of their own"
        self._settings = config
        self._balanced = config.balance is not Balance.none
        self._continued = config.reference is not ReferenceChoice.none
        cached = 2 * config.shuffle_shards
        self._thinker_costs = lru_cache(maxsize=cached)(super()._costs)
        self._spoken = lru_cache(maxsize=cached)(self._read_spoken)
        self._references = lru_cache(maxsize=cached)(self._find_references)
        self._repeats = lru_cache(maxsize=cached)(self._find_repeats)
        self._cells: Counter[Cell] = Counter()
        self._most: dict[str, int] = {}
        super().__init__(name, config, spec, tokenizer)

    @property
    def limits(self) -> str:
        """What a sample that fits no pack is over."""
        return f"{super().limits}, or data.pack_positions={self._settings.pack_positions}"

    def window(self, start: int, stop: int, *, seed: tuple[int, ...]) -> Stretch:
        """Samples of tokens `start..stop` of the stream, each with its reference."""
        shard, row, visit = self._slice(start, stop, seed=seed)
        if self._balanced:
            visit *= self._settings.max_repeats
            for number in np.unique(shard).tolist():
                extra = np.flatnonzero((shard == number) & (row >= self.counts[number]))
                whole, turn = self._repeats(number)
                place = row[extra] - self.counts[number]
                row[extra], visit[extra] = whole[place], visit[extra] + turn[place]
        found = Stretch(shard, row, visit, np.full_like(row, -1), self._costs_of(shard, row))
        if self._continued:
            self._add_references(found, seed)
        return found

    def place(self, ref: SampleRef) -> PlannedSample:
        """Where a sample and its reference lie."""
        reference = self.row(ref.shard, ref.reference) if ref.reference >= 0 else None
        return super().place(ref)._replace(visit=ref.visit, reference=reference)

    def _add_references(self, found: Stretch, seed: tuple[int, ...]) -> None:
        """Choose references by seed, visit and key, and count their text and codes."""
        tokens, codes = np.empty_like(found.row), np.empty_like(found.row)
        replies = np.empty_like(found.row)
        places = zip(found.shard.tolist(), found.row.tolist(), found.visit.tolist(), strict=True)
        for number, (shard, row, visit) in enumerate(places):
            spoken = self._spoken(shard)
            others = self._references(shard)[spoken.speakers[row]]
            others = others[others != row]
            name = f"{seed}:{visit}:{spoken.keys[row]}"
            other = int(others[xxhash.xxh3_64_intdigest(name.encode()) % len(others)])
            own = spoken.num_reply_tokens[row]
            # What stands behind another text may be tokenised in another way.
            text = joint_of(spoken.languages[row]) + spoken.texts[row]
            replies[number] = len(encode_text(self._tokenizer, text))
            replies[number] += spoken.num_reply_tokens[other]
            tokens[number] = self._thinker_costs(shard).num_tokens[row] - own + replies[number]
            codes[number] = spoken.num_codes[row] + spoken.num_codes[other]
            found.reference[number] = other
        self._charge(found.costs, tokens, talker_positions(tokens, replies, codes))

    def _charge(self, costs: Costs, tokens: Int64Array, positions: Int64Array) -> None:
        """Put sizes that respect both budgets, and the Talker's work, into the costs."""
        charge_talker(
            costs,
            tokens,
            positions,
            token_budget=self._settings.pack_tokens,
            position_budget=self._settings.pack_positions,
        )

    def _costs(self, number: int) -> Costs:
        """Costs of a shard's rows; with references, those of a middling one."""
        costs, spoken = replace(self._thinker_costs(number)), self._spoken(number)
        tokens, codes, replies = costs.num_tokens, spoken.num_codes, spoken.num_reply_tokens
        rows = np.flatnonzero(codes)
        if self._continued and len(rows):
            tokens = tokens + round(float(replies[rows].mean()))
            codes = codes + round(float(codes[rows].mean()))
        positions = talker_positions(costs.num_tokens, replies, codes)
        self._charge(costs, tokens, np.where(spoken.num_codes > 0, positions, 0))
        return costs

    def _cut(self, number: int, costs: Costs) -> list[tuple[int, Part]]:
        return []

    def _stream_tokens(self, number: int) -> Int64Array:
        tokens = super()._stream_tokens(number)
        return np.concatenate([tokens, tokens[self._repeats(number)[0]]])

    def _decides(self, number: int) -> bool:
        return True

    def _reasons(self, number: int, table: pa.Table, seen: set[str]) -> NDArray[np.object_]:
        """Besides: rows without codes, and speakers with too few replies to give a reference."""
        reasons = super()._reasons(number, table, seen)
        spoken = _spoken_of(table)
        reasons[(reasons == "") & (spoken.num_codes == 0)] = NO_CODES
        if self._continued:
            kept = np.flatnonzero(reasons == "")
            others = spoken.by_speaker(kept)
            for row in kept.tolist():
                if len(others.get(spoken.speakers[row], ())) < _LEAST_REPLIES:
                    reasons[row] = NO_REFERENCE
        return reasons

    def _survey(self) -> tuple[list[int], float]:
        found = super()._survey()
        if not self._balanced:
            return found
        for number in range(len(self.counts)):
            spoken = self._spoken(number)
            self._cells += count_cells(map(spoken.utterance, self._kept(number).tolist()))
        self._most = most_by_word(self._cells)
        self._repeats.cache_clear()
        stride = -(-len(self.counts) // MAX_COUNTED_SHARDS)
        numbers = range(0, len(self.counts), stride)
        return self._totals({number: self._stream_tokens(number) for number in numbers})

    def _kept(self, number: int) -> Int64Array:
        """Rows of a shard that are not left out."""
        return np.setdiff1d(np.arange(self.counts[number]), self._dropped[number])

    def _read_spoken(self, number: int) -> _Spoken:
        return _spoken_of(self._columns(number))

    def _find_references(self, number: int) -> dict[str, Int64Array]:
        return self._spoken(number).by_speaker(self._kept(number))

    def _find_repeats(self, number: int) -> tuple[Int64Array, Int64Array]:
        """Row that each repeat of a shard repeats, and for the how-manieth time, from 1."""
        spoken = self._spoken(number)
        rows: list[int] = []
        turns: list[int] = []
        for row in self._kept(number).tolist() if self._most else ():
            times = repeats_of(
                spoken.utterance(row),
                self._cells,
                self._most,
                max_repeats=self._settings.max_repeats,
            )
            rows += [row] * (times - 1)
            turns += range(1, times)
        return np.array(rows, dtype=np.int64), np.array(turns, dtype=np.int64)


def _spoken_of(table: pa.Table) -> _Spoken:
    speech = table.column("speech").combine_chunks()

    def texts(values: pa.Array) -> list[str]:
        found: list[str] = pc.fill_null(values, "").to_pylist()
        return found

    def numbers(name: str) -> Int64Array:
        # Children of a null struct may hold anything: `struct_field` looks at the parent too.
        values = pc.fill_null(pc.struct_field(speech, name), 0)
        return values.to_numpy(zero_copy_only=False).astype(np.int64)

    return _Spoken(
        num_reply_tokens=numbers("num_reply_tokens"),
        num_codes=numbers("num_codes"),
        keys=texts(table.column("key")),
        texts=texts(pc.struct_field(speech, "text")),
        languages=texts(table.column("language")),
        speakers=texts(table.column("speaker")),
    )
