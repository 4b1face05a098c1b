"""From shards to gradients: packing, ranks and cached states change nothing, references included.

The same as test_talker_packing.py, but nothing is put together by hand: shards are written,
planned, fetched, encoded and packed as in a run.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omni_train.data.config import SourceConfig
from omni_train.data.loader import PlannedLoader
from omni_train.data.speech import SpeechMaker, state_name
from omni_train.data.speech_config import ReferenceChoice, SpeechDataConfig
from omni_train.data.speech_source import SpeechSource
from omni_train.data.stores import Store
from omni_train.data.types import SampleRef
from omni_train.data.work import Work
from omni_train.models.talker import OmniForTraining, TalkerForTraining, thinker_states
from omni_train.models.talker_layout import SpeechBatch
from omni_train.models.talker_states import StateStore, thinker_hash
from omni_train.objectives.codec_next_token import codec_next_token
from tests.numerics.talker_models import Models, make_models
from tests.numerics.test_talker_packing import assert_same
from tests.speech_sets import some_samples, write_set

CONTINUED = {"reference": ReferenceChoice.same_speaker, "reference_noise": 0.2}
Result = tuple[float, int, dict[str, Tensor]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("omni"))


@pytest.fixture(scope="module")
def spoken(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("spoken")
    write_set(root, some_samples(24), models.tokenizer, samples_per_shard=12)
    return root


def make_loader(
    models: Models,
    root: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    states: StateStore | None = None,
    **values: Any,
) -> PlannedLoader:
    basics = {"pack_tokens": 600, "pack_positions": 500, "global_batch_packs": 4, "num_workers": 0}
    sources = {"a": SourceConfig(path=str(root))}
    config = SpeechDataConfig(sources=sources, **(basics | values))
    make = SpeechMaker(
        models.tokenizer,
        config.processing,
        models.spec,
        Store(),
        talker=models.talker.spec,
        noise=config.reference_noise,
        seed=1,
        states=states,
    )
    return PlannedLoader(
        config,
        tokenizer=models.tokenizer,
        spec=models.spec,
        rank=rank,
        world_size=world_size,
        seed=1,
        ledger=lambda **row: pytest.fail(str(row)),
        source_type=SpeechSource,
        make=make,
    )


def step_of(loader: PlannedLoader) -> list[SpeechBatch]:
    """Micro-batches of the first global step."""
    item = next(iter(loader.steps()))
    assert not any(batch.bad for batch in item.micro_batches)
    return list(item.micro_batches)  # type: ignore[arg-type]


def works_of(loader: PlannedLoader) -> list[Work]:
    """Samples of the packs of the first global step."""
    packs = next(iter(loader.planned_steps()))[3]
    return [[loader.sources[0].place(ref) for ref in pack.samples] for pack in packs]


def run(model: nn.Module, batches: list[SpeechBatch]) -> Result:
    """Summed loss, targets and gradients of some micro-batches."""
    loss = tokens = 0.0
    for batch in batches:
        out = codec_next_token(model, batch)
        out.loss.backward()
        loss, tokens = loss + float(out.loss.detach()), tokens + out.num_tokens
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss, int(tokens), grads


def omni(models: Models, *, joint: bool = False) -> OmniForTraining:
    thinker, talker = copy.deepcopy(models.thinker), copy.deepcopy(models.talker)
    return OmniForTraining(thinker, TalkerForTraining(talker), joint=joint)


def assert_equal(got: Result, want: Result) -> None:
    assert got[1] == want[1] > 100
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    assert_same(got[2], want[2], tolerance=1e-5)
    assert max(float(grad.abs().max()) for grad in want[2].values()) > 1.0


@pytest.mark.parametrize("joint", [False, True], ids=["frozen", "joint"])
@pytest.mark.parametrize("values", [{}, CONTINUED], ids=["plain", "continued"])
def test_packed_equals_one_sample_at_a_time(
    models: Models, spoken: Path, values: dict[str, Any], joint: bool
) -> None:
    loader, model = make_loader(models, spoken, **values), omni(models, joint=joint)
    works = works_of(loader)
    assert max(len(work) for work in works) > 2
    packed = step_of(make_loader(models, spoken, **values))
    single = [loader._make([sample], lambda number: None) for work in works for sample in work]
    assert_equal(run(model, packed), run(model, single))


@pytest.mark.parametrize("values", [{}, CONTINUED], ids=["plain", "continued"])
def test_one_rank_equals_two(models: Models, spoken: Path, values: dict[str, Any]) -> None:
    model = omni(models)
    ranks = [make_loader(models, spoken, rank=r, world_size=2, **values) for r in range(2)]
    of_ranks = [run(model, step_of(rank)) for rank in ranks]
    summed = (
        sum(loss for loss, _, _ in of_ranks),
        sum(tokens for _, tokens, _ in of_ranks),
        {name: sum(grads[name] for _, _, grads in of_ranks) for name in of_ranks[0][2]},
    )
    assert_equal(summed, run(model, step_of(make_loader(models, spoken, **values))))  # type: ignore[arg-type]


def test_cached_states_equal_fresh_ones(models: Models, spoken: Path, tmp_path: Path) -> None:
    """Made in packs of another make-up; the Talker then learns without the Thinker."""
    store = StateStore(
        tmp_path, thinker=thinker_hash(models.thinker), width=64, dtype=torch.float32
    )
    fresh = make_loader(models, spoken)
    source = fresh.sources[0]
    for shard in range(2):
        work = [source.place(SampleRef(0, shard, row)) for row, _ in source.used(shard)][::-1]
        batch = fresh._make(work, lambda number: None)
        with torch.no_grad():
            states = thinker_states(models.thinker, batch.thinker)
        for sample, part in zip(work, states.split(batch.thinker.segments.lengths), strict=True):
            store.put(state_name(sample), part)
    kept = make_loader(models, spoken, states=store)
    batches = step_of(kept)
    assert all(batch.thinker is None for batch in batches)
    alone = TalkerForTraining(copy.deepcopy(models.talker))
    assert_equal(run(alone, batches), run(omni(models), step_of(fresh)))
    # What cannot be read is named, and the step goes on without it.
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    lost = kept._make(works_of(fresh)[0], lambda number: None)
    assert (lost.keys, lost.num_target_tokens) == ([], 0)
    assert {reason.partition(":")[0] for *_, reason in lost.bad} == {"no_states"}
    assert float(codec_next_token(alone, lost).loss.detach()) == 0.0
