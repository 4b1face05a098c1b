"""The loader on real media: exact at any position, the same plan for any number of ranks."""

from __future__ import annotations

import dataclasses
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_train.config.errors import ConfigError, DataError
from omni_train.data.config import DataConfig, SourceConfig
from omni_train.data.encode import encode
from omni_train.data.fetch import fetch
from omni_train.data.loader import PlannedLoader, source_hashes
from omni_train.data.measure import measure
from omni_train.data.skiplist import write_skip_list
from omni_train.data.source import ShardSource
from omni_train.data.tokenizer import load_tokenizer
from omni_train.data.types import ModelSpec, ProcessingConfig
from omni_train.engine.types import StepItem
from omni_train.models.config import ModelPreset
from omni_train.models.presets import build_config, model_spec

SUBSETS = ("text", "asr", "caption", "av", "dialogue")
PROCESSING = ProcessingConfig(video_fps=4.0, video_min_pixels=3136)


def spec_of(tokenizer: Any) -> ModelSpec:
    return model_spec(build_config(ModelPreset.tiny, tokenizer).thinker_config, tokenizer)


class Ledger:
    """Collects what the plan leaves out."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []

    def __call__(self, **row: str) -> None:
        self.rows.append(row)


def make_loader(
    corpus: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    ledger: Ledger | None = None,
    root: Path | None = None,
    **settings: Any,
) -> PlannedLoader:
    names = settings.pop("names", ("asr", "caption", "av"))
    tokenizer = load_tokenizer(corpus / "tokenizer")
    sources = {n: SourceConfig(path=str((root or corpus / "train") / n)) for n in names}
    allow = settings.pop("resume_allow", ())
    values = {"pack_tokens": 512, "global_batch_packs": 4, "num_workers": 0, **settings}
    values.setdefault("processing", PROCESSING)
    return PlannedLoader(
        DataConfig(sources=sources, **values),
        tokenizer=tokenizer,
        spec=spec_of(tokenizer),
        rank=rank,
        world_size=world_size,
        seed=3,
        ledger=ledger or Ledger(),
        resume_allow=allow,
    )


def keys(item: StepItem) -> list[str]:
    return [key for batch in item.micro_batches for key in batch.keys]


def test_measure_equals_encode_on_every_sample_of_the_corpus(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    spec = spec_of(tokenizer)
    checked = 0
    for split in ("train", "heldout"):
        for name in SUBSETS:
            sources = {name: SourceConfig(path=str(corpus / split / name))}
            config = DataConfig(sources=sources, processing=PROCESSING)
            source = ShardSource(name, config, spec, tokenizer)
            for shard in range(len(source.counts)):
                costs = source.costs(shard)
                again = measure(source.rows(shard), PROCESSING, spec)
                for field in dataclasses.fields(again):
                    of_columns, of_rows = getattr(costs, field.name), getattr(again, field.name)
                    np.testing.assert_array_equal(of_columns, of_rows)
                for row, tokens in zip(source.rows(shard), costs.num_tokens.tolist(), strict=True):
                    raw = fetch(source.path_of(shard), row)
                    assert encode(raw, tokenizer, PROCESSING, spec).num_tokens == tokens, row.key
                    checked += 1
    assert checked > 500


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_global_steps_do_not_depend_on_the_world_size(corpus: Path, world_size: int) -> None:
    wanted = [sorted(keys(item)) for item in islice(make_loader(corpus).steps(), 5)]
    ranks = [make_loader(corpus, rank=r, world_size=world_size).steps() for r in range(world_size)]
    for step in wanted:
        items = [next(rank) for rank in ranks]
        assert len({len(item.micro_batches) for item in items}) == 1
        assert sorted(key for item in items for key in keys(item)) == step


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_continues_exactly(corpus: Path, num_workers: int) -> None:
    loader = make_loader(corpus)
    steps = loader.steps()
    list(islice(steps, 7))
    state = loader.state()
    wanted = [
        [batch.input_ids.tolist() for batch in item.micro_batches] for item in islice(steps, 4)
    ]
    resumed = make_loader(corpus, num_workers=num_workers)
    resumed.load_state(state)
    got = islice(resumed.steps(), 4)
    assert [[b.input_ids.tolist() for b in item.micro_batches] for item in got] == wanted
    assert set(state) == {"epoch", "window", "step", "fingerprint"}


def test_a_state_of_other_data_mixture_or_processing_is_refused(
    corpus: Path, tmp_path: Path
) -> None:
    state = make_loader(corpus).state()
    make_loader(corpus, num_workers=2, max_bad_share=0.5).load_state(state)
    with pytest.raises(ConfigError, match=r"data\.pack_tokens: 512 -> 600"):
        make_loader(corpus, pack_tokens=600).load_state(state)
    with pytest.raises(ConfigError, match=r"data\.sources\.av\.weight: 1\.0 -> None"):
        make_loader(corpus, names=("asr", "caption")).load_state(state)
    processing = dataclasses.replace(PROCESSING, video_fps=2.0)
    with pytest.raises(ConfigError, match=r"data\.processing\.video_fps: 4\.0 -> 2\.0"):
        make_loader(corpus, processing=processing).load_state(state)
    make_loader(corpus, processing=processing, resume_allow=["data.processing"]).load_state(state)
    for name in ("asr", "caption", "av"):
        shutil.copytree(corpus / "train" / name, tmp_path / name)
    make_loader(corpus, root=tmp_path).load_state(state)
    key = make_loader(corpus).sources[0].row(0, 0).key
    write_skip_list(tmp_path / "asr", {"shard-000000.tar": {key: "noise"}})
    with pytest.raises(ConfigError, match=r"data\.asr: '\w+' -> '\w+'"):
        make_loader(corpus, root=tmp_path).load_state(state)


def test_tokens_by_source_are_those_of_the_global_step(corpus: Path) -> None:
    ranks = [make_loader(corpus, rank=r, world_size=2).steps() for r in range(2)]
    for _ in range(3):
        items = [next(rank) for rank in ranks]
        assert items[0].tokens_by_source == items[1].tokens_by_source
        batches = [batch for item in items for batch in item.micro_batches]
        tokens = sum(batch.num_tokens for batch in batches if batch.keys)
        assert sum(items[0].tokens_by_source.values()) == tokens
        assert set(items[0].tokens_by_source) == {"asr", "caption", "av"}


def test_an_epoch_of_one_source_delivers_every_sample_once(corpus: Path) -> None:
    loader = make_loader(corpus, names=("asr",))
    seen: list[str] = []
    for item in loader.steps():
        if item.epoch == 1:
            break
        seen += keys(item)
    assert sorted(seen) == sorted({row.key for row in loader.sources[0].rows(0)})


def test_a_sample_over_the_budget_is_reported_and_never_cut(corpus: Path) -> None:
    ledger = Ledger()
    loader = make_loader(corpus, names=("av", "text"), pack_tokens=96, ledger=ledger)
    for item in islice(loader.steps(), 3):
        assert all(batch.num_tokens <= 96 for batch in item.micro_batches)
    assert ledger.rows
    assert all(row["reason"].startswith("over_budget") for row in ledger.rows)


def test_a_damaged_sample_leaves_its_pack_shorter_and_is_named(
    corpus: Path, tmp_path: Path
) -> None:
    shutil.copytree(corpus / "train" / "asr", tmp_path / "asr")
    whole = [keys(item) for item in islice(make_loader(corpus, names=("asr",)).steps(), 3)]
    loader = make_loader(corpus, names=("asr",), root=tmp_path)
    row = next(r for r in loader.sources[0].rows(0) if r.key == whole[1][0])
    tar = tmp_path / "asr" / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[row.media[0].offset + 100] ^= 1
    tar.write_bytes(bytes(data))
    items = list(islice(loader.steps(), 3))
    bad = [entry for item in items for batch in item.micro_batches for entry in batch.bad]
    assert [(source, shard, key) for source, shard, key, _ in bad] == [
        ("asr", "shard-000000.tar", row.key)
    ]
    assert bad[0][3].startswith("hash_mismatch")
    assert [keys(item) for item in items] == [[k for k in step if k != row.key] for step in whole]


def test_too_many_bad_samples_stop_the_run(corpus: Path) -> None:
    loader = make_loader(corpus, max_bad_in_a_row=3, max_bad_share=0.05)
    bad = [("asr", "shard-000000.tar", "k", "truncated: half of it")]
    loader.count_bad(bad, num_samples=8)
    with pytest.raises(DataError, match=r"max_bad_share=0\.05"):
        loader.count_bad(bad * 10, num_samples=8)
    with pytest.raises(DataError, match="in a row"):
        make_loader(corpus, max_bad_share=1.0, max_bad_in_a_row=3).count_bad(bad * 4, num_samples=0)


def test_another_tokenizer_and_a_missing_manifest_are_refused(corpus: Path, tmp_path: Path) -> None:
    loader = make_loader(corpus)
    with pytest.raises(ConfigError, match="omni-train data index"):
        loader.sources[0].check_tokenizer("0" * 16)
    config = DataConfig(sources={"x": SourceConfig(path=str(tmp_path))})
    with pytest.raises(ConfigError, match=r"data\.sources\.x\.path"):
        source_hashes(config)
