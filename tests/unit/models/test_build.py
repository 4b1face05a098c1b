"""Building: the same values on any order, every layout loads, and what is missing is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from omni_train.config.errors import ConfigError
from omni_train.models.build import build_thinker, format_build_report
from omni_train.models.config import ModelConfig, TinySizes
from omni_train.models.groups import UNUSED, group_of
from omni_train.models.thinker import ThinkerForTraining
from omni_train.models.weights import canonical_name, open_source
from tests.numerics.samples import SMALL, small_tokenizer

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return small_tokenizer()


def build(
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    init_from: str = "",
    init_groups: dict[str, str] | None = None,
    sizes: TinySizes = SMALL,
) -> ThinkerForTraining:
    config = ModelConfig(
        tokenizer="in memory", init_from=init_from, init_groups=init_groups or {}, tiny=sizes
    )
    return build_thinker(config, tokenizer, seed=seed, dtype=dtype)


def weights(model: ThinkerForTraining) -> Tensors:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_equal(got: Tensors, want: Tensors) -> None:
    assert got.keys() == want.keys()
    assert not [name for name in want if not torch.equal(got[name], want[name])]


def new_layout(tensors: Tensors) -> Tensors:
    return dict(tensors)


def old_layout(tensors: Tensors) -> Tensors:
    """As transformers wrote it before 5.23."""
    return {
        name.replace("thinker.model.language_model.", "thinker.model.")
        .replace("thinker.model.audio_tower.", "thinker.audio_tower.")
        .replace("thinker.model.visual.", "thinker.visual."): value
        for name, value in tensors.items()
    }


def thinker_only(layout: Callable[[Tensors], Tensors]) -> Callable[[Tensors], Tensors]:
    def rename(tensors: Tensors) -> Tensors:
        return {n.removeprefix("thinker."): value for n, value in layout(tensors).items()}

    return rename


def test_fresh_values_depend_on_seed_and_name_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights(build(tokenizer))
    assert torch.equal(torch.get_rng_state(), before), "building moved the global generator"
    torch.rand(7)
    assert_equal(weights(build(tokenizer)), first)
    other = weights(build(tokenizer, seed=1))
    matrices = [name for name in first if first[name].ndim > 1]
    assert not [name for name in matrices if torch.equal(first[name], other[name])]
    # A deeper model has the same values where it has the same names.
    deeper = weights(build(tokenizer, sizes=TinySizes(**_sizes(text_layers=4))))
    assert not [name for name in first if not torch.equal(first[name], deeper[name])]
    assert len(deeper) > len(first)
    q = [n for n in matrices if "language_model" in n and "q_proj" in n]
    assert not torch.equal(first[q[0]], first[q[1]])


def _sizes(**changes: int) -> dict[str, int]:
    return {name: getattr(SMALL, name) for name in SMALL.__slots__} | changes


def test_values_and_buffers_are_those_of_transformers(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build(tokenizer)
    plain = Qwen2_5OmniThinkerForConditionalGeneration(model.thinker.config)
    theirs = dict(plain.named_parameters())
    for name, param in model.thinker.named_parameters():
        other = theirs[name]
        assert param.shape == other.shape
        assert param.device.type == "cpu"
        if param.numel() >= 4096:
            assert abs(param.std() - other.std()) < 0.15 * other.std() + 1e-6, name
        elif param.ndim == 1:
            assert torch.equal(param, other), name
    buffers = dict(model.thinker.named_buffers())
    assert buffers
    assert buffers.keys() == dict(plain.named_buffers()).keys()
    for name, buffer in plain.named_buffers():
        assert buffers[name].dtype == torch.float32
        assert torch.equal(buffers[name], buffer), name
    assert not [p for p in model.parameters() if p.is_meta]


def test_bf16_is_fp32_rounded_and_keeps_buffers(tokenizer: PreTrainedTokenizerFast) -> None:
    full, half = weights(build(tokenizer)), build(tokenizer, dtype=torch.bfloat16)
    assert_equal(weights(half), {name: value.bfloat16() for name, value in full.items()})
    assert all(buffer.dtype == torch.float32 for buffer in half.buffers())


@pytest.mark.parametrize(
    "layout",
    [new_layout, old_layout, thinker_only(new_layout), thinker_only(old_layout)],
    ids=["new", "old", "new-thinker", "old-thinker"],
)
def test_layouts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, layout: Callable[[Tensors], Tensors]
) -> None:
    want = weights(build(tokenizer, seed=9))
    stored = layout(want) | {"talker.codec_head.weight": torch.zeros(2, 2)}
    save_file(stored, tmp_path / "model.safetensors")
    model = build(tokenizer, init_from=str(tmp_path))
    assert_equal(weights(model), want)
    assert not model.report.initialised
    assert model.report.unused == {str(tmp_path): ["talker.codec_head.weight"]}
    text = format_build_report(model.report)
    assert f"loaded from {tmp_path}" in text
    assert "1 tensors of talker" in text


def test_what_transformers_saves_can_be_loaded(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Sharded, with transformers' own index and config."""
    plain = Qwen2_5OmniThinkerForConditionalGeneration(build(tokenizer).thinker.config)
    plain.save_pretrained(tmp_path, max_shard_size="300KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    # Other sizes on purpose: the checkpoint's config.json decides.
    model = build(tokenizer, init_from=str(tmp_path), sizes=TinySizes())
    assert_equal(weights(model), {f"thinker.{n}": p for n, p in plain.named_parameters()})


def test_missing_tensors_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    stored = weights(build(tokenizer))
    lost = "thinker.model.visual.merger.mlp.2.bias"
    del stored[lost]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=re.escape(lost)):
        build(tokenizer, init_from=str(tmp_path))


def test_the_unused_token_may_be_missing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    stored = weights(build(tokenizer))
    unused = [name for name in stored if group_of(name) == UNUSED]
    save_file({n: v for n, v in stored.items() if n not in unused}, tmp_path / "model.safetensors")
    model = build(tokenizer, init_from=str(tmp_path))
    assert model.report.initialised == unused
    assert len(unused) == 1
    assert f"not in any source: {unused[0]}" in format_build_report(model.report)


def test_a_wrong_shape_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    stored = weights(build(tokenizer))
    save_file(stored, tmp_path / "model.safetensors")
    wide = TinySizes(**_sizes(vision_width=128))
    with pytest.raises(ConfigError, match=r"visual\.\S+ is \(64, .* the model needs \(128, "):
        build(tokenizer, init_from=str(tmp_path), sizes=wide)


def test_groups_from_another_place(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    base, other = weights(build(tokenizer, seed=1)), weights(build(tokenizer, seed=2))
    for name, tensors in (("base", base), ("other", other)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    groups = {"vision_encoder": str(tmp_path / "other"), "vision_merger": str(tmp_path / "other")}
    model = build(tokenizer, init_from=str(tmp_path / "base"), init_groups=groups)
    mixed = {n: (other if group_of(n) in groups else base)[n] for n in base}
    assert_equal(weights(model), mixed)
    fresh = build(tokenizer, seed=3, init_groups=groups)
    assert set(fresh.report.loaded) == {n for n in base if group_of(n) in groups}
    with pytest.raises(ConfigError, match=r"init_groups\.vision"):
        build(tokenizer, init_groups={"vision": str(tmp_path / "base")})


def test_unusable_directories(tmp_path: Path) -> None:
    def refuse(path: Path, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            open_source(str(path))

    refuse(tmp_path / "nowhere", "no such directory")
    refuse(tmp_path, "no safetensors file")
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    refuse(tmp_path, "cannot be read")
    save_file({"lm_head.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for weight_map in ({"lm_head.weight": "../model.safetensors"}, {"a": "other.safetensors"}):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refuse(tmp_path, "which is not there")
    index.write_text("[]")
    refuse(tmp_path, "cannot be read")
    index.unlink()
    doubled = {"thinker.lm_head.weight": torch.zeros(2), "lm_head.weight": torch.zeros(2)}
    save_file(doubled, tmp_path / "model.safetensors")
    refuse(tmp_path, "the same tensor")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    refuse(tmp_path / "run", "no checkpoint yet")


def test_canonical_names() -> None:
    pairs = {
        "thinker.model.layers.0.mlp.up_proj.weight": "language_model.layers.0.mlp.up_proj.weight",
        "model.embed_tokens.weight": "language_model.embed_tokens.weight",
        "visual.blocks.0.norm1.weight": "visual.blocks.0.norm1.weight",
        "model.audio_tower.ln_post.bias": "audio_tower.ln_post.bias",
    }
    for stored, name in pairs.items():
        assert canonical_name(stored) == f"thinker.model.{name}"
        assert canonical_name(canonical_name(stored)) == f"thinker.model.{name}"
    assert canonical_name("lm_head.weight") == "thinker.lm_head.weight"
    assert canonical_name("talker.model.layers.0.weight") == "talker.model.layers.0.weight"


def test_saved_names_are_the_models_own(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build(tokenizer)
    save_file(weights(model), tmp_path / "model.safetensors")
    assert set(load_file(tmp_path / "model.safetensors")) == open_source(str(tmp_path)).names()
