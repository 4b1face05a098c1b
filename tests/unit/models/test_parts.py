"""A Thinker of a Qwen2.5 LLM, a Qwen2.5-VL tower and a Whisper encoder as transformers saves them.

Each part of the assembled model computes what transformers' own model of that part computes.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from omni_train.config.errors import ConfigError
from omni_train.data.tokenizer import CHAT_TOKENS, rename_tokens, special_tokens
from omni_train.data.visibility import Segments
from omni_train.models.attention import packed_hidden
from omni_train.models.build import build_thinker, format_build_report
from omni_train.models.config import ModelConfig, ModelParts
from omni_train.models.groups import group_of
from omni_train.models.thinker import ThinkerForTraining
from tests.numerics.samples import SMALL, small_tokenizer

WIDTH = 64
TOLERANCE = 1e-5


@dataclass
class Saved:
    """transformers' own models of the three families, and where they were saved."""

    parts: ModelParts
    tied: Path
    llm: Qwen2ForCausalLM
    vision: Qwen2_5_VLForConditionalGeneration
    whisper: WhisperForConditionalGeneration


def jitter(model: nn.Module) -> Any:
    """Weights at which norms and biases matter too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "encoder.embed_positions" in name:
                # Sinusoids, which nobody trains.
                continue
            param.add_(0.05 * torch.randn(param.shape, generator=generator))
    return model.eval()


def text_sizes(rows: int, *, width: int = WIDTH) -> dict[str, Any]:
    return {
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    }


def vl_model(rows: int, *, width: int = WIDTH) -> Qwen2_5_VLForConditionalGeneration:
    text = text_sizes(rows, width=width)
    text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [4, 6, 6]}
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    vision |= {"out_hidden_size": width, "fullatt_block_indexes": [1]}
    return jitter(
        Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    )


def whisper_config() -> WhisperConfig:
    sizes = {"vocab_size": 50, "d_model": 32, "num_mel_bins": 128, "decoder_layers": 1}
    sizes |= {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    sizes |= {"decoder_attention_heads": 2, "decoder_ffn_dim": 64}
    # One chunk of ours, the most that both see alike.
    sizes |= {"max_source_positions": 100}
    ids = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    return WhisperConfig(**sizes, **dict.fromkeys(ids, 0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    root = tmp_path_factory.mktemp("parts")
    # More rows than ids, as in the release.
    rows = len(small_tokenizer()) + 10
    llm = jitter(Qwen2ForCausalLM(Qwen2Config(**text_sizes(rows), tie_word_embeddings=False)))
    tied = jitter(Qwen2ForCausalLM(Qwen2Config(**text_sizes(rows), tie_word_embeddings=True)))
    vision = vl_model(rows)
    whisper = jitter(WhisperForConditionalGeneration(whisper_config()))
    models = {"llm": llm, "vision": vision, "audio": whisper}
    for name, model in {**models, "tied": tied}.items():
        model.save_pretrained(root / name)
    parts = ModelParts(**{name: str(root / name) for name in models})
    return Saved(parts, root / "tied", llm, vision, whisper)


def assemble(parts: ModelParts, seed: int = 0) -> ThinkerForTraining:
    config = ModelConfig(tokenizer="in memory", tiny=SMALL, parts=parts)
    return build_thinker(config, small_tokenizer(), seed=seed, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(saved: Saved) -> ThinkerForTraining:
    return assemble(saved.parts)


def test_every_tensor_is_accounted_for(saved: Saved, model: ThinkerForTraining) -> None:
    origins = model.report.origins()
    assert set(origins) == {name for name, _ in model.named_parameters()}
    new = {name for name, how in origins.items() if how == "new"}
    assert {group_of(name) for name in new} == {"audio_projection", "unused"}
    converted = {name: how for name, how in origins.items() if how.startswith("converted")}
    # Three blocks with weight and bias of q, k and v; weight and bias of the norm.
    assert sum("qkv" in how for how in converted.values()) == 18
    assert sum("layer norm" in how for how in converted.values()) == 2
    assert len(converted) == 20
    # What of the files is not in the Thinker: the VL's own LLM, Whisper's decoder and positions.
    unused = model.report.unused
    assert unused[saved.parts.llm] == []
    assert all(not name.startswith("visual.") for name in unused[saved.parts.vision])
    assert "model.encoder.embed_positions.weight" in unused[saved.parts.audio]
    assert all("decoder" in name or "embed_positions" in name for name in unused[saved.parts.audio])
    text = format_build_report(model.report)
    assert "split from qkv" in text
    assert "starts afresh: audio_projection" in text
    for name in new:
        assert f"not in any source: {name}" in text


def test_the_language_model_computes_the_same(saved: Saved, model: ThinkerForTraining) -> None:
    ids = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = saved.llm(input_ids=ids).logits
        embeds = model.thinker.model.language_model.embed_tokens(ids)
        positions = torch.arange(40).expand(4, 1, 40)
        hidden = packed_hidden(
            model.thinker.model.language_model, embeds, positions, Segments([40])
        )
        got = model.thinker.lm_head(hidden)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)
    assert model.thinker.config.text_config.rope_parameters["rope_theta"] == 5e5


def test_the_vision_tower_computes_the_same(saved: Saved, model: ThinkerForTraining) -> None:
    grid = torch.tensor([[1, 4, 6], [3, 2, 4]])
    count = int(grid.prod(dim=1).sum())
    patches = torch.randn(count, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = saved.vision.model.visual(patches, grid_thw=grid).pooler_output
        got = model.thinker.model.visual(patches, grid_thw=grid).pooler_output
    assert want.std() > 0.05
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)


def test_the_audio_tower_computes_whisper_up_to_its_pooling(
    saved: Saved, model: ThinkerForTraining
) -> None:
    """Omni takes the mean of neighbours before the final norm; up to there both are the same."""
    mel = torch.randn(128, 200, generator=torch.Generator().manual_seed(4))
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    ours, theirs = model.thinker.model.audio_tower, saved.whisper.model.encoder
    hooks = [m.register_forward_pre_hook(keep) for m in (theirs.layer_norm, ours.ln_post)]
    try:
        with torch.no_grad():
            theirs(mel[None])
            ours(mel, feature_lens=torch.tensor([200]))
    finally:
        for hook in hooks:
            hook.remove()
    want, got = seen
    assert want.std() > 0.1
    want = want.reshape(-1, 2, want.shape[-1]).mean(dim=1)
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(ours.ln_post.weight, theirs.layer_norm.weight)
    torch.testing.assert_close(ours.ln_post.bias, theirs.layer_norm.bias)


def test_a_tied_embedding_is_copied_into_the_head(saved: Saved) -> None:
    assert "lm_head.weight" not in load_file(saved.tied / "model.safetensors")
    built = assemble(replace(saved.parts, llm=str(saved.tied)))
    table = built.thinker.model.language_model.embed_tokens.weight
    head = built.thinker.lm_head.weight
    assert torch.equal(head, table)
    assert head.data_ptr() != table.data_ptr(), "the head is untied"
    assert built.report.converted["thinker.lm_head.weight"] == "copied from the tied embedding"


def test_a_merger_of_another_width_and_absent_parts_start_afresh(
    saved: Saved, tmp_path: Path
) -> None:
    vl_model(60, width=32).save_pretrained(tmp_path)
    built = assemble(replace(saved.parts, vision=str(tmp_path), audio=""))
    new = {group_of(name) for name, how in built.report.origins().items() if how == "new"}
    assert new == {"audio_encoder", "audio_projection", "vision_merger", "unused"}
    text = format_build_report(built.report)
    assert "vision_merger: its embeddings are 32 wide, the LLM's 64" in text
    assert "audio_encoder: model.parts.audio is not given" in text


def test_an_unexpected_gap_stops(saved: Saved, tmp_path: Path) -> None:
    lost = {
        "llm": "model.layers.1.mlp.up_proj.weight",
        "vision": "visual.blocks.2.attn.qkv.bias",
        "audio": "model.encoder.layers.1.fc2.weight",
    }
    for part, name in lost.items():
        source, folder = Path(getattr(saved.parts, part)), tmp_path / part
        folder.mkdir()
        tensors = load_file(source / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())
        inner = name.removeprefix("model.").removeprefix("encoder.").replace("qkv", "q")
        with pytest.raises(ConfigError, match=re.escape(inner)):
            assemble(replace(saved.parts, **{part: str(folder)}))


def test_an_untied_model_without_a_head_stops(saved: Saved, tmp_path: Path) -> None:
    config = json.loads((saved.tied / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(saved.tied / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="lm_head"):
        assemble(replace(saved.parts, llm=str(tmp_path)))


def test_a_directory_of_another_family_is_refused(saved: Saved) -> None:
    with pytest.raises(ConfigError, match="model_type 'whisper', not 'qwen2'"):
        assemble(replace(saved.parts, llm=saved.parts.audio))
    with pytest.raises(ConfigError, match="around a language model"):
        ModelConfig(tokenizer="t", parts=ModelParts(vision="somewhere"))
    with pytest.raises(ConfigError, match="instead of init_from"):
        ModelConfig(tokenizer="t", init_from="run", parts=ModelParts(llm="somewhere"))


def test_a_second_precision_beside_the_weights_is_left_alone(saved: Saved, tmp_path: Path) -> None:
    """As in whisper-large-v3's directory."""
    source = Path(saved.parts.audio)
    tensors = load_file(source / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "model.fp32-00001-of-00001.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    built = assemble(replace(saved.parts, audio=str(tmp_path)))
    assert built.report.loaded["thinker.model.audio_tower.conv1.weight"] == str(tmp_path)


def qwen_like() -> PreTrainedTokenizerFast:
    """The small tokenizer under the names that Qwen2.5 has at the same ids."""
    core = json.loads(small_tokenizer().backend_tokenizer.to_str())
    names = {CHAT_TOKENS["audio"]: "<|object_ref_start|>", CHAT_TOKENS["image"]: "<|image_pad|>"}
    for entry in core["added_tokens"]:
        entry["content"] = names.get(entry["content"], entry["content"])
    tokenizer = small_tokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(core))
    )


def test_a_tokenizer_is_renamed_by_id() -> None:
    released, qwen = small_tokenizer(), qwen_like()
    with pytest.raises(ConfigError, match="special tokens are missing"):
        special_tokens(qwen)
    tokens = special_tokens(released)
    renamed = rename_tokens(qwen, tokens)
    assert special_tokens(renamed) == tokens
    assert renamed.get_vocab() == released.get_vocab()
    assert renamed("which word")["input_ids"] == released("which word")["input_ids"]
    assert rename_tokens(renamed, tokens).get_vocab() == released.get_vocab()


def test_a_tokenizer_of_another_kind_is_not_renamed() -> None:
    tokens = special_tokens(small_tokenizer())
    with pytest.raises(ConfigError, match="no special token"):
        rename_tokens(qwen_like(), replace(tokens, audio=5))
    with pytest.raises(ConfigError, match="stands at"):
        rename_tokens(qwen_like(), replace(tokens, video=tokens.audio))
