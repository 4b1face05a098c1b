"""Shares of tokens: exact over many steps, with repeat limits, a curriculum and a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_train.config.errors import ConfigError
from omni_train.config.keys import dotted_keys
from omni_train.config.safe_yaml import load_yaml
from omni_train.data.config import CurriculumStep, DataConfig, SourceConfig
from omni_train.data.filters import FilterConfig
from omni_train.data.index import Manifest, ShardInfo, hash_file, write_index, write_manifest
from omni_train.data.loader import PlannedLoader
from omni_train.data.mixture import Mixture, weights_by_window
from omni_train.data.skiplist import write_skip_list
from omni_train.data.tokenizer import tokenizer_hash
from omni_train.data.types import IndexRow, MediaInfo, MediaKind
from tests.unit.data.samples import SPEC, TOKENIZER

CONF = Path(__file__).parents[3] / "conf"
BASE = {"weight": 1.0}


def write_set(
    root: Path, *, shards: int, samples: int, median: int, seconds: float = 0.0, seed: int = 0
) -> None:
    """An index without shards: lengths of a log-normal, sound of about `seconds` if given."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    infos = []
    for number in range(shards):
        # Shards differ: what one holds does not stand for the others.
        tokens = np.clip(rng.lognormal(np.log(median * (1 + number % 3)), 0.8, samples), 4, 800)
        rows = []
        for i, length in enumerate(tokens.astype(int).tolist()):
            media = []
            if seconds:
                size = int(rng.uniform(0.5, 1.5) * seconds * 16_000)
                media = [
                    MediaInfo(
                        MediaKind.audio,
                        "0.wav",
                        has_audio=True,
                        num_audio_samples=size,
                        sample_rate_hz=16_000,
                        duration_us=size * 1_000_000 // 16_000,
                    )
                ]
            rows.append(IndexRow(f"k{number}-{i}", 0, 0, "", media, length, 1))
        name = f"shard-{number:06d}"
        write_index(root / f"{name}.parquet", rows)
        info = hash_file(root / f"{name}.parquet")
        infos.append(
            ShardInfo(name=f"{name}.tar", num_samples=samples, bytes=0, xxh3="", index_xxh3=info)
        )
    write_manifest(root, Manifest(tokenizer_hash=tokenizer_hash(TOKENIZER), shards=tuple(infos)))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    write_set(root / "text", shards=6, samples=300, median=150)
    write_set(root / "speech", shards=4, samples=200, median=20, seconds=4.0, seed=1)
    write_set(root / "rare", shards=1, samples=60, median=60, seed=2)
    return root


def make_loader(sets: Path, events: list[dict[str, Any]], **settings: Any) -> PlannedLoader:
    sources = settings.pop("sources")
    config = DataConfig(
        sources={n: SourceConfig(path=str(sets / n), **values) for n, values in sources.items()},
        **{"pack_tokens": 1024, "global_batch_packs": 4, "window_samples": 512, **settings},
    )

    def event(kind: str, **fields: Any) -> None:
        events.append({"kind": kind, **fields})

    return PlannedLoader(
        config,
        tokenizer=TOKENIZER,
        spec=SPEC,
        rank=0,
        world_size=1,
        seed=0,
        ledger=lambda **row: None,
        event=event,
    )


def tokens_of_steps(loader: PlannedLoader, steps: int) -> list[dict[str, int]]:
    found = []
    for _, _, _, packs in loader.planned_steps():
        found.append(loader.tokens_by_source(packs))
        if len(found) == steps:
            break
    return found


def shares(steps: list[dict[str, int]]) -> dict[str, float]:
    total = sum(sum(step.values()) for step in steps)
    return {name: sum(step[name] for step in steps) / total for name in steps[0]}


def test_tokens_match_the_weights_within_one_percent_over_1000_steps(sets: Path) -> None:
    weights = {"text": 0.7, "speech": 0.25, "rare": 0.05}
    sources = {name: {"weight": weight} for name, weight in weights.items()}
    found = shares(tokens_of_steps(make_loader(sets, [], sources=sources), 1000))
    for name, weight in weights.items():
        assert found[name] == pytest.approx(weight, rel=0.01), name


def test_a_source_ends_after_its_epochs_and_the_others_take_over(sets: Path) -> None:
    events: list[dict[str, Any]] = []
    sources = {"text": {"weight": 0.5}, "rare": {"weight": 0.5, "max_epochs": 2}}
    loader = make_loader(sets, events, sources=sources)
    seen: dict[tuple[int, int, int], int] = {}
    steps = []
    for _, _, _, packs in loader.planned_steps():
        steps.append(loader.tokens_by_source(packs))
        for ref in (ref for pack in packs for ref in pack.samples):
            seen[ref] = seen.get(ref, 0) + 1
        if len(steps) == 60:
            break
    rare = [count for ref, count in seen.items() if loader.sources[ref.source].name == "rare"]
    assert rare == [2] * 60
    assert shares(steps[-10:]) == {"rare": 0.0, "text": 1.0}
    ended = [event for event in events if event["kind"] == "source_end"]
    assert [(event["source"], event["epochs"]) for event in ended] == [("rare", 2)]
    # The others fill the windows: steps keep their size.
    assert np.mean([sum(step.values()) for step in steps]) > 0.93 * 4 * 1024


def test_all_sources_ended_ends_the_stage_with_every_sample_seen(sets: Path) -> None:
    events: list[dict[str, Any]] = []
    sources = {"speech": {"max_epochs": 1}, "rare": {"max_epochs": 1}}
    loader = make_loader(sets, events, sources=sources)
    refs = [r for *_, packs in loader.planned_steps() for pack in packs for r in pack.samples]
    assert len(refs) == len(set(refs)) == 4 * 200 + 60
    assert events[-1]["kind"] == "sources_ended"


def test_a_budget_ends_the_stage_and_a_resumed_run_ends_there_too(sets: Path) -> None:
    events: list[dict[str, Any]] = []
    budget = 100_000
    sources = {"text": BASE, "speech": BASE}
    loader = make_loader(sets, events, sources=sources, budget_tokens=budget)
    steps = tokens_of_steps(loader, 10_000)
    total = sum(sum(step.values()) for step in steps)
    # The plan counts by position: to the sample of each source that a window's edge cuts off.
    assert budget - 2 * 1024 <= total <= budget + 4 * 1024
    assert events[-1]["kind"] == "budget_reached"
    state = loader.state()
    window, step, *_ = list(loader.planned_steps())[-1]
    state["window"], state["step"] = window, step + 1
    loader.load_state(state)
    assert list(loader.planned_steps()) == []


def test_a_curriculum_changes_the_shares_at_its_step(sets: Path) -> None:
    changes = [CurriculumStep(from_step=200, weights={"text": 0.2, "speech": 0.8})]
    sources = {"text": {"weight": 0.9}, "speech": {"weight": 0.1}}
    loader = make_loader(sets, [], sources=sources, curriculum=changes)
    steps = tokens_of_steps(loader, 400)
    width = loader.steps_per_window
    assert shares(steps[:200])["text"] == pytest.approx(0.9, rel=0.01)
    assert shares(steps[200 + width :])["text"] == pytest.approx(0.2, rel=0.02)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("data.curriculum", {"curriculum": [CurriculumStep(from_step=1, weights={"oops": 1.0})]}),
        ("data.curriculum", {"curriculum": [CurriculumStep(from_step=1, weights={"text": 0.0})]}),
        ("data.budget_tokens", {"budget_tokens": 0}),
    ],
)
def test_settings_that_cannot_work_are_refused(key: str, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        DataConfig(sources={"text": SourceConfig(path="x")}, **change)
    assert caught.value.key == key


def test_left_out_rows_never_reach_the_plan_and_are_counted(sets: Path) -> None:
    root = sets / "speech"
    keys = {"k0-3": "too quiet", "k0-4": "too quiet"}
    write_skip_list(root, {"shard-000000.tar": keys})
    try:
        events: list[dict[str, Any]] = []
        filters = FilterConfig(max_duration_s=4.0)
        sources = {"speech": {"max_epochs": 1}}
        loader = make_loader(sets, events, sources=sources, filters=filters)
    finally:
        (root / "skip.json").unlink()
    source = loader.sources[0]
    refs = {r for *_, packs in loader.planned_steps() for pack in packs for r in pack.samples}
    kept = {
        (shard, number)
        for shard in range(4)
        for number, row in enumerate(source.rows(shard))
        if row.media[0].duration_us <= 4_000_000 and row.key not in keys
    }
    assert {(ref.shard, ref.row) for ref in refs} == kept
    reasons = {e["reason"]: e for e in events if e["kind"] == "left_out"}
    assert reasons["skip_list"]["samples"] == 2
    assert reasons["max_duration_s"]["samples"] == 800 - 2 - len(kept)
    assert reasons["max_duration_s"]["hours"] > 0


@settings(max_examples=80, deadline=None)
@given(
    limits=st.lists(st.one_of(st.none(), st.integers(1, 500)), min_size=1, max_size=4),
    weights=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    change=st.integers(1, 6),
)
def test_any_window_at_once_equals_one_after_the_other(
    limits: list[int | None], weights: list[int], change: int
) -> None:
    count = len(limits)
    table = [(0, weights[:count]), (change, weights[::-1][:count])]
    mixture = Mixture(limits, table, window_tokens=100)
    place = [0] * count
    for window in range(12):
        spans = mixture.spans(window)
        assert [start for start, _ in spans] == place
        place = [stop for _, stop in spans]
        given_now = sum(stop - start for start, stop in spans)
        if None in limits:
            assert given_now == pytest.approx(100, abs=count)
        assert all(n is None or p <= n for n, p in zip(limits, place, strict=True))
    end = mixture.end_window
    assert (end is None) == (None in limits)
    if end is not None:
        assert [start for start, _ in mixture.spans(end)] == limits


def test_a_curriculum_step_becomes_the_first_window_that_begins_there() -> None:
    table = weights_by_window(["a", "b"], {"a": 1.0, "b": 1.0}, [(9, {"b": 2.0})], 4)
    assert table == [(0, [1.0, 1.0]), (3, [0.0, 2.0])]


def test_the_shipped_ratio_is_the_recipes() -> None:
    """800 B image and video, 300 B audio, 100 B video with sound, and 20 % text beside them."""
    entry = load_yaml(CONF / "data" / "mixture_7b.yaml")
    weights = {name: source["weight"] for name, source in entry["sources"].items()}
    total = sum(weights.values())
    assert weights["text"] / total == pytest.approx(0.2)
    seen = weights["image"] + weights["video"]
    assert seen / weights["audio"] == pytest.approx(800 / 300)
    assert weights["audio"] / weights["audio_video"] == pytest.approx(300 / 100)
    assert entry.keys() - {"sources"} <= {k.partition(".")[0] for k in dotted_keys(DataConfig)}
