"""The Talker is built from a preset, from a released checkpoint, or afresh beside a Thinker."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from omni_train.config.errors import ConfigError
from omni_train.data.tokenizer import SPEAKER_TOKENS
from omni_train.engine.deepspeed import DeepSpeedConfig, Precision
from omni_train.engine.optim import OptimConfig
from omni_train.models.build import (
    build_omni_for_training,
    build_talker,
    build_talker_replica,
    build_thinker,
    format_build_report,
)
from omni_train.models.config import ModelConfig, ModelPreset, TinySizes
from omni_train.models.groups import select_groups
from omni_train.models.presets import RELEASED_SPEAKERS, build_config
from omni_train.models.talker import TalkerForTraining
from omni_train.models.talker_spec import released_talker_spec, talker_spec
from omni_train.models.weights import TEXT_TABLE, canonical_name
from tests.numerics.samples import small_tokenizer
from tests.numerics.talker_models import SIZES, Models, make_models

TALKER = {"talker", "talker_projection", "codec_head", "text_rows"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return small_tokenizer()


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Models]:
    folder = tmp_path_factory.mktemp("omni")
    return folder, make_models(folder)


def build(
    tokenizer: PreTrainedTokenizerFast, *, fresh: bool = False, **config: object
) -> TalkerForTraining:
    model = ModelConfig(tokenizer="in memory", **{"tiny": SIZES, **config})  # type: ignore[arg-type]
    return build_talker(model, tokenizer, seed=0, dtype=torch.float32, fresh=fresh)


def test_the_demo_talker_has_the_demo_s_size(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build(tokenizer, tiny=TinySizes())
    core = {n: p for n, p in model.named_parameters() if "rows" not in n}
    assert 1.5e6 < sum(p.numel() for p in core.values()) < 2.2e6
    spec, vocab = model.talker.spec, tokenizer.get_vocab()
    assert spec.num_codes == spec.codec_pad == 128
    assert spec.row_ids == (
        vocab["<|tts_text_eos|>"],
        vocab["<|tts_pad|>"],
        *(vocab[token] for token in SPEAKER_TOKENS),
    )
    groups = select_groups(model, OptimConfig(), trained=TALKER)
    assert {group.name for group in groups} == TALKER
    assert sum(g.num_parameters for g in groups) == sum(p.numel() for p in model.parameters())


def test_the_released_presets(tokenizer: PreTrainedTokenizerFast) -> None:
    """Ids of the release; a stand-in tokenizer lends only its vocabulary of names."""
    names = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    names.get_vocab = dict  # type: ignore[method-assign]
    config = build_config(ModelPreset.qwen2_5_omni_7b)
    spec = talker_spec(config, ModelConfig(tokenizer="in memory"), names)
    assert spec.row_ids == (151861, 151859, 151870, 151872)
    assert spec.speakers == RELEASED_SPEAKERS
    assert (spec.num_codes, spec.vocab_size) == (8192, 8448)
    assert spec.stop_ids == (8292, 8294)
    assert {8192, 8293, 8296, 8447} < set(spec.suppressed_ids)
    assert released_talker_spec(config) == spec


def test_from_a_released_checkpoint(released: tuple[Path, Models]) -> None:
    folder, models = released
    talker, theirs = models.talker, models.upstream.state_dict()
    for name, param in talker.named_parameters():
        if name != "text_rows.weight":
            assert torch.equal(param, theirs[f"talker.{name}"]), name
    assert torch.equal(talker.text_rows.weight, theirs[TEXT_TABLE][list(talker.spec.row_ids)])
    # Sizes come from the checkpoint's config.json, not from the default preset's.
    assert talker.config.hidden_size == 128 != TinySizes().talker_width
    report = build(models.tokenizer, init_from=str(folder)).report
    assert not report.initialised
    assert f"loaded from {folder}" in format_build_report(report)


def test_a_missing_tensor_stops_unless_the_talker_starts_afresh(
    released: tuple[Path, Models], tmp_path: Path
) -> None:
    folder, models = released
    files = load_file(folder / "model.safetensors")
    stored = {canonical_name(name): value for name, value in files.items()}
    table = stored[TEXT_TABLE].clone()
    kept = {name: value for name, value in stored.items() if name.startswith("thinker.")}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="expected tensors are missing: talker"):
        build(models.tokenizer, init_from=str(tmp_path))
    model = build(models.tokenizer, init_from=str(tmp_path), fresh=True)
    assert list(model.report.loaded) == ["talker.text_rows.weight"]
    rows = model.talker.text_rows.weight
    assert torch.equal(rows, table[list(model.talker.spec.row_ids)])
    again = build(models.tokenizer, init_from=str(tmp_path), fresh=True)
    assert torch.equal(again.talker.codec_head.weight, model.talker.codec_head.weight)
    del kept[TEXT_TABLE]
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"talker\.text_rows"):
        build(models.tokenizer, init_from=str(tmp_path), fresh=True)


def test_a_new_speaker_begins_as_the_mean_of_the_old(released: tuple[Path, Models]) -> None:
    folder, models = released
    voices = {"a": SPEAKER_TOKENS[0], "b": SPEAKER_TOKENS[2], "new": SPEAKER_TOKENS[3]}
    model = build(models.tokenizer, init_from=str(folder), speakers=voices, new_speakers=["new"])
    talker, vocab = model.talker, models.tokenizer.get_vocab()
    table = models.upstream.thinker.get_input_embeddings().weight
    old = table[[vocab[voices["a"]], vocab[voices["b"]]]].mean(0)
    torch.testing.assert_close(talker.speaker_rows.weight[0], old)
    torch.testing.assert_close(talker.rows()[talker.spec.speaker_row("new")], old)
    assert torch.equal(talker.rows()[talker.spec.speaker_row("b")], table[vocab[voices["b"]]])
    groups = select_groups(model, OptimConfig(), trained=("speaker_rows",))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == ["talker.speaker_rows.weight"]
    assert {group.name for group in groups} == TALKER | {"speaker_rows"}


def test_speakers_are_checked(released: tuple[Path, Models]) -> None:
    folder, models = released
    with pytest.raises(ConfigError, match=r"model\.speakers\.x"):
        build(models.tokenizer, init_from=str(folder), speakers={"x": "<|nobody|>"})
    with pytest.raises(ConfigError, match=r"model\.new_speakers"):
        ModelConfig(tokenizer="in memory", new_speakers=["x"])


def test_widths_must_go_together(tokenizer: PreTrainedTokenizerFast) -> None:
    config = build_config(ModelPreset.tiny, tokenizer, SIZES)
    config.talker_config.embedding_size = 128
    with pytest.raises(ConfigError, match="reads states of 128"):
        talker_spec(config, ModelConfig(tokenizer="in memory"), tokenizer)


def test_both_parts_under_one_roof(released: tuple[Path, Models]) -> None:
    """`init_groups` of either part is accepted, an unknown one is not."""
    folder, models = released
    settings = DeepSpeedConfig(zero_stage=1, precision=Precision.fp32)
    config = ModelConfig(
        tokenizer="in memory",
        init_from=str(folder),
        init_groups={"llm": str(folder), "codec_head": str(folder)},
    )
    model = build_omni_for_training(
        config, models.tokenizer, settings, seed=0, joint=False, fresh_talker=True
    )
    fresh = {name for name in model.report.initialised if name.startswith("talker.")}
    assert "talker.codec_head.weight" in model.report.loaded
    assert "talker.thinker_to_talker_proj.weight" in fresh
    groups = select_groups(model, OptimConfig(), trained=TALKER)
    assert {g.name for g in groups if g.trainable} == TALKER
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.startswith("thinker."))
    config.init_groups["codec"] = str(folder)
    with pytest.raises(ConfigError, match=r"init_groups\.codec"):
        build_omni_for_training(
            config, models.tokenizer, settings, seed=0, joint=False, fresh_talker=True
        )


def test_a_thinker_alone_takes_the_preset_s_talker(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = ModelConfig(tokenizer="in memory", tiny=SIZES)
    thinker = build_thinker(config, tokenizer, seed=4, dtype=torch.float32)
    thinker.thinker.save_pretrained(tmp_path)
    model = build(tokenizer, init_from=str(tmp_path), fresh=True)
    assert model.talker.config.hidden_size == SIZES.talker_width
    table = thinker.thinker.get_input_embeddings().weight
    assert torch.equal(model.talker.text_rows.weight, table[list(model.talker.spec.row_ids)])


def test_replica(released: tuple[Path, Models]) -> None:
    folder, models = released
    config = ModelConfig(tokenizer="in memory", init_from=str(folder))
    replica = build_talker_replica(config, models.tokenizer, Precision.bf16, torch.device("cpu"))
    assert replica.codec_head.weight.dtype == torch.bfloat16
    assert not replica.training
    assert not any(p.requires_grad for p in replica.parameters())
