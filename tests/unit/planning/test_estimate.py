"""What the estimate does as its inputs change, the released sizes, the recipes' groups."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

from omni_train.config.errors import ConfigError
from omni_train.models.groups import THINKER_GROUPS
from omni_train.models.thinker import tile_columns
from omni_train.planning.constants import known_hardware, load_constants, load_hardware
from omni_train.planning.estimate import Options, Plan, plan_stage
from omni_train.planning.memory import estimate_memory
from omni_train.planning.model import measure_model, trained_groups
from omni_train.planning.reliability import expect
from omni_train.planning.setup import choose_recompute, first_knob
from omni_train.planning.shapes import DecoderLoad, DecoderShape, Recompute, Setup
from omni_train.planning.speed import estimate_step
from recipes import (
    stage1_audio,
    stage1_vision,
    talker_dpo,
    talker_icl,
    talker_speaker_sft,
    text_lm,
)

CONSTANTS = load_constants()
DEVICE = torch.device("cuda")
H100 = load_hardware("h100")
QWEN_7B = DecoderShape(
    layers=28, width=3584, query_width=3584, kv_width=512, ffn=18944, vocab=152064
)


def settings(preset: str = "qwen2_5_omni_7b", **data: Any) -> dict[str, Any]:
    """The resolved settings of a stage, as far as a plan reads them."""
    return {
        "run": {"dir": "runs/x", "seed": 0},
        "model": {"preset": preset, "tokenizer": "none", "new_speakers": []},
        "optim": {"lr": 1e-4},
        "deepspeed": {"zero_stage": 3, "precision": "bf16"},
        "fit": {"max_steps": 1000, "save_steps": 100},
        "data": {
            "sources": {
                "text": {"path": "none", "weight": 0.5, "max_epochs": None},
                "image": {"path": "none", "weight": 0.5, "max_epochs": None},
            },
            "pack_tokens": 8192,
            "global_batch_packs": 64,
            "budget_tokens": None,
            "num_workers": 2,
            **data,
        },
    }


def planned(recipe: str, values: dict[str, Any], *, devices: int = 64, **options: Any) -> Plan:
    chosen = Options(
        devices=devices, hardware=H100, price=None, mtbf_device_hours=50_000, **options
    )
    return plan_stage(recipe, values, chosen, CONSTANTS, root=Path("nowhere"))


def setup_of(shape: DecoderShape = QWEN_7B, tokens: float = 8192, **changes: Any) -> Setup:
    parameters = shape.matmul_parameters + shape.vocab * shape.width
    load = DecoderLoad(shape=shape, tokens=tokens, pairs=tokens**2, loss_tokens=tokens)
    base = Setup(
        decoders=(load,),
        parameters=parameters,
        trained_parameters=parameters,
        largest_tensor=shape.vocab * shape.width,
        devices=8,
        recompute=Recompute.full,
    )
    return dataclasses.replace(base, **changes)


def test_7b_on_one_node_takes_about_what_the_arithmetic_says() -> None:
    """40 GB at 8k, 49 at 32k, 88 at 128k: the sums behind the choice of SP 1 up to 32k."""
    for tokens, expected in ((8192, 40.0), (32768, 49.0), (131072, 88.0)):
        found = estimate_memory(setup_of(tokens=tokens), CONSTANTS).total / 1e9
        assert found == pytest.approx(expected, rel=0.1), tokens


def test_memory_parts_follow_what_they_are_made_of() -> None:
    base = estimate_memory(setup_of(), CONSTANTS)
    assert estimate_memory(setup_of(devices=16), CONSTANTS).static == base.static / 2
    longer = estimate_memory(setup_of(tokens=16384), CONSTANTS)
    assert longer.kept == 2 * base.kept
    # One tile, as the loss takes it on a device.
    assert longer.logits == base.logits == 10 * TOKEN_CHUNK_SIZE * tile_columns(DEVICE)
    built = estimate_memory(setup_of(fused_loss=False), CONSTANTS)
    assert built.logits == pytest.approx(1.6e6 * 8192, rel=0.01)
    kept = [
        estimate_memory(setup_of(recompute=policy), CONSTANTS).kept
        for policy in (Recompute.full, Recompute.products, Recompute.selective, Recompute.none)
    ]
    assert kept == sorted(kept)
    offloaded = estimate_memory(setup_of(offload_activations=True), CONSTANTS)
    assert offloaded.host == pytest.approx(8 * base.kept)
    assert offloaded.kept < base.kept / 20


def test_frozen_weights_cost_an_eighteenth_and_no_moments() -> None:
    frozen = setup_of(trained_parameters=0)
    assert estimate_memory(frozen, CONSTANTS).static * 9 == pytest.approx(
        estimate_memory(setup_of(), CONSTANTS).static
    )


def test_time_parts_follow_what_they_are_made_of() -> None:
    base = estimate_step(setup_of(), H100, CONSTANTS)
    halves = DecoderLoad(shape=QWEN_7B, tokens=8192, pairs=2 * 4096**2, loss_tokens=8192)
    assert estimate_step(setup_of(decoders=(halves,)), H100, CONSTANTS).attention == pytest.approx(
        base.attention / 2
    )
    assert estimate_step(setup_of(devices=1), H100, CONSTANTS).exposed == 0
    assert estimate_step(setup_of(devices=64), H100, CONSTANTS).gathers > base.gathers
    assert estimate_step(setup_of(micro_steps=3), H100, CONSTANTS).total == pytest.approx(
        3 * base.total
    )
    none = estimate_step(setup_of(recompute=Recompute.none), H100, CONSTANTS)
    assert base.matmul / none.matmul == pytest.approx(1.31, abs=0.005)
    assert none.model_flops == base.model_flops
    slow = estimate_step(setup_of(), H100, CONSTANTS, imbalance=1.5, slowdown=2.0)
    assert slow.total == pytest.approx(3 * base.total)


def test_model_flops_are_those_of_the_definition() -> None:
    flops = estimate_step(setup_of(), H100, CONSTANTS).model_flops
    matmul = 6 * (7_070_285_824) * 8192
    assert flops == pytest.approx(matmul + 6 * 28 * 3584 * 8192**2)


def test_a_frozen_model_that_gradients_pass_through_costs_four_of_six() -> None:
    load = DecoderLoad(
        shape=QWEN_7B, tokens=8192, pairs=0, gradients=True, trained=False, loss_tokens=8192
    )
    none = setup_of(recompute=Recompute.none)
    passed = estimate_step(dataclasses.replace(none, decoders=(load,)), H100, CONSTANTS)
    assert passed.matmul / estimate_step(none, H100, CONSTANTS).matmul == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    ("preset", "llm", "audio", "vision"),
    [
        ("qwen2_5_omni_7b", 7_615_616_512, 0.640e9, 0.677e9),
        ("qwen2_5_omni_3b", 3_397_103_616, 0.638e9, 0.669e9),
    ],
)
def test_parameters_are_those_of_the_release(
    preset: str, llm: int, audio: float, vision: float
) -> None:
    sizes = measure_model("stage2_multimodal", settings(preset), None)
    counts = {group.name: group.parameters for group in sizes.groups}
    assert counts["llm"] + counts["lm_head"] == llm
    assert counts["audio_encoder"] + counts["audio_projection"] == pytest.approx(audio, rel=0.01)
    assert counts["vision_encoder"] + counts["vision_merger"] == pytest.approx(vision, rel=0.01)
    assert sizes.trained_parameters == sizes.parameters - counts["unused"]


def test_the_talker_stage_has_a_frozen_thinker_in_front() -> None:
    values = settings(pack_positions=8192)
    plan = planned("talker_icl", values)
    talker, thinker = plan.setup.decoders
    assert (talker.trained, thinker.gradients) == (True, False)
    assert plan.model.trained_parameters == pytest.approx(1.35e9, rel=0.03)
    assert plan.model.heads == {"thinker": (28, 4), "talker": (12, 4)}


def test_trained_groups_are_the_recipes_own() -> None:
    assert trained_groups("text_lm", {}) == text_lm.TRAINED
    for name, module in (("stage1_audio", stage1_audio), ("stage1_vision", stage1_vision)):
        for phase, groups in module.TRAINED.items():
            assert set(trained_groups(name, {"phase": phase.name})) == set(groups)
    frozen = {"model": {"new_speakers": []}, "thinker": "frozen"}
    assert trained_groups("talker_icl", frozen) == talker_icl.TRAINED
    joint = {"model": {"new_speakers": ["anna"]}, "thinker": "joint"}
    assert set(trained_groups("talker_icl", joint)) == {
        *talker_icl.TRAINED,
        *talker_icl.TRAINED_JOINTLY,
        "speaker_rows",
    }
    named = {"model": {"new_speakers": ["anna"]}}
    assert trained_groups("talker_dpo", named) == talker_dpo.TRAINED
    assert trained_groups("talker_speaker_sft", named) == talker_speaker_sft.TRAINED
    for recipe in ("stage2_multimodal", "stage3_long", "thinker_sft"):
        assert set(trained_groups(recipe, {"lora": {"rank": 0}})) == THINKER_GROUPS
    with pytest.raises(ConfigError, match="adapters"):
        trained_groups("thinker_sft", {"lora": {"rank": 8}})
    with pytest.raises(ConfigError, match="trains no part"):
        trained_groups("speech_codec", {})


def test_a_plan_that_does_not_fit_names_a_knob_that_helps() -> None:
    plan = planned("stage2_multimodal", settings(pack_tokens=32768))
    assert not plan.fits
    assert "activation_checkpointing=" in plan.knob
    assert [f.status for f in plan.findings if f.name == "memory"] == ["fail"]


def test_knobs_are_tried_cheapest_first_and_auto_takes_the_least() -> None:
    model = measure_model("stage2_multimodal", settings(), None)
    room = 80e9

    def fits(setup: Setup) -> bool:
        return estimate_memory(setup, CONSTANTS).total <= room

    none = setup_of(recompute=Recompute.none)
    assert choose_recompute(none, fits).recompute is Recompute.selective
    assert first_knob(none, fits, model) == "deepspeed.activation_checkpointing=selective"
    long = setup_of(tokens=131072)
    assert choose_recompute(long, fits).recompute is Recompute.full
    assert "offload_activations" in first_knob(long, fits, model)
    room = 10e9
    assert "shorter packs" in first_knob(long, fits, model)


def test_findings_name_what_cannot_run() -> None:
    values = settings(global_batch_packs=8)
    values["deepspeed"]["sequence_parallel"] = 8
    plan = planned("stage2_multimodal", values)
    status = {finding.name: finding.status for finding in plan.findings}
    # 28 query heads over 8 ranks; 8 groups of 8 for 8 packs are just enough.
    assert status["sequence parallelism"] == "fail"
    assert status["global batch"] == "pass"
    values["deepspeed"]["sequence_parallel"] = 1
    status = {f.name: f.status for f in planned("stage2_multimodal", values).findings}
    assert status["sequence parallelism"] == "pass"
    assert status["global batch"] == "fail"
    values["deepspeed"]["sequence_parallel"] = 4
    with pytest.raises(ConfigError, match="multiple of 4"):
        planned("stage2_multimodal", values, devices=6)


def test_a_budget_ends_the_run_before_its_steps() -> None:
    whole, cut = planned("stage2_multimodal", settings()), settings(budget_tokens=5_000_000)
    assert whole.totals.steps == 1000
    plan = planned("stage2_multimodal", cut)
    assert plan.totals.steps == math.ceil(5_000_000 / (whole.totals.tokens / 1000))
    assert sum(plan.totals.by_modality.values()) == pytest.approx(plan.totals.tokens)


def test_young_and_daly() -> None:
    found = expect(hours=1000, devices=1000, mtbf_device_hours=50_000, save_s=60, restart_s=300)
    assert found.mtbf_hours == 50
    assert found.interruptions == pytest.approx(20)
    assert found.young_s == pytest.approx(math.sqrt(2 * 60 * 50 * 3600))
    # Daly's optimum for these values lies a little under Young's by what a save takes.
    assert found.daly_s == pytest.approx(found.young_s - 60 + 20.0, rel=0.01)
    # A brute-force search over intervals finds the same optimum of what is lost.
    costs = {seconds: seconds / 2 / 180_000 + 60 / seconds for seconds in range(1000, 12_000, 10)}
    assert min(costs, key=costs.__getitem__) == pytest.approx(found.young_s, rel=0.01)


def test_hardware_of_ones_own(tmp_path: Path) -> None:
    assert {"h100", "h200", "a100", "cpu"} <= set(known_hardware())
    own = tmp_path / "mine.yaml"
    fields = [f.name for f in dataclasses.fields(H100) if f.name != "name"]
    own.write_text("\n".join(f"{name}: 1.0e+9" for name in fields))
    assert load_hardware(str(own)).name == "mine"
    own.write_text("peak_flops: 1.0")
    with pytest.raises(ConfigError, match="matmul_flops"):
        load_hardware(str(own))
    with pytest.raises(ConfigError, match="h100"):
        load_hardware("h1000")
    own.write_text("\n".join(f"{name}: -1" for name in fields))
    with pytest.raises(ConfigError, match="positive"):
        load_hardware(str(own))


def test_what_cuda_holds_is_not_counted_on_a_cpu() -> None:
    # The demo's ranks hold 0.7 to 1.1 GB in all.
    assert load_constants(load_hardware("cpu")).rest_bytes < 1e9
    assert load_constants(H100) == load_constants()
    assert load_constants().rest_bytes > 5e9
