"""One set of shards as the plan sees it: columns shard by shard, rows where they are fetched.

Memory holds the shards that are shuffled together, not the set.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from omni_train.config.errors import ConfigError, DataError
from omni_train.data.chatml import count_text_tokens
from omni_train.data.columns import MEASURED_COLUMNS, measure_table
from omni_train.data.config import DataConfig
from omni_train.data.fetch import read_member
from omni_train.data.filters import FILTER_COLUMNS, Counted, FilterConfig, count, decide
from omni_train.data.index import MANIFEST_NAME, index_path, read_manifest, read_table, rows_of
from omni_train.data.measure import Costs, measure
from omni_train.data.plan import join_costs, token_slice
from omni_train.data.skiplist import read_skip_list
from omni_train.data.split import Part, can_split, part_row, split_recording
from omni_train.data.stores import FetchConfig, open_root
from omni_train.data.types import IndexRow, ModelSpec, SampleRef
from omni_train.data.work import PlannedSample

# Shards whose tokens are counted at the start; of more, evenly spaced ones stand for the others.
MAX_COUNTED_SHARDS = 256
SKIP_LISTED = "skip_list"


@dataclass(slots=True)
class Stretch:
    """Samples of a stretch of a source's stream.

    Args:
        shard, row: int64 [n], as in `SampleRef`.
        visit, reference: int64 [n], as in `SampleRef`.
        costs: of the same samples.
    """

    shard: NDArray[np.int64]
    row: NDArray[np.int64]
    visit: NDArray[np.int64]
    reference: NDArray[np.int64]
    costs: Costs


def manifest_bytes(path: str, *, key: str, fetch: FetchConfig | None = None) -> bytes:
    """Return the manifest of a set of shards as it lies there, to be hashed.

    Args:
        path: directory or URL.
        key: of the setting that names it.
        fetch: how remote files are read.

    Raises:
        ConfigError: there is none.
    """
    try:
        return open_root(path, fetch).read_all(MANIFEST_NAME)
    except DataError as error:
        raise ConfigError(
            key=key,
            value=path,
            rule=f"a directory with {MANIFEST_NAME} is needed: {error}",
            remedy="make one with omni-train data index DIRECTORY",
        ) from error


class ShardSet:
    """A set of shards with its index, read shard by shard.

    Args:
        name: of the source or task, for messages.
        path: directory or URL with `manifest.json`.
        fetch: how remote shards are read.
        cached_shards: indexes that are kept in memory.
    """

    def __init__(
        self, name: str, path: str, fetch: FetchConfig | None = None, *, cached_shards: int = 64
    ) -> None:
        self.name = name
        self.root = open_root(path, fetch)
        self.manifest = read_manifest(self.root)
        self.counts = [shard.num_samples for shard in self.manifest.shards]
        self.num_samples = sum(self.counts)
        self.table = lru_cache(maxsize=cached_shards)(self._table)

    def check_tokenizer(self, expected: str) -> None:
        """Refuse an index whose text token counts belong to another tokenizer."""
        if self.manifest.tokenizer_hash != expected:
            raise ConfigError(
                key=f"data.sources.{self.name}.path",
                value=self.root.location,
                rule=f"its index counts tokens with tokenizer {self.manifest.tokenizer_hash}, "
                f"the run's is {expected}",
                remedy="index the shards again with this tokenizer: omni-train data index",
            )

    def path_of(self, number: int) -> str:
        """Path or URL of a shard's tar file."""
        return self.root.url_of(self.manifest.shards[number].name)

    def row(self, shard: int, row: int) -> IndexRow:
        """One row of a shard's index."""
        return rows_of(self.table(shard).slice(row, 1))[0]

    def rows(self, shard: int) -> list[IndexRow]:
        """All rows of a shard's index."""
        return rows_of(self.table(shard))

    def _table(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        shard = self.manifest.shards[number]
        url = self.root.url_of(index_path(shard.name).name)
        return read_table(url, xxh3=shard.index_xxh3, store=self.root.store, columns=columns)


class ShardSource(ShardSet):
    """A set of shards as an endless stream of samples, measured, without those left out.

    Args:
        name: of the source.
        config: path, processing, filters, token budget.
        spec: the model's sizes and ids.
        tokenizer: counts the text of parts of long recordings.

    Rows from the shard's number of samples on are parts of recordings over the budget.

    Raises:
        DataError: manifest, index or skip list cannot be read.
    """

    # Columns of the index that are read beside what is measured and filtered.
    columns: tuple[str, ...] = ()

    def __init__(
        self, name: str, config: DataConfig, spec: ModelSpec, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        # Two groups: a window may begin in one and end in the next.
        cached = 2 * config.shuffle_shards
        super().__init__(name, config.sources[name].path, config.fetch, cached_shards=cached)
        self._config, self._spec, self._tokenizer = config, spec, tokenizer
        self.costs = lru_cache(maxsize=cached)(self._costs)
        self.parts = lru_cache(maxsize=cached)(self._parts)
        self._columns = lru_cache(maxsize=1)(self._read_columns)
        self._skip = read_skip_list(self.root)
        self._dropped: dict[int, NDArray[np.int64]] = {}
        self.left_out: dict[str, Counted] = {}
        self.totals, self.mean_tokens = self._survey()
        self.epoch_tokens = sum(self.totals)

    @property
    def limits(self) -> str:
        """What a sample that fits no pack is over."""
        return f"more than data.pack_tokens={self._config.pack_tokens} tokens"

    def window(self, start: int, stop: int, *, seed: tuple[int, ...]) -> Stretch:
        """Samples of tokens `start..stop` of the endless stream."""
        shard, row, _ = self._slice(start, stop, seed=seed)
        # A dialogue is the same each time.
        visit, reference = np.zeros_like(row), np.full_like(row, -1)
        return Stretch(shard, row, visit, reference, self._costs_of(shard, row))

    def _slice(
        self, start: int, stop: int, *, seed: tuple[int, ...]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Shard, row and epoch of the samples, int64 [n] each."""
        parts = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        epochs = [np.empty(0, np.int64)]
        for epoch in range(start // self.epoch_tokens, -(-stop // self.epoch_tokens)):
            part = token_slice(
                self.totals,
                max(start, epoch * self.epoch_tokens),
                min(stop, (epoch + 1) * self.epoch_tokens),
                seed=seed,
                shuffle_shards=self._config.shuffle_shards,
                tokens_of=self._stream_tokens,
            )
            parts.append(part)
            epochs.append(np.full(len(part[0]), epoch, np.int64))
        shards, rows = (np.concatenate([part[i] for part in parts]) for i in range(2))
        return shards, rows, np.concatenate(epochs)

    def used(self, number: int) -> Iterator[tuple[int, int]]:
        """Rows of a shard that are not left out and fit a pack, each with its tokens."""
        tokens = self.costs(number).num_tokens[: self.counts[number]]
        gone = set(self._dropped.get(number, np.empty(0, np.int64)).tolist())
        for row, size in enumerate(tokens.tolist()):
            if row not in gone and size <= self._config.pack_tokens:
                yield row, size

    def _costs_of(self, shard: NDArray[np.int64], row: NDArray[np.int64]) -> Costs:
        costs = Costs(
            num_tokens=np.empty(len(row), np.int64),
            vision_cost=np.empty(len(row)),
            audio_cost=np.empty(len(row)),
            llm_cost=np.empty(len(row)),
        )
        for number in np.unique(shard).tolist():
            here, of_shard = shard == number, self.costs(number)
            costs.num_tokens[here] = of_shard.num_tokens[row[here]]
            costs.vision_cost[here] = of_shard.vision_cost[row[here]]
            costs.audio_cost[here] = of_shard.audio_cost[row[here]]
            costs.llm_cost[here] = of_shard.llm_cost[row[here]]
        return costs

    def place(self, ref: SampleRef) -> PlannedSample:
        """Where the bytes of a sample lie, and which part of them it is."""
        shard, row, part = ref.shard, ref.row, None
        if row >= self.counts[shard]:
            row, part = self.parts(shard)[row - self.counts[shard]]
        return PlannedSample(self.name, self.path_of(shard), self.row(shard, row), part)

    def _costs(self, number: int) -> Costs:
        def rows(numbers: list[int]) -> list[IndexRow]:
            return rows_of(self.table(number).take(numbers))

        table = self._columns(number)
        costs = measure_table(table, self._config.processing, self._spec, rows)
        if not np.any(costs.num_tokens > self._config.pack_tokens):
            return costs
        parts = [part_row(self.row(number, row), part) for row, part in self._cut(number, costs)]
        return join_costs([costs, measure(parts, self._config.processing, self._spec)])

    def _parts(self, number: int) -> list[tuple[int, Part]]:
        return self._cut(number, self.costs(number))

    def _cut(self, number: int, costs: Costs) -> list[tuple[int, Part]]:
        """Parts of the recordings over the budget that may be split, with their rows."""
        budget = self._config.pack_tokens
        found: list[tuple[int, Part]] = []
        for number_of_row in np.flatnonzero(costs.num_tokens[: self.counts[number]] > budget):
            row = self.row(number, int(number_of_row))
            if not can_split(row):
                continue
            try:
                parts = self._split(number, row)
            except DataError as error:
                # A store out of reach on one rank alone would give that rank another plan.
                if error.reason == "unreachable":
                    raise
                # It stays over the budget, and the plan reports it so.
                continue
            found += [(int(number_of_row), part) for part in parts]
        return found

    def _split(self, number: int, row: IndexRow) -> list[Part]:
        config, budget = self._config.processing, self._config.pack_tokens
        place = (row.json_offset, row.json_size, row.json_xxh3)
        try:
            record = json.loads(read_member(self.path_of(number), *place, self.root.store))
        except ValueError as error:
            raise DataError("bad_json", str(error), key=row.key) from error
        return split_recording(record, row, budget, self._count_text, config, self._spec)

    def why_whole(self, shard: int, row: int) -> str:
        """Say why a sample over the budget was not split; '' for one of a kind that never is."""
        found = self.row(shard, row)
        if can_split(found):
            try:
                self._split(shard, found)
            except DataError as error:
                return error.detail
        return ""

    def _count_text(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
        return count_text_tokens(messages, self._tokenizer)

    def _stream_tokens(self, number: int) -> NDArray[np.int64]:
        """Length of each sample in the stream: 0 if left out, 1 if the plan will refuse it."""
        tokens = self.costs(number).num_tokens
        tokens = np.where(tokens > self._config.pack_tokens, 1, tokens)
        whole = np.array([row for row, _ in self.parts(number)], dtype=np.int64)
        tokens[whole] = 0
        if number in self._dropped:
            gone = self._dropped[number]
            tokens[gone] = 0
            tokens[self.counts[number] :][np.isin(whole, gone)] = 0
        return tokens

    def _read_columns(self, number: int) -> pa.Table:
        """What deciding and measuring need of an index, read at once."""
        filtered = FILTER_COLUMNS if self._decides(number) else ()
        columns = (*MEASURED_COLUMNS, *filtered, *self.columns)
        return self._table(number, list(dict.fromkeys(columns)))

    def _decides(self, number: int) -> bool:
        """Whether rows of a shard may be left out."""
        named = self._skip.get(self.manifest.shards[number].name)
        return bool(named) or self._config.filters != FilterConfig()

    def _survey(self) -> tuple[list[int], float]:
        """Go through the indexes: stream tokens of each shard, and the mean of a used sample.

        Filters see every shard, as a duplicate may be in any two.
        """
        stride = -(-len(self.counts) // MAX_COUNTED_SHARDS)
        counted: dict[int, NDArray[np.int64]] = {}
        seen: set[str] = set()
        for number in range(len(self.counts)):
            if self._decides(number):
                self._leave_out(number, seen)
            if number % stride == 0:
                counted[number] = self._stream_tokens(number)
        self.left_out = dict(sorted(self.left_out.items()))
        return self._totals(counted)

    def _totals(self, counted: dict[int, NDArray[np.int64]]) -> tuple[list[int], float]:
        """Tokens of each shard, of those not counted by their rows; and the mean of a sample."""
        sums = {number: int(tokens.sum()) for number, tokens in counted.items()}
        per_row = sum(sums.values()) / max(sum(self.counts[number] for number in sums), 1)
        totals = [sums.get(n, round(per_row * size)) for n, size in enumerate(self.counts)]
        used = sum(int(np.count_nonzero(tokens)) for tokens in counted.values())
        return totals, sum(sums.values()) / max(used, 1)

    def _leave_out(self, number: int, seen: set[str]) -> None:
        """Note which rows of a shard are left out, and count them by reason."""
        table = self._columns(number)
        reasons = self._reasons(number, table, seen)
        self._dropped[number] = np.flatnonzero(reasons != "")
        for reason, more in count(table, reasons).items():
            if reason:
                so_far = self.left_out.get(reason, Counted(0, 0.0))
                samples, hours = so_far.samples + more.samples, so_far.hours + more.hours
                self.left_out[reason] = Counted(samples, hours)

    def _reasons(self, number: int, table: pa.Table, seen: set[str]) -> NDArray[np.object_]:
        """Why each row of a shard is left out, by filter or skip list; empty for what is kept."""
        named = self._skip.get(self.manifest.shards[number].name, {})
        listed = pc.is_in(table.column("key"), pa.array(named, pa.string())).to_numpy()
        reasons = np.full(table.num_rows, SKIP_LISTED, dtype=np.object_)
        rest = table.filter(pa.array(~listed)) if listed.any() else table
        reasons[~listed] = decide(rest, self._config.filters, seen=seen)
        return reasons
