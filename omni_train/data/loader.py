"""The plan, run: global steps of batches for one rank, in an order that any rank can recompute.

The loader's whole state is (epoch, window, step): window w of the endless stream is a pure function
of the sources, the settings and w, so resuming plans one window again and reads nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from omni_train.config.errors import ConfigError, DataError
from omni_train.data.collate import collate
from omni_train.data.config import DataConfig
from omni_train.data.encode import encode
from omni_train.data.fetch import fetch
from omni_train.data.index import MANIFEST_NAME, index_path, read_index, read_manifest
from omni_train.data.measure import Costs, measure
from omni_train.data.plan import assign, plan_window, shuffled_slice
from omni_train.data.tokenizer import tokenizer_hash
from omni_train.data.types import Batch, IndexRow, ModelSpec, PackSpec, ProcessingConfig, SampleRef
from omni_train.engine.run import Run
from omni_train.engine.types import StepItem

# Shards per source whose mean sample length stands for the source when weights become counts.
_SHARDS_FOR_MEAN = 64


@dataclass(frozen=True, slots=True)
class _Work:
    """What a worker needs to make one batch: offsets, never media."""

    samples: list[tuple[str, Path, IndexRow]]


class ShardSource:
    """A set of shards with its index, read shard by shard.

    Raises:
        ConfigError: the index counts text tokens under another tokenizer.
    """

    def __init__(self, name: str, path: str, processing: ProcessingConfig, spec: ModelSpec) -> None:
        self.name = name
        self.root = Path(path)
        self.manifest = read_manifest(self.root)
        self.counts = [shard.num_samples for shard in self.manifest.shards]
        self.num_samples = sum(self.counts)
        self._processing, self._spec = processing, spec
        self.shard = lru_cache(maxsize=64)(self._shard)

    def check_tokenizer(self, expected: str) -> None:
        """Refuse an index whose text token counts belong to another tokenizer."""
        if self.manifest.tokenizer_hash != expected:
            raise ConfigError(
                key=f"data.sources.{self.name}.path",
                value=str(self.root),
                rule=f"its index counts tokens with tokenizer {self.manifest.tokenizer_hash}, "
                f"the run's is {expected}",
                remedy="index the shards again with this tokenizer: omni-train data index",
            )

    def _shard(self, number: int) -> tuple[list[IndexRow], Costs]:
        shard = self.manifest.shards[number]
        rows = read_index(index_path(self.root / shard.name))
        return rows, measure(rows, self._processing, self._spec)

    def path_of(self, number: int) -> Path:
        """Path of a shard's tar file."""
        return self.root / self.manifest.shards[number].name

    def mean_tokens(self) -> float:
        """Mean tokens per sample, over evenly spaced shards where there are many."""
        stride = -(-len(self.counts) // _SHARDS_FOR_MEAN)
        tokens = [self.shard(n)[1].num_tokens for n in range(0, len(self.counts), stride)]
        return float(np.concatenate(tokens).mean())


class _PackDataset(Dataset[Batch]):
    """Work items in, batches out; runs in the worker processes."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, config: ProcessingConfig, spec: ModelSpec
    ) -> None:
        self.tokenizer, self.config, self.spec = tokenizer, config, spec

    def __getitem__(self, work: _Work) -> Batch:
        encoded, bad = [], []
        for source, shard, row in work.samples:
            try:
                encoded.append(encode(fetch(shard, row), self.tokenizer, self.config, self.spec))
            except DataError as error:
                bad.append((source, shard.name, row.key, str(error)))
        return collate(encoded, self.spec, bad=bad)


class PlannedLoader:
    """Delivers global steps for one rank, from any position.

    Args:
        config: sources, budgets, workers.
        tokenizer: the run's tokenizer.
        spec: the model's sizes and ids.
        rank, world_size: this rank among the data-parallel ranks.
        seed: names the order of samples; another seed is another order.
        ledger: called with source, shard, key and reason of every sample that the plan leaves out.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        tokenizer: PreTrainedTokenizerFast,
        spec: ModelSpec,
        rank: int,
        world_size: int,
        seed: int,
        ledger: Callable[..., None],
    ) -> None:
        self.config, self.rank, self.world_size, self.seed = config, rank, world_size, seed
        self._ledger = ledger
        self._dataset = _PackDataset(tokenizer, config.processing, spec)
        self.sources = [
            ShardSource(name, source.path, config.processing, spec)
            for name, source in sorted(config.sources.items())
        ]
        for source in self.sources:
            source.check_tokenizer(tokenizer_hash(tokenizer))
        self._rates = self._samples_per_window()
        self._window, self._step = 0, 0
        self._bad: Counter[str] = Counter()
        self._bad_in_a_row = 0

    def _samples_per_window(self) -> list[float]:
        """Samples each source gives to a window, so that tokens come in the weights' ratio."""
        weights = [self.config.sources[source.name].weight for source in self.sources]
        wanted = np.array([w / s.mean_tokens() for w, s in zip(weights, self.sources, strict=True)])
        rates = self.config.window_samples * wanted / wanted.sum()
        sizes = np.array([source.num_samples for source in self.sources])
        # A window in which every source repeats itself would only put copies into one pack.
        rates *= min(1.0, float((sizes / rates).max()))
        return [float(rate) for rate in rates]

    def state(self) -> dict[str, int]:
        """Position of the next global step that has not been delivered."""
        return {"epoch": self._epoch(self._window), "window": self._window, "step": self._step}

    def load_state(self, state: dict[str, int]) -> None:
        """Continue at a position that `state` returned, at any world size."""
        self._window, self._step = state["window"], state["step"]

    def _epoch(self, window: int) -> int:
        return min(
            int(window * rate) // source.num_samples
            for rate, source in zip(self._rates, self.sources, strict=True)
        )

    def plan(self, window: int) -> list[list[PackSpec]]:
        """Global steps of a window, each a list of packs; the same on every rank."""
        refs: list[SampleRef] = []
        for number, (source, rate) in enumerate(zip(self.sources, self._rates, strict=True)):
            # floor(w * rate) keeps fractions of a sample for the next window.
            start, stop = int(window * rate), int((window + 1) * rate)
            where = shuffled_slice(
                source.counts,
                start,
                stop,
                seed=(self.seed, number),
                shuffle_shards=self.config.shuffle_shards,
            )
            refs.extend(SampleRef(number, shard, row) for shard, row in where)
        if not refs:
            return []
        planned = plan_window(
            refs,
            self._costs(refs),
            pack_tokens=self.config.pack_tokens,
            packs_per_step=self.config.global_batch_packs,
            seed=(self.seed, window),
        )
        for ref in planned.over_budget if self.rank == 0 else []:
            name, shard, row = self._locate(ref)
            reason = f"over_budget: more than data.pack_tokens={self.config.pack_tokens} tokens"
            self._ledger(source=name, shard=shard.name, key=row.key, reason=reason)
        return planned.steps

    def _costs(self, refs: list[SampleRef]) -> Costs:
        measured = [(self.sources[r.source].shard(r.shard)[1], r.row) for r in refs]
        return Costs(
            num_tokens=np.array([c.num_tokens[row] for c, row in measured], np.int64),
            vision_cost=np.array([c.vision_cost[row] for c, row in measured]),
            audio_cost=np.array([c.audio_cost[row] for c, row in measured]),
            llm_cost=np.array([c.llm_cost[row] for c, row in measured]),
        )

    def _locate(self, ref: SampleRef) -> tuple[str, Path, IndexRow]:
        source = self.sources[ref.source]
        return source.name, source.path_of(ref.shard), source.shard(ref.shard)[0][ref.row]

    def _schedule(self) -> Iterator[tuple[int, int, int, list[_Work]]]:
        """(window, step, steps in the window, this rank's work by micro-step), endlessly."""
        window, first = self._window, self._step
        idle = 0
        while True:
            steps = self.plan(window)
            idle = 0 if steps else idle + 1
            if idle > 1000:
                raise DataError("no_samples", "no sample of any source fits data.pack_tokens")
            for step in range(first, len(steps)):
                micro = assign(steps[step], self.world_size)
                work = [_Work([self._locate(r) for r in m[self.rank].samples]) for m in micro]
                yield window, step, len(steps), work
            window, first = window + 1, 0

    def steps(self) -> Iterator[StepItem]:
        """Global steps from the current position on; `state` moves as they are delivered."""
        pending: list[tuple[int, int, int, int]] = []

        def work_items() -> Iterator[_Work]:
            for window, step, num_steps, work in self._schedule():
                pending.append((window, step, num_steps, len(work)))
                yield from work

        workers = self.config.num_workers
        batches = iter(
            DataLoader(
                self._dataset,
                sampler=work_items(),
                batch_size=None,
                num_workers=workers,
                prefetch_factor=self.config.prefetch_packs if workers else None,
                worker_init_fn=_one_thread if workers else None,
            )
        )
        while True:
            micro_batches = [next(batches)]
            window, step, num_steps, num_micro = pending.pop(0)
            micro_batches += [next(batches) for _ in range(num_micro - 1)]
            last = step + 1 == num_steps
            self._window, self._step = (window + 1, 0) if last else (window, step + 1)
            yield StepItem(micro_batches, self._epoch(window), window, step)

    def count_bad(self, bad: Sequence[tuple[str, str, str, str]], *, num_samples: int) -> None:
        """Count the unusable samples of a global step and stop when there are too many.

        Args:
            bad: (source, shard, key, reason) of all ranks, so that all ranks stop together.
            num_samples: usable samples of the same step.

        Raises:
            DataError: `too_many_bad`, over the share of a source or in a row.
        """
        self._bad.update(source for source, *_ in bad)
        self._bad_in_a_row = 0 if num_samples else self._bad_in_a_row + len(bad)
        for source in self.sources:
            allowed = max(1.0, self.config.max_bad_share * source.num_samples)
            if self._bad[source.name] > allowed:
                raise DataError(
                    "too_many_bad",
                    f"{self._bad[source.name]} samples of source {source.name} are unusable, "
                    f"data.max_bad_share={self.config.max_bad_share} allows {allowed:.0f}; "
                    "see ledger.jsonl",
                )
        if self._bad_in_a_row > self.config.max_bad_in_a_row:
            raise DataError(
                "too_many_bad",
                f"{self._bad_in_a_row} samples in a row are unusable, "
                f"data.max_bad_in_a_row={self.config.max_bad_in_a_row}; see ledger.jsonl",
            )


def source_hashes(config: DataConfig) -> dict[str, str]:
    """What identifies the data of a run: the hash of each source's manifest.

    Raises:
        ConfigError: a source has no manifest.
    """
    hashes = {}
    for name, source in config.sources.items():
        path = Path(source.path) / MANIFEST_NAME
        if not path.is_file():
            raise ConfigError(
                key=f"data.sources.{name}.path",
                value=source.path,
                rule=f"a directory with {MANIFEST_NAME} is needed",
                remedy="make one with omni-train data index DIRECTORY",
            )
        hashes[name] = str(xxhash.xxh3_64_hexdigest(path.read_bytes()))
    return hashes


def build_loader(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, spec: ModelSpec, run: Run
) -> PlannedLoader:
    """The loader of a run: its rank, its seed, its ledger."""
    return PlannedLoader(
        config,
        tokenizer=tokenizer,
        spec=spec,
        rank=run.world.rank,
        world_size=run.world.size,
        seed=run.config.seed,
        ledger=run.ledger,
    )


def _one_thread(_: int) -> None:
    # Workers share the cores with the ranks; more threads than cores slow all of them down.
    torch.set_num_threads(1)
