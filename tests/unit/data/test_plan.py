"""The plan: nothing lost, nothing twice, full packs, level ranks, any slice at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_train.data.measure import Costs
from omni_train.data.plan import (
    assign,
    lockstep_cost,
    pack_best_fit,
    plan_window,
    shuffled_slice,
)
from omni_train.data.types import PackSpec, SampleRef


def random_window(n: int, seed: int, *, longest: int = 900) -> tuple[list[SampleRef], Costs]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, longest, n)
    kind = rng.integers(0, 3, n)
    costs = Costs(
        num_tokens=tokens.astype(np.int64),
        vision_cost=np.where(kind == 1, tokens * 4.0, 0.0),
        audio_cost=np.where(kind == 2, tokens * 2.0, 0.0),
        llm_cost=tokens * 1.0,
    )
    return [SampleRef(0, i // 100, i % 100) for i in range(n)], costs


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    seed=st.integers(0, 5),
    group=st.integers(1, 4),
)
def test_an_epoch_visits_every_sample_once(counts: list[int], seed: int, group: int) -> None:
    total = sum(counts)
    epoch = shuffled_slice(counts, total, 2 * total, seed=(seed,), shuffle_shards=group)
    everything = [(s, r) for s, n in enumerate(counts) for r in range(n)]
    assert sorted(epoch) == everything


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 200), min_size=2, max_size=6))
def test_any_slice_equals_the_stream(cuts: list[int]) -> None:
    counts = [7, 11, 3, 20]
    stream = shuffled_slice(counts, 0, 205, seed=(1, 2), shuffle_shards=2)
    for start, stop in zip(sorted(cuts), sorted(cuts)[1:], strict=False):
        part = shuffled_slice(counts, start, stop, seed=(1, 2), shuffle_shards=2)
        assert part == stream[start:stop]


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(1, 100), min_size=1, max_size=200))
def test_packs_hold_every_sample_within_the_budget(tokens: list[int]) -> None:
    packs = pack_best_fit(np.array(tokens), 100)
    assert sorted(i for pack in packs for i in pack) == list(range(len(tokens)))
    assert all(sum(tokens[i] for i in pack) <= 100 for pack in packs)


def test_window_plan_is_complete_and_full() -> None:
    refs, costs = random_window(2000, 0)
    costs.num_tokens[3] = 9000
    plan = plan_window(refs, costs, pack_tokens=8192, packs_per_step=16, seed=(0, 0))
    placed = [ref for step in plan.steps for pack in step for ref in pack.samples]
    assert plan.over_budget == [refs[3]]
    assert sorted(placed, key=lambda r: (r.shard, r.row)) == refs[:3] + refs[4:]
    packs = [pack for step in plan.steps for pack in step]
    assert sum(p.num_tokens for p in packs) / (8192 * len(packs)) >= 0.985
    sizes = [len(step) for step in plan.steps]
    assert max(sizes) <= 16
    assert max(sizes) - min(sizes) <= 1


def test_what_is_in_a_step_does_not_depend_on_the_world_size() -> None:
    refs, costs = random_window(500, 1)
    plan = plan_window(refs, costs, pack_tokens=2048, packs_per_step=8, seed=(0, 0))
    for step in plan.steps:
        for world in (1, 2, 3, 8):
            micro = assign(step, world)
            assert all(len(packs) == world for packs in micro)
            dealt = [pack for packs in micro for pack in packs if pack.samples]
            assert sorted(dealt, key=id) == sorted(step, key=id)


@pytest.mark.parametrize("ranks", [8, 64])
def test_levelling_beats_random_assignment(ranks: int) -> None:
    refs, costs = random_window(ranks * 60, 2)
    plan = plan_window(refs, costs, pack_tokens=4096, packs_per_step=ranks * 4, seed=(0, 0))
    ours, plain = 0.0, 0.0
    for step in plan.steps:
        ours += lockstep_cost(assign(step, ranks))
        padded = [*step, *[PackSpec()] * (-len(step) % ranks)]
        plain += lockstep_cost([padded[i : i + ranks] for i in range(0, len(padded), ranks)])
    assert ours < plain
