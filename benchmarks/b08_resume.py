"""B8: from nothing to the first batch after a resume at 75 % of 100,000 samples.

Ours opens the set, plans one window again and reads the samples of one batch. What it delivers is
held to the uninterrupted plan first. It has to take less than a second; its line with two workers
has the start of their processes in it.

Peers go on at the same sample of the same tars:

- webdataset, read on from the start, which is what its own way of resuming comes to;
- what transformers' Trainer does by `accelerate.skip_first_batches`, with the same stream;
- the Trainer's best: a dataset of known length in memory, of which only sample numbers are skipped.
  It is no stream and reads no shard; shown without a goal.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from accelerate import skip_first_batches
from torch.utils.data import DataLoader

from benchmarks import loads
from benchmarks.report import compare, limit, parser, show
from benchmarks.shards import write_copies
from omni_train.data.config import DataConfig, SourceConfig
from omni_train.data.loader import PlannedLoader
from omni_train.data.tokenizer import special_tokens, train_tokenizer
from omni_train.engine.types import StepItem

SHARDS, PER_SHARD = 100, 1000
SKIPPED = 75_000
BATCH = 8
MOST_MS = 1000.0
LEAST_RATIO = 50.0
WHY = (
    "Ours is the same at any step, half of it opening the indices of the shards; the peer's grows "
    "with the step, and its samples are a few words here, quickly skipped"
)
WHY_WORKERS = (
    "Nearly all of it is one process that imports torch and transformers, which a rank starts once "
    "(NOTES.md, Resuming)"
)
TOKENIZER = train_tokenizer(["which word was said and what is on the picture"], vocab_size=330)
SPEC = replace(loads.SPEC, tokens=special_tokens(TOKENIZER))


def make_loader(
    root: Path, *, rank: int = 0, world_size: int = 1, num_workers: int = 0
) -> PlannedLoader:
    """Return a rank's loader at the start of the set."""
    config = DataConfig(
        sources={"text": SourceConfig(path=str(root))},
        pack_tokens=2048,
        global_batch_packs=8,
        num_workers=num_workers,
    )
    return PlannedLoader(
        config,
        tokenizer=TOKENIZER,
        spec=SPEC,
        rank=rank,
        world_size=world_size,
        seed=0,
        ledger=lambda **row: None,
    )


def place_of(root: Path, share: float) -> tuple[dict[str, Any], list[str]]:
    """Return the state after so much of an epoch, and the keys of the global step that follows."""
    whole = make_loader(root)
    done, total = 0, whole.sources[0].epoch_tokens
    for window, step, _, packs in whole.planned_steps():
        if done >= share * total:
            refs = [ref for pack in packs for ref in pack.samples]
            keys = sorted(whole.sources[0].row(ref.shard, ref.row).key for ref in refs)
            return {**whole.state(), "window": window, "step": step}, keys
        done += sum(pack.num_tokens for pack in packs)
    raise AssertionError("an epoch ends before its own end")


def first_step(root: Path, state: dict[str, Any], *, num_workers: int = 0) -> StepItem:
    """Return the first global step after a resume, from nothing."""
    loader = make_loader(root, num_workers=num_workers)
    loader.load_state(json.loads(json.dumps(state)))
    steps = loader.steps()
    found = next(iter(steps))
    assert isinstance(steps, Iterator)
    return found


def keys_of(item: StepItem) -> list[str]:
    """Return the sorted keys of a global step."""
    return sorted(key for batch in item.micro_batches for key in batch.keys)


def stream(shards: list[str]) -> wds.WebDataset:
    """Return the samples of the tars, one after the other."""
    return wds.WebDataset(shards, shardshuffle=False)


class Stored(torch.utils.data.Dataset[dict[str, Any]]):
    """All samples in memory; every tar holds the same."""

    def __init__(self, shards: list[str]) -> None:
        self.samples = list(stream(shards[:1])) * len(shards)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.samples[number]


def peers(shards: list[str]) -> dict[str, tuple[Callable[[], dict[str, Any]], float]]:
    """Return what gives each peer's next sample, and the goal."""
    stored = Stored(shards)

    def webdataset() -> dict[str, Any]:
        return next(islice(iter(stream(shards)), SKIPPED, None))

    def skipped(dataset: Any) -> dict[str, Any]:
        loader = DataLoader(dataset, batch_size=BATCH, collate_fn=list)
        found: dict[str, Any] = next(iter(skip_first_batches(loader, SKIPPED // BATCH)))[0]
        return found

    return {
        "webdataset": (webdataset, LEAST_RATIO),
        "Trainer's skip, a stream": (lambda: skipped(stream(shards)), LEAST_RATIO),
        "Trainer's skip, known length": (lambda: skipped(stored), 0.0),
    }


def main() -> int:
    """Run the table."""
    args = parser("The first batch after a resume at 75 % of 100,000 samples.").parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = write_copies(Path(folder), TOKENIZER, num_shards=SHARDS, samples_per_shard=PER_SHARD)
        shards = [str(path) for path in sorted(root.glob("*.tar"))]
        state, wanted = place_of(root, SKIPPED / (SHARDS * PER_SHARD))
        for workers in (0, 2):
            found = keys_of(first_step(root, state, num_workers=workers))
            assert found == wanted, f"another batch after the resume, with {workers} workers"
        rows = []
        for name, (run, goal) in peers(shards).items():

            def checked(run: Callable[[], dict[str, Any]] = run, name: str = name) -> None:
                # Every tar has the keys of the first one.
                assert run()["__key__"] == f"s{SKIPPED % PER_SHARD:04d}", name

            rows.append(
                compare(
                    name,
                    lambda: first_step(root, state),
                    checked,
                    goal=goal,
                    pairs=args.pairs,
                    why=WHY,
                )
            )
        rows += [
            limit(
                f"at most {MOST_MS:.0f} ms, {workers} workers",
                lambda workers=workers: first_step(root, state, num_workers=workers),
                most_ms=MOST_MS,
                times=args.pairs,
                why=WHY_WORKERS if workers else "",
            )
            for workers in (0, 2)
        ]
    return show(rows, ("webdataset", "accelerate", "torch"), [], as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
