"""Presets have the published sizes and ids, and configs from files are taken field by field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniTalkerForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from omni_train.config.errors import ConfigError
from omni_train.data.tokenizer import train_tokenizer
from omni_train.models.config import ModelConfig, ModelPreset, TinySizes
from omni_train.models.presets import build_config, model_spec, read_config, resolve_config

# Billions of parameters: the 7B's as RECIPE.md section 2 quotes them. The 3B's are derived: the
# text model of Qwen2.5-3B (3.086) and an untied head (151936 x 2048), the 7B's towers with narrower
# last layers, and the layers of Qwen2.5-0.5B (0.358) between the Talker's own tables.
COUNTS = {
    ModelPreset.qwen2_5_omni_7b: {"llm": 7.615, "visual": 0.677, "audio": 0.640, "talker": 1.351},
    ModelPreset.qwen2_5_omni_3b: {"llm": 3.397, "visual": 0.669, "audio": 0.638, "talker": 0.385},
}


def billions(*modules: nn.Module) -> float:
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e9


@pytest.mark.parametrize("preset", COUNTS, ids=lambda preset: preset.name)
def test_released_sizes(preset: ModelPreset) -> None:
    config = build_config(preset)
    with torch.device("meta"):
        thinker = Qwen2_5OmniThinkerForConditionalGeneration(config.thinker_config)
        talker = Qwen2_5OmniTalkerForConditionalGeneration(config.talker_config)
    assert thinker.lm_head.weight is not thinker.model.language_model.embed_tokens.weight
    counted = {
        "llm": billions(thinker.model.language_model, thinker.lm_head),
        "visual": billions(thinker.model.visual),
        "audio": billions(thinker.model.audio_tower),
        "talker": billions(talker),
    }
    assert counted == pytest.approx(COUNTS[preset], abs=7e-4)
    text = config.thinker_config.text_config
    head = text.hidden_size // text.num_attention_heads
    assert 2 * sum(text.rope_parameters["mrope_section"]) == head == 128
    assert config.talker_config.embedding_size == text.hidden_size
    section = config.talker_config.rope_parameters["mrope_section"]
    assert 2 * sum(section) == config.talker_config.head_dim


def test_released_ids() -> None:
    config = build_config(ModelPreset.qwen2_5_omni_7b)
    thinker, talker = config.thinker_config, config.talker_config
    assert (thinker.audio_token_id, thinker.image_token_id, thinker.video_token_id) == (
        151646,
        151655,
        151656,
    )
    assert (thinker.vision_start_token_id, thinker.vision_end_token_id) == (151652, 151653)
    assert (talker.tts_codec_pad_token_id, talker.tts_codec_end_token_id) == (8292, 8294)
    assert thinker.text_config.rope_parameters["rope_theta"] == 1e6


def test_tiny_takes_its_ids_from_the_tokenizer() -> None:
    tokenizer = train_tokenizer(["one two three"], vocab_size=310)
    config = build_config(ModelPreset.tiny, tokenizer, TinySizes(num_codes=64))
    spec = model_spec(config.thinker_config, tokenizer)
    vocab = tokenizer.get_vocab()
    assert config.thinker_config.vision_start_token_id == vocab["<|vision_bos|>"]
    assert config.thinker_config.text_config.vocab_size == len(tokenizer)
    assert spec.tokens.audio == vocab["<|AUDIO|>"] == config.talker_config.audio_token_id
    assert config.talker_config.tts_text_pad_token_id == vocab["<|tts_pad|>"]
    codec = config.talker_config
    controls = {codec.tts_codec_pad_token_id, codec.tts_codec_start_token_id}
    controls |= {codec.tts_codec_end_token_id, codec.tts_codec_mask_token_id}
    assert len(controls) == 4
    assert min(controls) == 64
    assert max(controls) < codec.vocab_size
    assert spec.audio_chunk_frames == 200
    assert spec.positions_per_second == 25
    with torch.device("meta"):
        thinker = Qwen2_5OmniThinkerForConditionalGeneration(config.thinker_config)
    assert sum(p.numel() for p in thinker.parameters()) < 3e6


def test_tokenizer_must_fit() -> None:
    tokenizer = train_tokenizer(["one two three"], vocab_size=310)
    with pytest.raises(ConfigError, match="takes its ids from the tokenizer"):
        build_config(ModelPreset.tiny)
    with pytest.raises(ConfigError, match="audio id is"):
        build_config(ModelPreset.qwen2_5_omni_7b, tokenizer)
    config = build_config(ModelPreset.tiny, tokenizer).thinker_config
    config.text_config.vocab_size = len(tokenizer) - 1
    with pytest.raises(ConfigError, match="do not fit"):
        model_spec(config, tokenizer)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"text_width": 100}, "multiple of 64"), ({"vision_layers": 0}, "at least 1")],
)
def test_tiny_sizes_are_checked(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TinySizes(**sizes)
    with pytest.raises(ConfigError, match="tokenizer directory"):
        ModelConfig(tokenizer="")


@pytest.mark.parametrize("thinker_only", [False, True])
def test_config_of_a_checkpoint_wins(tmp_path: Path, thinker_only: bool) -> None:
    tokenizer = train_tokenizer(["one two three"], vocab_size=310)
    saved = build_config(ModelPreset.tiny, tokenizer, TinySizes(text_layers=5))
    (saved.thinker_config if thinker_only else saved).save_pretrained(tmp_path)
    model = ModelConfig(tokenizer="in memory", init_from=str(tmp_path))
    config = resolve_config(model, tokenizer)
    assert config.thinker_config.text_config.num_hidden_layers == 5
    wanted, got = saved.thinker_config.to_dict(), config.thinker_config.to_dict()
    assert got == wanted


def test_unknown_keys_of_a_config_file_are_dropped(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["one two three"], vocab_size=310)
    build_config(ModelPreset.tiny, tokenizer).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    raw["auto_map"] = {"AutoModel": "evil.Model"}
    raw["thinker_config"]["_attn_implementation"] = "someone/kernel"
    raw["thinker_config"]["text_config"]["attn_implementation"] = "someone/kernel"
    raw["thinker_config"].pop("vision_start_token_id")
    path.write_text(json.dumps(raw))
    config = read_config(path)
    assert not hasattr(config, "auto_map")
    assert config.thinker_config.text_config._attn_implementation != "someone/kernel"
    assert config.thinker_config._attn_implementation != "someone/kernel"
    # Released files lack it; transformers' position code reads it.
    assert config.thinker_config.vision_start_token_id == 151652
    for broken in (
        "{",
        '{"model_type": "bert"}',
        '{"model_type": "qwen2_5_omni", "thinker_config": {}}',
    ):
        path.write_text(broken)
        with pytest.raises(ConfigError, match=r"config\.json of Qwen2\.5-Omni"):
            read_config(path)
