"""Stages 2 and 3 under ZeRO-3 on two ranks: merged towers, five kinds of data, held-out sets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import recipes.stage2_multimodal
import recipes.stage3_long  # noqa: F401  both register their roots
from omni_train.config.errors import ConfigError
from omni_train.config.load import compose_config
from omni_train.config.register import find_root
from omni_train.data.replay import step_samples
from omni_train.data.tokenizer import load_tokenizer
from omni_train.engine.hashing import keys_hash
from omni_train.models.build import build_thinker
from omni_train.models.config import ModelConfig
from omni_train.models.groups import THINKER_GROUPS, group_of
from omni_train.models.weights import open_source
from omni_train.tracking.events import read_jsonl, read_steps
from tests.recipes.launching import finish, start

STEPS = 4
KINDS = ("text", "asr", "caption", "av")


@pytest.fixture(scope="module")
def towers(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two branches of stage 1 leave: two whole Thinkers, one tower of each is wanted."""
    root = tmp_path_factory.mktemp("towers")
    tokenizer = load_tokenizer(corpus / "tokenizer")
    for seed, name in enumerate(("audio", "vision"), start=1):
        config = ModelConfig(tokenizer=str(corpus / "tokenizer"))
        model = build_thinker(config, tokenizer, seed=seed, dtype=torch.float32)
        (root / name).mkdir()
        save_file(dict(model.named_parameters()), root / name / "model.safetensors")
    return root


def overrides(corpus: Path, run_dir: Path, *extra: str) -> list[str]:
    sources = ", ".join(f"{n}: {{path: '{corpus}/train/{n}'}}" for n in KINDS)
    sets = ", ".join(f"{n}: '{corpus}/heldout/{n}'" for n in ("asr", "av"))
    return [
        f"run.dir='{run_dir}'",
        f"model.tokenizer='{corpus}/tokenizer'",
        f"+data.sources={{{sources}}}",
        "data.global_batch_packs=4",
        "data.num_workers=0",
        "data.processing.video_fps=4.0",
        "data.processing.video_min_pixels=3136",
        f"+heldout.sets={{{sets}}}",
        "heldout.max_samples=6",
        "deepspeed.precision=fp32",
        "optim.lr=1e-3",
        f"fit.max_steps={STEPS}",
        "tracking.wandb=false",
        *extra,
    ]


def stage2(corpus: Path, towers: Path, run_dir: Path, *extra: str) -> list[str]:
    groups = ", ".join(f"{g}: '{towers}/vision'" for g in ("vision_encoder", "vision_merger"))
    decayed = "+optim.groups={llm: {layer_decay: 0.5, schedule: wsd}, vision_encoder: {lr: 1e-4}}"
    return overrides(
        corpus,
        run_dir,
        f"model.init_from='{towers}/audio'",
        f"+model.init_groups={{{groups}}}",
        "data.pack_tokens=512",
        decayed,
        *extra,
    )


def run(recipe: str, given: list[str], *, ranks: int = 2) -> None:
    code, output = finish(start(recipe, given, ranks=ranks))
    assert code == 0, output


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_jsonl(run_dir / "events.jsonl") if e["kind"] == kind]


@pytest.fixture(scope="module")
def second(corpus: Path, towers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("second") / "run"
    run("stage2_multimodal", stage2(corpus, towers, run_dir, "heldout.every_steps=2"))
    return run_dir


def test_stage2_trains_everything_on_every_kind(second: Path, towers: Path) -> None:
    (begin,), (end,) = events(second, "fit_start"), events(second, "fit_end")
    assert set(begin["trained"]) == THINKER_GROUPS
    changed = {n for n, value in begin["hashes"].items() if end["hashes"][n] != value}
    assert changed == THINKER_GROUPS
    (weights,) = events(second, "weights")
    assert weights["sources"] == [f"{towers}/audio", f"{towers}/vision"]
    assert set(weights["tensors"].values()) == {"loaded"}
    steps = read_steps(second / "events.jsonl")
    seen = {name for step in steps for name in step["metrics"]}
    assert {"loss_task/asr", "loss_task/av", "loss_modality/audio_video"} <= seen
    assert {"loss_modality/text", "loss_modality/image"} <= seen
    assert set(steps[0]["tokens_by_source"]) == set(KINDS)
    assert set(steps[0]["grad_norm"]) == {"total", *THINKER_GROUPS}
    assert steps[0]["lr"]["vision_encoder"] == pytest.approx(1e-4)
    assert list(read_jsonl(second / "ledger.jsonl")) == []


def test_held_out_sets_are_scored_while_training(second: Path) -> None:
    found = events(second, "heldout")
    assert [(e["step"], e["task"]) for e in found] == [
        (step, task) for step in (2, 4) for task in ("asr", "av")
    ]
    for event in found:
        assert event["num_samples"] == 6
        assert math.isfinite(event["loss"])
        assert 0.0 <= event["exact_match"] <= event["token_accuracy"] <= 1.0


def test_the_samples_of_a_step_can_be_named(second: Path) -> None:
    for event in read_steps(second / "events.jsonl"):
        found = step_samples(second, event["step"])
        assert f"{keys_hash([sample.key for sample in found]):016x}" == event["keys"]
        assert {sample.source for sample in found} <= set(KINDS)
    with pytest.raises(ConfigError, match="no event of that step"):
        step_samples(second, STEPS + 1)


def test_model_flops_are_counted_and_no_peak_is_made_up(second: Path) -> None:
    steps = read_steps(second / "events.jsonl")
    # 6 FLOPs for each of some million parameters and some thousand tokens.
    assert all(1e9 < step["model_flops"] < 1e12 for step in steps)
    assert torch.cuda.is_available() or not any("mfu" in step for step in steps)


@pytest.mark.slow
def test_a_run_goes_back_and_passes_over_a_named_step(
    second: Path, corpus: Path, towers: Path, tmp_path: Path
) -> None:
    given = stage2(corpus, towers, tmp_path / "run", "heldout.every_steps=99", "fit.save_steps=1")
    given.append("fit.keep_checkpoints=9")
    run("stage2_multimodal", given)
    back = [*given, "fit.spikes.rewind_to=1", "fit.spikes.skip_steps=[3]"]
    run("stage2_multimodal", back)
    assert [e["to"] for e in events(tmp_path / "run", "rewind")] == [1]
    (skipped,) = events(tmp_path / "run", "skipped")
    first, again = events(second, "step"), events(tmp_path / "run", "step")[STEPS:]
    assert [e["step"] for e in again] == [2, 4]
    assert skipped["step"] == 3
    assert f"{keys_hash(skipped['keys']):016x}" == first[2]["keys"]
    assert [e["keys"] for e in again] == [first[1]["keys"], first[3]["keys"]]
    assert again[0]["loss"] == first[1]["loss"]
    assert again[1]["loss"] != first[3]["loss"]
    # The same command again is done; it does not go back a second time.
    run("stage2_multimodal", back)
    assert len(events(tmp_path / "run", "rewind")) == 1
    assert len(events(tmp_path / "run", "step")) == STEPS + 2


@pytest.mark.slow
def test_scoring_does_not_change_the_training(
    second: Path, corpus: Path, towers: Path, tmp_path: Path
) -> None:
    run("stage2_multimodal", stage2(corpus, towers, tmp_path / "run", "heldout.every_steps=99"))
    assert not events(tmp_path / "run", "heldout")
    ends = [events(folder, "fit_end")[0]["hashes"] for folder in (second, tmp_path / "run")]
    assert ends[0] == ends[1]
    losses = [
        [step["loss"] for step in read_steps(folder / "events.jsonl")]
        for folder in (second, tmp_path / "run")
    ]
    assert losses[0] == losses[1]


def test_stage3_goes_on_with_longer_packs_and_keeps_its_base(
    second: Path, corpus: Path, tmp_path: Path
) -> None:
    given = [f"model.init_from='{second}'", "data.pack_tokens=2048", "heldout.every_steps=3"]
    longer = ("model.rope_theta=2e6", "data.global_batch_packs=2", "fit.max_steps=3")
    run("stage3_long", overrides(corpus, tmp_path / "third", *given, *longer))
    (begin,) = events(tmp_path / "third", "fit_start")
    assert begin["hashes"] | {"unused": ""} == events(second, "fit_end")[0]["hashes"] | {
        "unused": ""
    }
    assert max(step["tokens"] for step in read_steps(tmp_path / "third" / "events.jsonl")) > 1024
    assert len(events(tmp_path / "third", "heldout")) == 2
    # A checkpoint has no config.json: who goes on from it must name the base it was trained with.
    tokenizer = load_tokenizer(corpus / "tokenizer")
    later = ModelConfig(tokenizer=str(corpus / "tokenizer"), init_from=str(tmp_path / "third"))
    with pytest.raises(ConfigError, match="was trained with 2000000"):
        build_thinker(later, tokenizer, seed=0, dtype=torch.float32)
    later.rope_theta = 2e6
    built = build_thinker(later, tokenizer, seed=0, dtype=torch.float32)
    assert built.thinker.config.text_config.rope_parameters["rope_theta"] == 2e6
    name = "thinker.model.language_model.norm.weight"
    assert group_of(name) == "llm"
    assert torch.equal(open_source(str(tmp_path / "third")).tensor(name), built.get_parameter(name))


@pytest.mark.parametrize("recipe", ["stage2_multimodal", "stage3_long"])
def test_random_weights_and_trained_held_out_sets_are_refused(recipe: str) -> None:
    root = find_root(recipe)
    given = ["run.dir=r", "model.tokenizer=t", "fit.max_steps=1", "+data.sources={a: {path: x}}"]
    assert root.validate is not None
    with pytest.raises(ConfigError, match="goes on from trained weights"):
        root.validate(compose_config(root, given), 1)
    given.append("model.init_from=run")
    root.validate(compose_config(root, given), 1)
    with pytest.raises(ConfigError, match=r"data\.sources\.a trains on it"):
        root.validate(compose_config(root, [*given, "+heldout.sets={b: x}"]), 1)


def test_a_rope_base_reaches_the_rotary_embedding(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")

    def frequencies(theta: float | None) -> torch.Tensor:
        config = ModelConfig(tokenizer=str(corpus / "tokenizer"), rope_theta=theta)
        model = build_thinker(config, tokenizer, seed=0, dtype=torch.float32)
        found: torch.Tensor = model.thinker.model.language_model.rotary_emb.inv_freq
        return found

    assert torch.equal(frequencies(None), frequencies(1e6))
    half = frequencies(4e6)
    width = 2 * half.numel()
    wanted = 4e6 ** (-torch.arange(0, width, 2) / width)
    torch.testing.assert_close(half, wanted)
