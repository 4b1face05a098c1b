"""Stage 1 on real media under ZeRO-3: exact resume after a kill, the same run on 1 and 2 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from omni_train.tracking.events import read_jsonl, read_steps
from tests.recipes.launching import children_of, finish, kill, start, wait_for

STEPS = 10


def overrides(corpus: Path, run_dir: Path, *extra: str) -> list[str]:
    """Speech, pictures and clips together, so that both towers and the interleaving take part."""
    sources = ", ".join(f"{n}: {{path: '{corpus}/train/{n}'}}" for n in ("asr", "caption", "av"))
    return [
        "phase=encoder",
        f"run.dir='{run_dir}'",
        f"model.tokenizer='{corpus}/tokenizer'",
        f"+data.sources={{{sources}}}",
        "data.pack_tokens=512",
        "data.global_batch_packs=4",
        "data.processing.video_fps=4.0",
        "data.processing.video_min_pixels=3136",
        "optim.lr=1e-3",
        f"fit.max_steps={STEPS}",
        "fit.save_steps=5",
        "tracking.wandb=false",
        *extra,
    ]


def run(recipe_overrides: list[str], *, ranks: int) -> None:
    code, output = finish(start("stage1_audio", recipe_overrides, ranks=ranks))
    assert code == 0, output


def trace(run_dir: Path) -> list[tuple[Any, ...]]:
    return [
        (e["step"], e["loss"], e["keys"], e["grad_norm"], e["target_tokens"])
        for e in read_steps(run_dir / "events.jsonl")
    ]


def end_hashes(run_dir: Path) -> dict[str, str]:
    ends = [e for e in read_jsonl(run_dir / "events.jsonl") if e["kind"] == "fit_end"]
    hashes: dict[str, str] = ends[-1]["hashes"]
    return hashes


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten uninterrupted bf16 steps on two ranks."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run(overrides(corpus, run_dir), ranks=2)
    return run_dir


def test_every_sample_kind_was_trained_on(whole: Path) -> None:
    assert len(trace(whole)) == STEPS
    assert list(read_jsonl(whole / "ledger.jsonl")) == []
    start_event = next(e for e in read_jsonl(whole / "events.jsonl") if e["kind"] == "fit_start")
    after = end_hashes(whole)
    changed = {name for name, value in start_event["hashes"].items() if after[name] != value}
    assert changed == {"audio_encoder", "audio_projection"}


def test_killed_and_resumed_equals_uninterrupted(corpus: Path, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start("stage1_audio", overrides(corpus, run_dir), ranks=2)
    wait_for(lambda: len(read_steps(run_dir / "events.jsonl")) >= 6, process)
    kill(children_of(process.pid)[-1])
    assert finish(process)[0] != 0
    assert len(read_steps(run_dir / "events.jsonl")) < STEPS
    run(overrides(corpus, run_dir), ranks=2)
    resumes = [e for e in read_jsonl(run_dir / "events.jsonl") if e["kind"] == "resume"]
    assert [e["step"] for e in resumes] == [5]
    assert trace(run_dir) == trace(whole)
    assert end_hashes(run_dir) == end_hashes(whole)


def test_one_rank_equals_two_and_accumulation_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    exact = ("deepspeed.precision=fp32", "fit.max_steps=4")
    shared = "deepspeed.sequence_parallel=2"
    run(overrides(corpus, tmp_path / "one", *exact), ranks=1)
    run(overrides(corpus, tmp_path / "two", *exact), ranks=2)
    run(overrides(corpus, tmp_path / "shared", *exact, shared), ranks=2)
    one, two = trace(tmp_path / "one"), trace(tmp_path / "two")
    # Four packs a step: four micro-steps on one rank, two on each of two, four on two together.
    for others in (two, trace(tmp_path / "shared")):
        for (step, loss, keys, norm, tokens), other in zip(one, others, strict=True):
            assert (step, keys, tokens) == (other[0], other[2], other[4])
            assert loss == pytest.approx(other[1], rel=1e-5)
            assert norm["total"] == pytest.approx(other[3]["total"], rel=1e-4)
    counts = [
        [e["num_samples"] for e in read_steps(tmp_path / name / "events.jsonl")]
        for name in ("one", "two", "shared")
    ]
    assert counts[0] == counts[1] == counts[2]
