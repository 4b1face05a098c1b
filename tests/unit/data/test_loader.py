"""The loader on real media: exact at any position, the same plan for any number of ranks."""

from __future__ import annotations

import dataclasses
import os
import shutil
import struct
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.shards import Sample, write_shards
from omni_train.config.errors import ConfigError, DataError
from omni_train.data.config import DataConfig, SourceConfig
from omni_train.data.encode import encode
from omni_train.data.fetch import fetch
from omni_train.data.loader import PlannedLoader, expected_bytes, source_hashes
from omni_train.data.measure import measure
from omni_train.data.segment import write_segment
from omni_train.data.skiplist import write_skip_list
from omni_train.data.source import ShardSource
from omni_train.data.tokenizer import load_tokenizer
from omni_train.data.types import ModelSpec, ProcessingConfig
from omni_train.engine.types import StepItem
from omni_train.models.config import ModelPreset
from omni_train.models.presets import build_config, model_spec
from tests.unit.data.samples import SPEC, TOKENIZER

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


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dialogues of text alone: 200 of several lengths, in four shards."""
    root = tmp_path_factory.mktemp("texts")
    samples = []
    for number in range(200):
        question = {"role": "user", "content": "which word was said " * (1 + number % 5)}
        reply = {"role": "assistant", "content": f"number {number}"}
        samples.append(Sample(f"t-{number:03d}", {"messages": [question, reply]}, {}))
    write_shards(samples, root, tokenizer=TOKENIZER, samples_per_shard=50)
    return root


def text_steps(root: Path, *, rank: int, world_size: int, num_workers: int) -> list[list[str]]:
    """Keys of three global steps of a rank, in their order, after resuming from the first."""
    found = []
    state = None
    for num_steps in (1, 2):
        loader = PlannedLoader(
            DataConfig(
                sources={"text": SourceConfig(path=str(root))},
                pack_tokens=256,
                global_batch_packs=16,
                num_workers=num_workers if state else 0,
            ),
            tokenizer=TOKENIZER,
            spec=SPEC,
            rank=rank,
            world_size=world_size,
            seed=5,
            ledger=Ledger(),
        )
        if state:
            loader.load_state(state)
        with closing(loader.steps()) as steps:
            found += [keys(item) for item in islice(steps, num_steps)]
        state = loader.state()
    return found


@pytest.mark.parametrize(
    "with_workers", ["one rank", pytest.param("all ranks", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_global_steps_do_not_depend_on_ranks_and_workers(
    texts: Path, world_size: int, num_workers: int, with_workers: str
) -> None:
    def steps(rank: int, number: int) -> list[list[str]]:
        return text_steps(texts, rank=rank, world_size=world_size, num_workers=number)

    ranks = range(world_size)
    of_ranks = [steps(rank, 0) for rank in ranks]
    for rank in ranks if with_workers == "all ranks" else [world_size // 2]:
        # Workers change nothing, not even the order in a rank.
        assert not num_workers or steps(rank, num_workers) == of_ranks[rank]
    got = [sorted(key for rank in step for key in rank) for step in zip(*of_ranks, strict=True)]
    wanted = [sorted(step) for step in text_steps(texts, rank=0, world_size=1, num_workers=0)]
    assert all(len(step) > 20 for step in wanted)
    assert got == wanted


def test_the_bytes_of_a_batch_are_known_before_it_is_made(corpus: Path) -> None:
    for names in (("text",), ("asr",), ("caption",), ("av",)):
        loader = make_loader(corpus, names=names, pack_tokens=1024)
        tokenizer = load_tokenizer(corpus / "tokenizer")
        for _, _, _, packs in islice(loader.planned_steps(), 2):
            for pack in packs:
                work = [loader._locate(ref) for ref in pack.samples]
                expected = expected_bytes(pack, work, spec_of(tokenizer))
                fd = write_segment(loader._make(work, lambda number: None))
                made, pickled = os.fstat(fd).st_size, struct.unpack("<Q", os.pread(fd, 8, 0))[0]
                os.close(fd)
                # Names of fields and keys of samples, and not one value of their media.
                assert pickled < 6_000 < made, names
                media = sum(p.size for s in work for i in s.row.media for p in i.places())
                assert made <= expected <= 4 * made + media, names


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
    make_loader(corpus, num_workers=1, prefetch_bytes=9, worker_memory_bytes=1 << 40).load_state(
        state
    )
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
