"""Held-out sets during training: loss and accuracy of the references, teacher-forced.

Nothing is decoded, so it runs on the model that trains, under ZeRO-3 too: packs in the order of the
index, as many micro-steps on every rank. A reply whose every token is the most probable one given
the reference before it is the reply that greedy decoding gives, so `exact_match` is that of greedy
decoding without its cost; of a dialogue all replies must be. Decoded scores are `evaluate`'s.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from omni_train.config.errors import ConfigError, DataError, check_at_least
from omni_train.data.config import DataConfig
from omni_train.data.measure import measure
from omni_train.data.source import ShardSet
from omni_train.data.stores import Store
from omni_train.data.tokenizer import tokenizer_hash
from omni_train.data.types import Batch, ModelSpec
from omni_train.data.work import PackMaker, PlannedSample, Work
from omni_train.engine.deepspeed import Engine
from omni_train.engine.distributed import gather_json
from omni_train.engine.fit import Every
from omni_train.engine.run import Run


@dataclass(kw_only=True, slots=True)
class HeldoutConfig:
    """Sets that are scored during training and never trained on.

    Args:
        sets: directory of shards by task; the name is the event's.
        every_steps: global steps between two evaluations.
        max_samples: of each set, from the start of its index.
    """

    sets: dict[str, str] = field(default_factory=dict)
    every_steps: int = 500
    max_samples: int = 256

    def __post_init__(self) -> None:
        remedy = "raise it, or leave heldout.sets out to evaluate nothing"
        check_at_least(self, "heldout", every_steps=1, max_samples=1, remedy=remedy)


def check_heldout(heldout: HeldoutConfig, data: DataConfig) -> None:
    """Refuse a held-out set that is trained on."""
    trained = {source.path.rstrip("/"): name for name, source in data.sources.items()}
    for name, path in heldout.sets.items():
        if path.rstrip("/") in trained:
            raise ConfigError(
                key=f"heldout.sets.{name}",
                value=path,
                rule=f"data.sources.{trained[path.rstrip('/')]} trains on it",
                remedy="give shards that are kept out of the mixture",
            )


@dataclass(slots=True)
class _Sums:
    """What one rank adds up over a set.

    Args:
        loss: summed over tokens.
        tokens, best: supervised tokens, and those that are the most probable ones.
        documents: of each pack, for each dialogue: this rank's supervised tokens, and how many of
            them are not the most probable ones.
        bad: (source, shard, key, reason) of samples that could not be used.
    """

    loss: float = 0.0
    tokens: int = 0
    best: int = 0
    documents: list[list[tuple[int, int]]] = field(default_factory=list)
    bad: list[tuple[str, str, str, str]] = field(default_factory=list)

    def add(self, scored: Tensor, batch: Batch) -> None:
        """Add a pack; `scored` is what `ThinkerForTraining` gives with `score`, [2, N]."""
        logprobs, best = scored.cpu()
        self.bad += batch.bad
        if not batch.num_target_tokens:
            self.documents.append([(0, 0)] * len(batch.document_targets))
            return
        self.loss -= float(logprobs.double().sum())
        self.tokens += batch.num_target_tokens
        self.best += int(best.sum())
        wrong = [int((document == 0).sum()) for document in best.split(batch.document_targets)]
        self.documents.append(list(zip(batch.document_targets, wrong, strict=True)))


class HeldoutEvaluation:
    """Scores all sets; called by `fit`.

    Args:
        config: which sets.
        data: token budget, processing and reading, as in training.
        tokenizer: the run's.
        spec: the model's sizes and ids.
        run: gives rank, ledger and event log.
        make: of a pack's work a batch; as in training where it is left out.

    Raises:
        ConfigError: a set was indexed with another tokenizer, or no sample of it fits a pack.
        DataError: a set cannot be read.
    """

    def __init__(
        self,
        config: HeldoutConfig,
        data: DataConfig,
        tokenizer: PreTrainedTokenizerFast,
        spec: ModelSpec,
        run: Run,
        *,
        make: PackMaker | None = None,
    ) -> None:
        self._run, self._place = run, spec.sequence
        self._make = make or PackMaker(tokenizer, data.processing, spec, Store(data.fetch))
        self._packs: dict[str, list[Work]] = {}
        self._too_long: dict[str, int] = {}
        for name, path in config.sets.items():
            shards = ShardSet(name, path, data.fetch)
            if shards.manifest.tokenizer_hash != tokenizer_hash(tokenizer):
                raise ConfigError(
                    key=f"heldout.sets.{name}",
                    value=path,
                    rule="its index counts tokens with another tokenizer",
                    remedy="index the shards again with the run's: omni-train data index",
                )
            packs, self._too_long[name] = _packs(shards, config.max_samples, data, spec)
            if not packs:
                raise ConfigError(
                    key=f"heldout.sets.{name}",
                    value=path,
                    rule=f"no sample of it fits data.pack_tokens={data.pack_tokens}",
                    remedy="raise the budget, or give another set",
                )
            self._packs[name] = packs

    def __call__(self, engine: Engine, step: int) -> None:
        """Score every set and write a `heldout` event for each; all ranks must call."""
        engine.model.eval()
        for name, packs in self._packs.items():
            started = time.perf_counter()
            sums = _Sums()
            for batch in self._mine(packs):
                with torch.no_grad():
                    sums.add(engine.model(batch.to(self._run.world.device), score=True), batch)
            self._report(name, step, sums, time.perf_counter() - started)

    def _mine(self, packs: list[Work]) -> Iterator[Batch]:
        """This rank's packs, filled up with empty ones so that all ranks have as many."""
        rank = self._run.world.rank // self._place.size
        size = self._run.world.size // self._place.size
        for first in range(0, len(packs), size):
            work = packs[first + rank] if first + rank < len(packs) else []
            yield self._make(work, lambda number: None)

    def _report(self, name: str, step: int, mine: _Sums, seconds: float) -> None:
        ranks = [_Sums(**rank) for rank in gather_json(asdict(mine))]
        bad = [row for rank in ranks for row in rank.bad]
        for row in bad:
            self._run.ledger(source=row[0], shard=row[1], key=row[2], reason=row[3])
        tokens = sum(r.tokens for r in ranks)
        wrong = wrong_tokens([r.documents for r in ranks], group_size=self._place.size)
        if not tokens:
            raise DataError("no_samples", f"no sample of held-out set {name} can be used")
        figures = {
            "loss": sum(r.loss for r in ranks) / tokens,
            "token_accuracy": sum(r.best for r in ranks) / tokens,
            "exact_match": wrong.count(0) / len(wrong),
        }
        self._run.event(
            "heldout",
            task=name,
            step=step,
            **figures,
            num_samples=len(wrong),
            num_tokens=tokens,
            num_bad=len(bad),
            num_too_long=self._too_long[name],
            seconds=round(seconds, 3),
        )
        shown = "  ".join(f"{key} {value:.4f}" for key, value in figures.items())
        self._run.say(f"step {step} held-out {name}: {shown}")


def wrong_tokens(documents: Sequence[list[list[tuple[int, int]]]], *, group_size: int) -> list[int]:
    """Return for each dialogue how many of its tokens are wrong.

    Args:
        documents: of each rank: of each pack, for each dialogue: (supervised tokens, wrong ones).
        group_size: neighbouring ranks that share packs, so that each has a part of a dialogue.
    """
    wrong: list[int] = []
    for first in range(0, len(documents), group_size):
        for pack in zip(*documents[first : first + group_size], strict=True):
            # One rank's numbers after the other's, for each dialogue.
            for parts in zip(*pack, strict=True):
                tokens, count = (sum(part) for part in zip(*parts, strict=True))
                wrong += [count] if tokens else []
    return wrong


def heldout_every(
    config: HeldoutConfig,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    spec: ModelSpec,
    run: Run,
    *,
    make: PackMaker | None = None,
) -> Every:
    """Return the entry of `fit`'s `every`; none where there is no set."""
    if not config.sets:
        return ()
    evaluation = HeldoutEvaluation(config, data, tokenizer, spec, run, make=make)
    return [(config.every_steps, evaluation)]


def _packs(
    shards: ShardSet, max_samples: int, data: DataConfig, spec: ModelSpec
) -> tuple[list[Work], int]:
    """Packs in the order of the index, and how many samples are longer than a pack."""
    packs: list[Work] = []
    room = taken = too_long = 0
    for shard in range(len(shards.counts)):
        rows = shards.rows(shard)[: max_samples - taken]
        taken += len(rows)
        sizes = measure(rows, data.processing, spec).num_tokens.tolist()
        for row, size in zip(rows, sizes, strict=True):
            if size > data.pack_tokens:
                too_long += 1
                continue
            if size > room:
                packs.append([])
                room = data.pack_tokens
            packs[-1].append(PlannedSample(shards.name, shards.path_of(shard), row, None))
            room -= size
    return packs, too_long
