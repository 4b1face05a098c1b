"""The plan: nothing lost, nothing twice, packs within the budget, any slice at once."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_train.data.measure import Costs
from omni_train.data.plan import (
    GIANT_SHARE,
    assign,
    lockstep_cost,
    pack_level,
    plan_window,
    token_slice,
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


def lengths(counts: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 4, n) + (n > 0) for n in counts]


def stream(
    shards: list[np.ndarray], start: int, stop: int, *, seed: tuple[int, ...], group: int
) -> list[tuple[int, int]]:
    totals = [int(tokens.sum()) for tokens in shards]
    shard, row = token_slice(
        totals, start, stop, seed=seed, shuffle_shards=group, tokens_of=shards.__getitem__
    )
    return list(zip(shard.tolist(), row.tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    seed=st.integers(0, 5),
    group=st.integers(1, 4),
)
def test_an_epoch_visits_every_used_sample_once(counts: list[int], seed: int, group: int) -> None:
    shards = lengths(counts, seed)
    shards[0][1:] = 0  # left out
    total = sum(int(tokens.sum()) for tokens in shards)
    epoch = stream(shards, total, 2 * total, seed=(seed,), group=group)
    used = [(s, r) for s, tokens in enumerate(shards) for r, n in enumerate(tokens) if n]
    assert sorted(epoch) == used


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 400), min_size=2, max_size=6))
def test_any_slice_equals_the_stream(cuts: list[int]) -> None:
    shards = lengths([7, 11, 3, 20])
    whole: list[tuple[int, int]] = []
    bounds = [0, *sorted(cuts), 400]
    for start, stop in itertools.pairwise(bounds):
        whole += stream(shards, start, stop, seed=(1, 2), group=2)
    assert whole == stream(shards, 0, 400, seed=(1, 2), group=2)


def test_an_estimated_shard_is_stretched_not_cut() -> None:
    shards = lengths([50, 50, 50])
    totals = [int(tokens.sum()) for tokens in shards]
    totals[1] = totals[1] * 3 // 2
    found: list[tuple[int, int]] = []
    for start in range(0, sum(totals), 40):
        stop = min(start + 40, sum(totals))
        shard, row = token_slice(
            totals, start, stop, seed=(0,), shuffle_shards=1, tokens_of=shards.__getitem__
        )
        found += list(zip(shard.tolist(), row.tolist(), strict=True))
    assert sorted(found) == [(s, r) for s in range(3) for r in range(50)]


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(1, 100), min_size=1, max_size=200), kinds=st.integers(0, 3))
def test_packs_hold_every_sample_within_the_budget(tokens: list[int], kinds: int) -> None:
    length = np.array(tokens)
    kind = np.arange(len(tokens)) % (kinds + 1)
    costs = Costs(length, np.where(kind == 1, length, 0.0), np.where(kind == 2, 2.0, 0.0), length)
    pack = pack_level(costs, 100)
    assert pack.min() >= 0
    assert np.bincount(pack, length).max() <= 100
    giants = np.flatnonzero(length >= GIANT_SHARE * 100)
    assert all((pack == pack[giant]).sum() == 1 for giant in giants)


@settings(max_examples=60, deadline=None)
@given(
    large=st.lists(st.integers(501, 1200), min_size=1, max_size=20),
    small=st.lists(st.integers(1, 200), max_size=60),
    kinds=st.integers(1, 3),
)
def test_no_rank_waits_for_company_of_a_giant(
    large: list[int], small: list[int], kinds: int
) -> None:
    """Giants of every kind: alone, or with what fits beside them; what fits nowhere is reported."""
    length = np.array(large + small)
    kind = np.arange(len(length)) % (kinds + 1)
    costs = Costs(
        num_tokens=length,
        vision_cost=np.where(kind == 1, length * 0.4, 0.0),
        audio_cost=np.where(kind == 2, length * 0.2, 0.0),
        llm_cost=length * (1 + length / 1000.0),
    )
    refs = [SampleRef(0, 0, n) for n in range(len(length))]
    plan = plan_window(refs, costs, pack_tokens=1000, packs_per_step=4, seed=(0,))
    assert [ref.row for ref in plan.over_budget] == np.flatnonzero(length > 1000).tolist()
    packs = [pack for step in plan.steps for pack in step]
    placed = sorted(ref.row for pack in packs for ref in pack.samples)
    assert placed == np.flatnonzero(length <= 1000).tolist()
    for pack in packs:
        assert pack.num_tokens <= 1000
        longest = max(int(length[ref.row]) for ref in pack.samples)
        assert len(pack.samples) == 1 or longest < GIANT_SHARE * 1000


def test_packs_are_full_where_no_small_sample_fills_the_gaps() -> None:
    """Halves: a second sample fits to the token, or not at all."""
    length = np.full(200, 4096)
    pack = pack_level(Costs(length, length * 0.0, length * 0.0, length * 1.0), 8192)
    assert pack.max() + 1 <= 103


def test_window_plan_is_complete_and_full() -> None:
    refs, costs = random_window(4000, 0)
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


def test_assignment_keeps_alike_packs_together() -> None:
    """4 packs with vision and 4 with sound on 4 ranks: each kind has its own micro-step."""
    packs = [PackSpec(num_tokens=10, vision_cost=9.0, llm_cost=10.0) for _ in range(4)]
    packs += [PackSpec(num_tokens=10, audio_cost=9.0, llm_cost=10.0) for _ in range(4)]
    mixed = [packs[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)]
    micro = assign(mixed, 4)
    assert lockstep_cost(micro) == 2 * (9.0 + 10.0)


def test_tokens_of_a_step_are_counted_by_source() -> None:
    refs, costs = random_window(300, 4)
    refs = [SampleRef(n % 3, 0, n) for n in range(300)]
    plan = plan_window(refs, costs, pack_tokens=4096, packs_per_step=4, seed=(0,))
    for pack in (pack for step in plan.steps for pack in step):
        wanted = [0, 0, 0]
        for ref in pack.samples:
            wanted[ref.source] += int(costs.num_tokens[ref.row])
        assert list(pack.source_tokens) == wanted
