"""The states of a frozen Thinker, made before training: one pass over every dialogue, on all ranks.

The Thinker is a plain replica, not sharded, and gone from memory before the Talker is built. A pass
that was interrupted goes on with what is missing. Not done here: files (talker_states.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch
import xxhash
from transformers import PreTrainedTokenizerFast

from omni_train.data.loader import BYTES_PER_TOKEN, PlannedLoader
from omni_train.data.source import ShardSource
from omni_train.data.speech import state_name
from omni_train.data.speech_config import SpeechDataConfig
from omni_train.data.speech_loader import build_speech_loader
from omni_train.data.tokenizer import tokenizer_hash
from omni_train.data.types import SampleRef
from omni_train.data.work import Work
from omni_train.engine.deepspeed import DTYPES, DeepSpeedConfig
from omni_train.engine.distributed import sum_over_ranks
from omni_train.engine.fingerprint import flatten, plain
from omni_train.engine.run import Run
from omni_train.models.config import ModelConfig
from omni_train.models.presets import resolve_speech_config
from omni_train.models.talker import thinker_states
from omni_train.models.talker_build import build_thinker_replica
from omni_train.models.talker_spec import talker_spec
from omni_train.models.talker_states import StateStore, thinker_hash
from omni_train.models.thinker import ThinkerForTraining


def keep_states(
    data: SpeechDataConfig,
    model_config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    deepspeed: DeepSpeedConfig,
    folder: str | Path,
    run: Run,
) -> StateStore:
    """Run the Thinker over every dialogue of the sources whose states are not kept yet.

    Ranks share the work, and all wait for the last one. A sample that cannot be used is passed
    over here and recorded where it is trained on.

    Args:
        data: of the stage.
        model_config: of the model.
        tokenizer: the run's.
        deepspeed: for its precision.
        folder: where the states are kept; all ranks must see it.
        run: the ranks, and events.
    """
    model = build_thinker_replica(model_config, tokenizer, deepspeed, run.world.device)
    config = resolve_speech_config(model_config, tokenizer)
    # What else the states depend on: how media and text become tokens.
    processing = repr((flatten(plain(data.processing)), tokenizer_hash(tokenizer)))
    store = StateStore(
        folder,
        thinker=xxhash.xxh3_128_hexdigest(f"{thinker_hash(model)} {processing}".encode()),
        width=config.talker_config.embedding_size,
        dtype=DTYPES[deepspeed.precision],
    )
    spec = talker_spec(config, model_config, tokenizer)
    loader = build_speech_loader(data, tokenizer, model.spec, spec, run)
    made = sum_over_ranks([_fill(store, loader, model, run)])[0]
    run.event("states", made=made, folder=str(folder))
    return store


def _fill(store: StateStore, loader: PlannedLoader, model: ThinkerForTraining, run: Run) -> int:
    """Make what is missing of this rank's share; return of how many samples."""
    under_way: list[Work] = []
    made = 0

    def items() -> Iterator[tuple[Work, int]]:
        for number, work in enumerate(_packs(loader.sources, loader.config.pack_tokens)):
            if number % run.world.size != run.world.rank:
                continue
            missing = [sample for sample in work if not store.has(state_name(sample))]
            if missing:
                under_way.append(missing)
                yield missing, loader.config.pack_tokens * BYTES_PER_TOKEN

    with closing(loader.batches(items())) as batches:
        for batch in batches:
            names = {sample.key: state_name(sample) for sample in under_way.pop(0)}
            with torch.no_grad():
                states = thinker_states(model, batch.thinker.to(run.world.device))
            # Where no sample could be used there is one token, and no key.
            parts = states.split(batch.thinker.segments.lengths)
            for key, part in zip(batch.keys, parts, strict=bool(batch.keys)):
                store.put(names[key], part)
            made += len(batch.keys)
    return made


def _packs(sources: Sequence[ShardSource], budget: int) -> Iterator[Work]:
    """Samples that share a pack, in the order of their shards; each once, shards apart."""
    for number, source in enumerate(sources):
        for shard in range(len(source.counts)):
            work: Work = []
            filled = 0
            for row, size in source.used(shard):
                if filled + size > budget:
                    yield work
                    work, filled = [], 0
                work.append(source.place(SampleRef(number, shard, row)))
                filled += size
            if work:
                yield work
