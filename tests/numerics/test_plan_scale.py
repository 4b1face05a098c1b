"""The plan at scale: full packs, level ranks, its speed, and resuming without reading it all.

The workload is a mixture in the shipped ratio: 53 % of the tokens pictures and clips, 20 % sound,
7 % clips with sound, 20 % text. Lengths are log-normal: pictures of 16 to 4,096 tokens (median
700), clips of 128 tokens to half a pack (2,000), sound of 0.5 to 30 s (9 s), clips with sound of 2
to 28 s (12 s), text of 16 tokens to a whole pack (500), each medium with 8 to 1,000 tokens of text
(60). At 32,768 tokens clips and text are three times, sound and clips with sound up to four times
as long.

Lower bound of a global step's lockstep cost on N ranks, for vision, sound and LLM apart:

    max(sum over the packs / N, what the costliest single sample of the step costs)

added up. No assignment can be below it: the N ranks share the sum, and one rank has that sample.

Random assignment deals every sample of the step to a random rank and micro-step, as many of these
as the plan uses, so that nothing but chance levels anything.
"""

from __future__ import annotations

import json
import shutil
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipelines.shards import Sample, write_shards
from omni_train.data.config import DataConfig, SourceConfig
from omni_train.data.index import (
    Manifest,
    ShardInfo,
    hash_file,
    read_index,
    write_index,
    write_manifest,
)
from omni_train.data.loader import PlannedLoader
from omni_train.data.measure import (
    AUDIO_COST_PER_CONV_FRAME,
    TOKENS_WHERE_ATTENTION_EQUALS_MATMUL,
    VISION_COST_PER_PATCH,
    Costs,
)
from omni_train.data.plan import assign, lockstep_cost, plan_window
from omni_train.data.tokenizer import tokenizer_hash
from omni_train.data.types import PackSpec, SampleRef
from tests.unit.data.samples import SPEC, TOKENIZER

PACKS_PER_STEP = 256
STEPS = 8
SHARES = {"image": 0.40, "video": 0.133, "audio": 0.20, "audio_video": 0.067, "text": 0.20}
PARTS = ("vision_cost", "audio_cost", "llm_cost")


def workload(pack_tokens: int, seed: int) -> tuple[list[SampleRef], Costs]:
    """Samples of `STEPS` global steps, see the docstring of this file."""
    rng = np.random.default_rng(seed)
    longer = pack_tokens // 8192

    def draw(median: float, sigma: float, low: float, high: float) -> NDArray[np.float64]:
        return np.clip(rng.lognormal(np.log(median), sigma, 60_000), low, high)

    few = min(longer, 3)
    seconds = draw(12 * few, 0.6, 2, 28 * longer)
    patches = {
        "image": 4 * draw(700, 0.8, 16, 4096),
        "video": 4 * draw(2000 * few, 0.7, 128, pack_tokens / 2),
        "audio_video": 4 * 120 * seconds,
    }
    sound = {"audio": draw(220 * longer, 0.7, 12, 750 * longer), "audio_video": 25 * seconds}
    columns: list[NDArray[np.float64]] = []
    for kind, share in SHARES.items():
        vision, audio = patches.get(kind, 0.0), sound.get(kind, 0.0)
        text = draw(500 * few, 1.1, 16, pack_tokens) if kind == "text" else draw(60, 0.8, 8, 1000)
        tokens = np.rint(vision / 4 + audio + text)
        table = np.stack([tokens, tokens * 0 + vision, tokens * 0 + audio])[
            :, tokens <= pack_tokens
        ]
        wanted = share * PACKS_PER_STEP * STEPS * pack_tokens * 0.985
        columns.append(table[:, : int(np.searchsorted(np.cumsum(table[0]), wanted))])
    tokens, vision, audio = rng.permutation(np.concatenate(columns, axis=1), axis=1)
    costs = Costs(
        num_tokens=tokens.astype(np.int64),
        vision_cost=vision * VISION_COST_PER_PATCH,
        audio_cost=audio * 2 * AUDIO_COST_PER_CONV_FRAME,
        llm_cost=tokens * (1 + tokens / TOKENS_WHERE_ATTENTION_EQUALS_MATMUL),
    )
    return [SampleRef(0, 0, i) for i in range(len(tokens))], costs


def rows_of_step(packs: list[PackSpec]) -> NDArray[np.int64]:
    return np.array([ref.row for pack in packs for ref in pack.samples])


def lower_bound(packs: list[PackSpec], costs: Costs, num_ranks: int) -> float:
    rows = rows_of_step(packs)
    values = [getattr(costs, part)[rows] for part in PARTS]
    return float(sum(max(v.sum() / num_ranks, v.max()) for v in values))


def random_cost(
    packs: list[PackSpec], costs: Costs, num_ranks: int, rng: np.random.Generator
) -> float:
    rows = rows_of_step(packs)
    slots = -(-len(packs) // num_ranks) * num_ranks
    slot = rng.integers(0, slots, len(rows))
    loads = [np.bincount(slot, getattr(costs, part)[rows], slots) for part in PARTS]
    return float(sum(load.reshape(-1, num_ranks).max(axis=1).sum() for load in loads))


@pytest.mark.parametrize("pack_tokens", [8192, 32768])
def test_packs_are_full(pack_tokens: int) -> None:
    for seed in range(2):
        refs, costs = workload(pack_tokens, seed)
        plan = plan_window(
            refs, costs, pack_tokens=pack_tokens, packs_per_step=PACKS_PER_STEP, seed=(0, seed)
        )
        packs = [pack for step in plan.steps for pack in step]
        assert sum(len(pack.samples) for pack in packs) == len(refs)
        assert max(pack.num_tokens for pack in packs) <= pack_tokens
        assert sum(pack.num_tokens for pack in packs) / (pack_tokens * len(packs)) >= 0.985


@pytest.mark.parametrize("num_ranks", [8, 64, 256])
def test_lockstep_cost_is_near_its_bound_and_far_below_random(num_ranks: int) -> None:
    refs, costs = workload(8192, 0)
    plan = plan_window(refs, costs, pack_tokens=8192, packs_per_step=PACKS_PER_STEP, seed=(0, 0))
    rng = np.random.default_rng(1)
    ours = [lockstep_cost(assign(step, num_ranks)) for step in plan.steps]
    bounds = [lower_bound(step, costs, num_ranks) for step in plan.steps]
    plain = [random_cost(step, costs, num_ranks, rng) for step in plan.steps]
    assert all(cost >= bound * (1 - 1e-9) for cost, bound in zip(ours, bounds, strict=True))
    assert sum(ours) <= 1.05 * sum(bounds)
    assert sum(ours) <= 0.75 * sum(plain)


def test_planning_a_global_step_takes_under_5_ms() -> None:
    """256 packs of 8,192 tokens, about 2,600 samples; CPU time, as others use the machine too."""
    refs, costs = workload(8192, 0)
    taken = []
    for _ in range(3):
        start = time.process_time()
        plan = plan_window(
            refs, costs, pack_tokens=8192, packs_per_step=PACKS_PER_STEP, seed=(0, 0)
        )
        for step in plan.steps:
            for num_ranks in (64, 256):
                assign(step, num_ranks)
        taken.append((time.process_time() - start) / len(plan.steps))
    assert min(taken) < 0.005


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100,000 samples in 100 shards: one real tar, copied, each copy with keys of its own."""
    root = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)

    def samples() -> list[Sample]:
        found = []
        for number in range(1000):
            words = " ".join(["word"] * int(np.clip(rng.lognormal(2.5, 0.8), 1, 100)))
            messages = [
                {"role": "user", "content": "which word"},
                {"role": "assistant", "content": words},
            ]
            found.append(Sample(f"s{number:04d}", {"messages": messages}))
        return found

    first = write_shards(samples(), root / "one", tokenizer=TOKENIZER, samples_per_shard=1000)
    shard = first.shards[0]
    rows = read_index(root / "one" / "shard-000000.parquet")
    infos = []
    (root / "set").mkdir()
    for number in range(100):
        name = f"shard-{number:06d}"
        shutil.copyfile(root / "one" / shard.name, root / "set" / f"{name}.tar")
        for count, row in enumerate(rows):
            row.key = f"s{number:03d}-{count:04d}"
        path = root / "set" / f"{name}.parquet"
        write_index(path, rows)
        infos.append(
            ShardInfo(
                name=f"{name}.tar",
                num_samples=1000,
                bytes=shard.bytes,
                xxh3=shard.xxh3,
                index_xxh3=hash_file(path),
            )
        )
    manifest = Manifest(tokenizer_hash=tokenizer_hash(TOKENIZER), shards=tuple(infos))
    write_manifest(root / "set", manifest)
    return root / "set"


def make_loader(
    root: Path, *, rank: int = 0, world_size: int = 1, num_workers: int = 0
) -> PlannedLoader:
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


def test_resume_at_75_percent_is_immediate_and_identical(large: Path) -> None:
    whole = make_loader(large)
    # The uninterrupted run, planned but not fetched, up to three quarters of the epoch.
    target = 0.75 * whole.sources[0].epoch_tokens
    done, place = 0, (0, 0)
    for window, step, num_steps, packs in whole.planned_steps():
        done += sum(pack.num_tokens for pack in packs)
        if done >= target:
            place = (window + 1, 0) if step + 1 == num_steps else (window, step + 1)
            break
    assert place[0] > 2
    state = {**whole.state(), "window": place[0], "step": place[1]}
    window, step, _, packs = next(s for s in whole.planned_steps() if s[:2] == place)
    wanted = sorted(whole.sources[0].row(r.shard, r.row).key for p in packs for r in p.samples)

    start = time.process_time()
    resumed = make_loader(large)
    resumed.load_state(json.loads(json.dumps(state)))
    item = next(iter(resumed.steps()))
    taken = time.process_time() - start
    assert (item.window, item.step) == (window, step)
    assert sorted(key for batch in item.micro_batches for key in batch.keys) == wanted
    assert taken < 1.0


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 1), (2, 0), (4, 3), (8, 0)])
def test_the_key_sequence_does_not_depend_on_ranks_and_workers(
    large: Path, world_size: int, num_workers: int
) -> None:
    def keys(loader: PlannedLoader) -> list[list[str]]:
        steps = loader.steps()
        return [[k for b in next(steps).micro_batches for k in b.keys] for _ in range(3)]

    # More ranks than two are asked for their first and last only to start fewer processes.
    wanted = [sorted(step) for step in keys(make_loader(large))]
    workers = [num_workers if rank == 0 else 0 for rank in range(world_size)]
    of_ranks = [
        keys(make_loader(large, rank=rank, world_size=world_size, num_workers=workers[rank]))
        for rank in range(world_size)
    ]
    got = [sorted(key for rank in step for key in rank) for step in zip(*of_ranks, strict=True)]
    assert got == wanted


def test_memory_is_bounded_by_the_window(large: Path) -> None:
    loader = make_loader(large)
    tracemalloc.start()
    for window in (1, 2, 3):
        loader.plan(window)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 4,096 samples of a window and 16,000 that are shuffled together; not 100,000.
    assert peak < 4e6
    assert loader.sources[0].costs.cache_info().currsize <= 2 * loader.config.shuffle_shards
