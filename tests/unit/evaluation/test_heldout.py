"""Held-out sets while training: the figures are those of each sample alone, in any packing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from omni_train.config.errors import ConfigError
from omni_train.data.collate import collate
from omni_train.data.config import DataConfig, SourceConfig
from omni_train.data.encode import encode
from omni_train.data.fetch import fetch
from omni_train.data.source import ShardSet
from omni_train.data.tokenizer import load_tokenizer
from omni_train.data.types import ProcessingConfig
from omni_train.engine.run import RunConfig, start_run
from omni_train.evaluation.heldout import (
    HeldoutConfig,
    check_heldout,
    heldout_every,
)
from omni_train.models.build import build_thinker
from omni_train.models.config import ModelConfig
from omni_train.models.thinker import ThinkerForTraining
from omni_train.tracking.events import read_jsonl
from tests.numerics.samples import SMALL

NUM_SAMPLES = 6


def data_config(corpus: Path, pack_tokens: int) -> DataConfig:
    return DataConfig(
        sources={"asr": SourceConfig(path=str(corpus / "train" / "asr"))},
        pack_tokens=pack_tokens,
        processing=ProcessingConfig(video_fps=4.0, video_min_pixels=3136),
    )


@pytest.fixture(scope="module")
def model(corpus: Path) -> ThinkerForTraining:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    config = ModelConfig(tokenizer=str(corpus / "tokenizer"), tiny=SMALL)
    built = build_thinker(config, tokenizer, seed=5, dtype=torch.float32)
    with torch.no_grad():
        # A head that prefers each token's own successor would be too easy; this one is varied.
        built.thinker.lm_head.weight.mul_(5.0)
    return built


def score(
    model: ThinkerForTraining, corpus: Path, run_dir: Path, *, pack_tokens: int, **changes: Any
) -> dict[str, dict[str, Any]]:
    sets = {name: str(corpus / "heldout" / name) for name in ("asr", "av")}
    config = HeldoutConfig(sets=sets, max_samples=NUM_SAMPLES, **changes)
    data, tokenizer = data_config(corpus, pack_tokens), load_tokenizer(corpus / "tokenizer")
    run_config = RunConfig(dir=str(run_dir))
    with start_run(run_config, stage="toy", settings=run_config) as run:
        ((_, evaluate),) = heldout_every(config, data, tokenizer, model.spec, run)
        evaluate(SimpleNamespace(model=model), 7)  # type: ignore[arg-type]
    events = read_jsonl(run_dir / "events.jsonl")
    return {event["task"]: event for event in events if event["kind"] == "heldout"}


def one_by_one(model: ThinkerForTraining, corpus: Path, name: str) -> dict[str, float]:
    """Loss, token accuracy and exact matches from the plain logits of each sample."""
    tokenizer, shards = load_tokenizer(corpus / "tokenizer"), ShardSet("x", str(corpus / name))
    loss = tokens = right = exact = 0.0
    for row in range(NUM_SAMPLES):
        raw = fetch(shards.path_of(0), shards.row(0, row))
        processing = data_config(corpus, 1).processing
        batch = collate([encode(raw, tokenizer, processing, model.spec)], model.spec)
        with torch.no_grad():
            logits = model.thinker.lm_head(model.hidden(batch)[0, batch.target_index])
        logprobs = torch.log_softmax(logits.double(), dim=-1)
        loss -= float(logprobs.gather(1, batch.target_ids[:, None]).sum())
        hits = logits.argmax(dim=-1) == batch.target_ids
        tokens, right = tokens + hits.numel(), right + int(hits.sum())
        exact += int(hits.all())
    return {
        "loss": loss / tokens,
        "token_accuracy": right / tokens,
        "exact_match": exact / NUM_SAMPLES,
    }


def test_figures_do_not_depend_on_the_packing(
    model: ThinkerForTraining, corpus: Path, tmp_path: Path
) -> None:
    small = score(model, corpus, tmp_path / "small", pack_tokens=400)
    large = score(model, corpus, tmp_path / "large", pack_tokens=4096)
    for task in ("asr", "av"):
        wanted = one_by_one(model, corpus, f"heldout/{task}")
        for found in (small[task], large[task]):
            assert found["step"] == 7
            assert found["num_samples"] == NUM_SAMPLES
            assert found["num_bad"] == found["num_too_long"] == 0
            for key, value in wanted.items():
                assert found[key] == pytest.approx(value, rel=1e-4), (task, key)


def test_a_trained_reply_is_an_exact_match(
    model: ThinkerForTraining, corpus: Path, tmp_path: Path
) -> None:
    """Overfit one sample: its reply must then count, and the loss be near zero."""
    tokenizer, shards = load_tokenizer(corpus / "tokenizer"), ShardSet("x", f"{corpus}/heldout/asr")
    raw = fetch(shards.path_of(0), shards.row(0, 0))
    batch = collate([encode(raw, tokenizer, ProcessingConfig(), model.spec)], model.spec)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        (-model(batch).sum()).backward()
        optimizer.step()
    found = score(model, corpus, tmp_path, pack_tokens=400)["asr"]
    model.load_state_dict(before)
    assert found["exact_match"] >= 1 / NUM_SAMPLES
    assert found["exact_match"] < 1.0
    assert 0.0 < found["token_accuracy"] <= 1.0


def test_samples_that_cannot_be_scored_are_said(
    model: ThinkerForTraining, corpus: Path, tmp_path: Path
) -> None:
    sizes = score(model, corpus, tmp_path / "a", pack_tokens=250)["av"]
    assert sizes["num_too_long"] > 0
    assert sizes["num_samples"] == NUM_SAMPLES - sizes["num_too_long"]
    with pytest.raises(ConfigError, match=r"no sample of it fits data\.pack_tokens=10"):
        score(model, corpus, tmp_path / "b", pack_tokens=10)


def test_a_set_that_is_trained_on_is_refused(corpus: Path) -> None:
    data = data_config(corpus, 400)
    with pytest.raises(ConfigError, match=r"data\.sources\.asr trains on it"):
        check_heldout(HeldoutConfig(sets={"a": f"{corpus}/train/asr/"}), data)
    check_heldout(HeldoutConfig(sets={"a": f"{corpus}/heldout/asr"}), data)
    for key in ("every_steps", "max_samples"):
        with pytest.raises(ConfigError, match=f"heldout.{key}"):
            HeldoutConfig(**{key: 0})


def test_no_set_is_no_entry(corpus: Path) -> None:
    assert heldout_every(HeldoutConfig(), data_config(corpus, 400), *[None] * 3) == ()  # type: ignore[arg-type]
