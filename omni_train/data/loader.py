"""The plan, run: global steps of batches for one rank, in an order that any rank can recompute.

The loader's whole state is (epoch, window, step) and a fingerprint: window w of the endless stream
is a pure function of the sources, the settings and w, so resuming plans one window again and reads
nothing else.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerFast

from omni_train.config.errors import ConfigError, DataError
from omni_train.data.config import DataConfig
from omni_train.data.measure import AUDIO_COST_PER_CONV_FRAME, VISION_COST_PER_PATCH, Costs
from omni_train.data.mixture import Mixture, weights_by_window
from omni_train.data.plan import WindowPlan, assign, join_costs, plan_window
from omni_train.data.prefetch import Prefetcher
from omni_train.data.sequence import check_agreement
from omni_train.data.skiplist import read_skip_list
from omni_train.data.source import ShardSource, manifest_bytes
from omni_train.data.stores import Store
from omni_train.data.tokenizer import tokenizer_hash
from omni_train.data.types import Batch, ModelSpec, PackSpec, SampleRef
from omni_train.data.work import PackMaker, PlannedSample, Work, describe, shard_name
from omni_train.data.worker import Make
from omni_train.engine.fingerprint import NOT_IDENTITY, flatten, is_covered, plain
from omni_train.engine.run import Run
from omni_train.engine.types import StepItem

# Packs by which a window takes less than its steps hold, so that it does not need one step more.
_SPARE_SHARE = 0.002
# Settings that do not change what is in which global step.
_NOT_PLAN = (
    *NOT_IDENTITY,
    "data.prefetch_bytes",
    "data.worker_memory_bytes",
    "data.max_bad_share",
    "data.max_bad_in_a_row",
    "data.budget_tokens",
)


# Bytes of a batch beside its patches, mel frames and members: ids, labels, positions, lengths.
BYTES_PER_TOKEN = 64
_BYTES_PER_PATCH = 24
_BYTES_PER_FRAME = 16
_BYTES_PER_PACK = 8192


class PlannedLoader:
    """Delivers global steps for one rank, from any position.

    Args:
        config: sources, budgets, workers.
        tokenizer: the run's tokenizer.
        spec: the model's sizes and ids.
        rank, world_size: this rank among the data-parallel ranks.
        seed: names the order of samples; another seed is another order.
        ledger: called with source, shard, key and reason of every sample that the plan leaves out.
        event: called with a kind and fields: what filters left out, sources that end, the budget.
        resume_allow: fingerprint keys, or their prefixes, that may differ in `load_state`.
        source_type: what a stage reads of the sets, where it is more than dialogues.
        make: makes a micro-batch of a pack's work; a `Batch` of dialogues where it is left out.
        bytes_per_token: of a micro-batch, beside its media.
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
        event: Callable[..., None] | None = None,
        resume_allow: Sequence[str] = (),
        source_type: Callable[..., ShardSource] = ShardSource,
        make: Make | None = None,
        bytes_per_token: int = BYTES_PER_TOKEN,
    ) -> None:
        self.config, self.rank, self.world_size, self.seed = config, rank, world_size, seed
        self._ledger, self._event = ledger, event or (lambda kind, **fields: None)
        self._resume_allow = resume_allow
        self._spec, self._bytes_per_token = spec, bytes_per_token
        self._make: Make = make or PackMaker(
            tokenizer, config.processing, spec, Store(config.fetch), config.worker_memory_bytes
        )
        self.sources = [
            source_type(name, config, spec, tokenizer) for name in sorted(config.sources)
        ]
        for source in self.sources:
            source.check_tokenizer(tokenizer_hash(tokenizer))
            for reason, counted in source.left_out.items():
                self._event("left_out", source=source.name, reason=reason, **asdict(counted))
            if not source.epoch_tokens:
                raise DataError("no_samples", f"source {source.name} has no sample that is used")
        self.fingerprint = plan_fingerprint(config, seed)
        self.mixture, self.steps_per_window = self._layout()
        self._window, self._step = 0, 0
        self._bad: Counter[str] = Counter()
        self._bad_in_a_row = 0

    def _layout(self) -> tuple[Mixture, int]:
        """Tokens of a window such that it is a whole number of full global steps.

        One window is planned to see how full its packs become.
        """
        config = self.config
        names = [source.name for source in self.sources]
        base = {name: source.weight for name, source in config.sources.items()}
        changes = [(entry.from_step, entry.weights) for entry in config.curriculum]
        share = np.array(weights_by_window(names, base, changes, 1)[0][1])
        share = share / share.sum()
        epochs = np.array([source.epoch_tokens for source in self.sources])
        means = np.array([source.mean_tokens for source in self.sources])
        step_tokens = config.global_batch_packs * config.pack_tokens
        num_steps = max(
            1, round(config.window_samples / float((share / means).sum()) / step_tokens)
        )
        limits = [
            None
            if (times := config.sources[source.name].max_epochs) is None
            else times * source.epoch_tokens
            for source in self.sources
        ]

        def mixture(window_tokens: int) -> Mixture:
            weights = weights_by_window(names, base, changes, num_steps)
            return Mixture(limits, weights, window_tokens)

        # A window in which every source repeats itself would only put copies into one pack.
        most = round(float((epochs / np.maximum(share, 1e-9)).max()))
        self.mixture = mixture(min(num_steps * step_tokens, most))
        packs = [pack for step in self._plan(0).steps for pack in step]
        if (
            not packs
            or num_steps * step_tokens >= most
            or num_steps * config.global_batch_packs == 1
        ):
            num_steps = max(1, -(-len(packs) // config.global_batch_packs))
            return mixture(most), num_steps
        full = sum(pack.num_tokens for pack in packs) / len(packs)
        wanted = num_steps * config.global_batch_packs
        spare = min(max(1.0, wanted * _SPARE_SHARE), wanted / 2)
        return mixture(int((wanted - spare) * full)), num_steps

    def state(self) -> dict[str, int | str]:
        """Position of the next global step that has not been delivered, and what it depends on."""
        return {
            "epoch": self._epoch(self._window),
            "window": self._window,
            "step": self._step,
            "fingerprint": json.dumps(self.fingerprint, sort_keys=True),
        }

    def load_state(self, state: dict[str, int | str]) -> None:
        """Continue at a position that `state` returned, at any world size.

        Raises:
            ConfigError: data, mixture or processing are not those of the state, unless allowed.
        """
        before = json.loads(str(state["fingerprint"]))
        changed = {
            key: f"{before.get(key)!r} -> {self.fingerprint.get(key)!r}"
            for key in sorted(before.keys() | self.fingerprint.keys())
            if before.get(key) != self.fingerprint.get(key)
            and not any(is_covered(allowed, key) for allowed in self._resume_allow)
        }
        if changed:
            raise ConfigError(
                key="data",
                value="; ".join(f"{key}: {change}" for key, change in changed.items()),
                rule="the order of samples depends on it, so the run would not continue exactly",
                remedy=f"restore it, or set run.resume_allow={list(changed)[:3]}",
            )
        self._window, self._step = int(state["window"]), int(state["step"])

    def _epoch(self, window: int) -> int:
        spans = self.mixture.spans(window)
        return min(
            start // source.epoch_tokens
            for (start, _), source in zip(spans, self.sources, strict=True)
        )

    def plan(self, window: int) -> list[list[PackSpec]]:
        """Global steps of a window, each a list of packs; the same on every rank."""
        planned = self._plan(window)
        for ref in planned.over_budget if self.rank == 0 else []:
            sample = self._locate(ref)
            reason = f"over_budget: {self.sources[ref.source].limits}"
            if why := self.sources[ref.source].why_whole(ref.shard, ref.row):
                reason = f"{reason}: {why}"
            shard = shard_name(sample.shard)
            self._ledger(source=sample.source, shard=shard, key=sample.row.key, reason=reason)
        return planned.steps

    def _plan(self, window: int) -> WindowPlan:
        refs: list[SampleRef] = []
        measured: list[Costs] = []
        spans = self.mixture.spans(window)
        for number, (source, (start, stop)) in enumerate(zip(self.sources, spans, strict=True)):
            found = source.window(start, stop, seed=(self.seed, number))
            places = (found.shard, found.row, found.visit, found.reference)
            columns = (values.tolist() for values in places)
            refs.extend(map(SampleRef, [number] * len(found.row), *columns))
            measured.append(found.costs)
        return plan_window(
            refs,
            join_costs(measured),
            pack_tokens=self.config.pack_tokens,
            packs_per_step=self.config.global_batch_packs,
            seed=(self.seed, window),
        )

    def _locate(self, ref: SampleRef) -> PlannedSample:
        return self.sources[ref.source].place(ref)

    def planned_steps(self) -> Iterator[tuple[int, int, int, list[PackSpec]]]:
        """(window, step, steps in the window, packs) from the position on, to the stage's end."""
        window, first = self._window, self._step
        idle = 0
        while self.mixture.end_window is None or window < self.mixture.end_window:
            self._report_ended(window)
            tokens = sum(start for start, _ in self.mixture.spans(window))
            steps = self.plan(window)
            idle = 0 if steps else idle + 1
            if idle > 1000:
                limits = self.sources[0].limits
                raise DataError("no_samples", f"no sample of any source fits: each has {limits}")
            for step, packs in enumerate(steps):
                if self.config.budget_tokens is not None and tokens >= self.config.budget_tokens:
                    self._event("budget_reached", window=window, step=step, planned_tokens=tokens)
                    return
                tokens += sum(pack.num_tokens for pack in packs)
                if step >= first:
                    yield window, step, len(steps), packs
            window, first = window + 1, 0
        self._event("sources_ended", window=window)

    def _report_ended(self, window: int) -> None:
        before = self.mixture.ended(window - 1) if window else []
        for number in sorted(set(self.mixture.ended(window)) - set(before)):
            source = self.sources[number]
            times = self.config.sources[source.name].max_epochs
            self._event("source_end", source=source.name, window=window, epochs=times)

    def steps(self) -> Iterator[StepItem]:
        """Global steps from the current position on; `state` moves as they are delivered."""
        pending: list[tuple[StepItem, int, int]] = []

        def work_items() -> Iterator[tuple[Work, int]]:
            """What this rank makes, in order; a step stands in `pending` before its first."""
            for window, step, num_steps, packs in self.planned_steps():
                micro = assign(packs, self.world_size)
                tokens = self.tokens_by_source(packs)
                item = StepItem([], self._epoch(window), window, step, tokens)
                pending.append((item, num_steps, len(micro)))
                for of_ranks in micro:
                    pack = of_ranks[self.rank]
                    work = [self._locate(ref) for ref in pack.samples]
                    yield work, expected_bytes(pack, work, self._spec, self._bytes_per_token)

        with closing(self.batches(work_items())) as batches:
            while (first := next(batches, None)) is not None:
                item, num_steps, num_micro = pending.pop(0)
                item.micro_batches = [first, *(next(batches) for _ in range(num_micro - 1))]
                if self._spec.sequence.size > 1:
                    packs = [batch for batch in item.micro_batches if isinstance(batch, Batch)]
                    check_agreement(packs, self._spec.sequence)
                last = item.step + 1 == num_steps
                self._window, self._step = (
                    (item.window + 1, 0) if last else (item.window, item.step + 1)
                )
                yield item

    def batches(self, items: Iterable[tuple[Work, int]]) -> Generator[Any]:
        """Batches of work items, in their order; made here or by workers, which end with it."""
        config = self.config
        if not config.num_workers:
            for work, _ in items:
                yield self._make(work, lambda number: None)
            return
        with Prefetcher(
            self._make,
            num_workers=config.num_workers,
            max_bytes=config.prefetch_bytes,
            memory_bytes=config.worker_memory_bytes,
            describe=describe,
        ) as prefetcher:
            yield from prefetcher.results(items)

    def tokens_by_source(self, packs: Sequence[PackSpec]) -> dict[str, int]:
        """Planned tokens of a global step by the name of the source."""
        totals: Counter[int] = Counter()
        for pack in packs:
            totals.update(dict(enumerate(pack.source_tokens)))
        return {source.name: totals[number] for number, source in enumerate(self.sources)}

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
    """What identifies the data of a run: a hash of each source's manifest and skip list.

    Raises:
        ConfigError: a source has no manifest.
    """
    hashes = {}
    for name, source in config.sources.items():
        manifest = manifest_bytes(source.path, key=f"data.sources.{name}.path", fetch=config.fetch)
        skip = read_skip_list(source.path)
        listed = json.dumps(skip, sort_keys=True).encode() if skip else b""
        hashes[name] = str(xxhash.xxh3_64_hexdigest(manifest + listed))
    return hashes


def plan_fingerprint(config: DataConfig, seed: int) -> dict[str, Any]:
    """All that the sequence of global steps depends on, by the keys that a run's identity uses."""
    settings = flatten({"data": plain(config)})
    places = {f"data.sources.{name}.path" for name in config.sources}
    kept = {
        key: value
        for key, value in settings.items()
        if key not in places and not any(is_covered(free, key) for free in _NOT_PLAN)
    }
    hashes = {f"data.{name}": value for name, value in source_hashes(config).items()}
    return {**kept, **hashes, "run.seed": seed}


def build_loader(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    spec: ModelSpec,
    run: Run,
    *,
    source_type: Callable[..., ShardSource] = ShardSource,
    make: Make | None = None,
    bytes_per_token: int = BYTES_PER_TOKEN,
) -> PlannedLoader:
    """The loader of a run: its rank, its seed, its ledger; see `PlannedLoader` for the rest."""
    return PlannedLoader(
        config,
        tokenizer=tokenizer,
        spec=spec,
        rank=run.world.rank // spec.sequence.size,
        world_size=run.world.size // spec.sequence.size,
        seed=run.config.seed,
        ledger=run.ledger,
        event=run.event,
        resume_allow=run.config.resume_allow,
        source_type=source_type,
        make=make,
        bytes_per_token=bytes_per_token,
    )


def expected_bytes(
    pack: PackSpec, work: Work, spec: ModelSpec, bytes_per_token: int = BYTES_PER_TOKEN
) -> int:
    """Return about what a pack takes while it is made: its members and the batch, from the index.

    Sound is padded to whole chunks, one for each sound at most.
    """
    places = [place for sample in work for info in sample.row.media for place in info.places()]
    sounds = sum(info.has_audio for sample in work for info in sample.row.media)
    patches = round(pack.vision_cost / VISION_COST_PER_PATCH)
    frames = 2 * round(pack.audio_cost / AUDIO_COST_PER_CONV_FRAME)
    frames += sounds * spec.audio_chunk_frames
    return (
        sum(sample.row.json_size for sample in work)
        + sum(place.size for place in places)
        + patches * (3 * spec.temporal_patch_size * spec.patch_size**2 + _BYTES_PER_PATCH)
        + frames * (4 * spec.num_mel_bins + _BYTES_PER_FRAME)
        + pack.num_tokens * bytes_per_token
        + _BYTES_PER_PACK
    )
