"""Presets: transformers configs of Qwen2.5-Omni built in code, and what data workers must know.

The numbers of the released models are those of RECIPE.md sections 2 and 3; the class defaults of
transformers are other sizes, so every value is written out here. Nothing here holds weights.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import (
    Qwen2_5OmniConfig,
    Qwen2_5OmniTalkerConfig,
    Qwen2_5OmniThinkerConfig,
)
from transformers.utils import logging as transformers_logging

from omni_train.config.errors import ConfigError
from omni_train.data.tokenizer import TTS_TOKENS, special_tokens
from omni_train.data.types import ModelSpec, SpecialTokens
from omni_train.models.config import TINY_HEAD_DIM, ModelConfig, ModelPreset, TinySizes
from omni_train.models.parts import use_part_sizes

# Qwen2.5-Omni's rotary base and the split of half a head over time, height and width.
ROPE = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]}
TINY_ROPE = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [4, 6, 6]}
MAX_POSITIONS = 32768

RELEASED_TOKENS = SpecialTokens(
    im_start=151644,
    im_end=151645,
    audio=151646,
    audio_bos=151647,
    audio_eos=151648,
    vision_bos=151652,
    vision_eos=151653,
    image=151655,
    video=151656,
)
# Text ids the Talker reads from the Thinker's table, and codec ids of its own table.
RELEASED_TTS = {
    "tts_text_pad_token_id": 151859,
    "tts_text_start_token_id": 151860,
    "tts_text_end_token_id": 151861,
}
RELEASED_SPEAKERS = {"Ethan": 151870, "Chelsie": 151872}
RELEASED_CODEC = {
    "vocab_size": 8448,
    "tts_codec_pad_token_id": 8292,
    "tts_codec_start_token_id": 8293,
    "tts_codec_end_token_id": 8294,
    "tts_codec_mask_token_id": 8296,
}
RELEASED_TEXT = {
    ModelPreset.qwen2_5_omni_7b: {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    ModelPreset.qwen2_5_omni_3b: {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
    },
}
RELEASED_TALKER = {
    ModelPreset.qwen2_5_omni_7b: {
        "hidden_size": 896,
        "intermediate_size": 18944,
        "num_hidden_layers": 24,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "rope_parameters": ROPE,
    },
    # Not verified against a release; heads of 64 take half of the 7B's mrope_section.
    ModelPreset.qwen2_5_omni_3b: {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rope_parameters": {**ROPE, "mrope_section": [8, 12, 12]},
    },
}


def build_config(
    preset: ModelPreset,
    tokenizer: PreTrainedTokenizerFast | None = None,
    sizes: TinySizes | None = None,
) -> Qwen2_5OmniConfig:
    """Return the whole config (Thinker, Talker, Token2Wav) of a preset.

    Args:
        preset: which sizes.
        tokenizer: needed by `tiny`, whose ids and vocabulary come from it by token name; a
            released preset only checks that the tokenizer has the release's ids.
        sizes: of `tiny`; its defaults where left out.

    Raises:
        ConfigError: `tiny` without tokenizer, or a tokenizer with other ids than the release.
    """
    if preset is ModelPreset.tiny:
        if tokenizer is None:
            raise ConfigError(
                key="model.tokenizer",
                value="",
                rule="the tiny preset takes its ids from the tokenizer",
                remedy="give the directory of a saved tokenizer",
            )
        return _tiny_config(tokenizer, sizes or TinySizes())
    config = _released_config(preset)
    if tokenizer is not None:
        model_spec(config.thinker_config, tokenizer)
    return config


def resolve_config(model: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5OmniConfig:
    """Return the config of `model`: the `config.json` beside its weights, or else the preset's.

    With parts, the preset's with their sizes.

    Raises:
        ConfigError: the file cannot be read, or does not go with the tokenizer.
    """
    path = Path(model.init_from) / "config.json" if model.init_from else None
    if path is None or not path.is_file():
        config = build_config(model.preset, tokenizer, model.tiny)
        use_part_sizes(config.thinker_config, model.parts)
    else:
        config = read_config(path)
        model_spec(config.thinker_config, tokenizer)
    if model.rope_theta is not None:
        text = config.thinker_config.text_config
        text.rope_parameters = {**text.rope_parameters, "rope_theta": model.rope_theta}
    return config


def resolve_speech_config(
    model: ModelConfig, tokenizer: PreTrainedTokenizerFast
) -> Qwen2_5OmniConfig:
    """Return the same with a Talker in any case: the preset's beside a config of a Thinker alone.

    Raises:
        ConfigError: as `resolve_config`.
    """
    config = resolve_config(model, tokenizer)
    if not config.enable_audio_output:
        config.talker_config = build_config(model.preset, tokenizer, model.tiny).talker_config
        config.enable_audio_output = True
    return config


def read_config(path: Path) -> Qwen2_5OmniConfig:
    """Read a `config.json` of the whole model or of the Thinker alone; unknown keys are dropped.

    A config is input: only the fields that transformers' classes declare are taken over, so that
    no key of the file can name code, an attention kernel or another repository.
    """
    try:
        raw = json.loads(path.read_text())
        kind = raw.get("model_type")
        if kind == Qwen2_5OmniThinkerConfig.model_type:
            raw = {"thinker_config": raw}
        elif kind != Qwen2_5OmniConfig.model_type:
            raise ValueError(f"model_type is {kind!r}")
        for part in ("text_config", "audio_config", "vision_config"):
            # A part that is left out would silently get the class defaults, another model's sizes.
            if not isinstance(raw["thinker_config"].get(part), dict):
                raise ValueError(f"thinker_config.{part} is missing")
        if not isinstance(raw.get("talker_config"), dict):
            raw["enable_audio_output"] = False
        config: Qwen2_5OmniConfig = _known_fields(Qwen2_5OmniConfig, raw)
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        StrictDataclassError,
    ) as error:
        raise ConfigError(
            key="model.init_from",
            value=str(path),
            rule=f"a config.json of Qwen2.5-Omni or of its Thinker is needed ({error})",
            remedy="give a directory saved by transformers, or our own checkpoint",
        ) from error
    _complete(config.thinker_config)
    notes = raw.get("omni_train")
    if isinstance(notes, dict) and notes.get("talker") is True:
        # An export whose codec is not Token2Wav: transformers must leave its Talker alone.
        config.enable_audio_output = True
    return config


def model_spec(
    thinker_config: Qwen2_5OmniThinkerConfig, tokenizer: PreTrainedTokenizerFast
) -> ModelSpec:
    """Return what the data workers need.

    Raises:
        ConfigError: model and tokenizer disagree on a special id, or the tokenizer has more ids
            than the model has rows.
    """
    tokens = special_tokens(tokenizer)
    for name, mine in _media_ids(thinker_config).items():
        if mine != getattr(tokens, name):
            raise ConfigError(
                key="model.tokenizer",
                value=tokenizer.name_or_path,
                rule=f"its {name} id is {getattr(tokens, name)}, the model's is {mine}",
                remedy="use the tokenizer that the model was made with",
            )
    rows = thinker_config.text_config.vocab_size
    if len(tokenizer) > rows:
        raise ConfigError(
            key="model.tokenizer",
            value=tokenizer.name_or_path,
            rule=f"its {len(tokenizer)} ids do not fit the model's {rows} rows",
            remedy="use the tokenizer that the model was made with",
        )
    vision, audio = thinker_config.vision_config, thinker_config.audio_config
    return ModelSpec(
        tokens=tokens,
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        window_size=vision.window_size,
        num_mel_bins=audio.num_mel_bins,
        audio_chunk_frames=2 * audio.n_window,
        positions_per_second=thinker_config.position_id_per_seconds,
        seconds_per_chunk=thinker_config.seconds_per_chunk,
    )


def _media_ids(config: Qwen2_5OmniThinkerConfig) -> dict[str, int]:
    return {
        "audio": config.audio_token_id,
        "audio_bos": config.audio_start_token_id,
        "audio_eos": config.audio_end_token_id,
        "vision_bos": config.vision_start_token_id,
        "vision_eos": config.vision_end_token_id,
        "image": config.image_token_id,
        "video": config.video_token_id,
    }


def _id_fields(tokens: SpecialTokens) -> dict[str, int]:
    """The media ids under the names that both the Thinker's and the Talker's config use."""
    return {
        "audio_token_index": tokens.audio,
        "image_token_index": tokens.image,
        "video_token_index": tokens.video,
        "audio_start_token_id": tokens.audio_bos,
        "audio_end_token_id": tokens.audio_eos,
        "vision_start_token_id": tokens.vision_bos,
        "vision_end_token_id": tokens.vision_eos,
    }


def _released_config(preset: ModelPreset) -> Qwen2_5OmniConfig:
    text = RELEASED_TEXT[preset]
    width = text["hidden_size"]
    thinker = Qwen2_5OmniThinkerConfig(
        text_config={
            **text,
            "rope_parameters": ROPE,
            "max_position_embeddings": MAX_POSITIONS,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        },
        audio_config={
            "num_mel_bins": 128,
            "encoder_layers": 32,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "d_model": 1280,
            "n_window": 100,
            "max_source_positions": 1500,
            "output_dim": width,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "out_hidden_size": width,
        },
        tie_word_embeddings=False,
        **_id_fields(RELEASED_TOKENS),
    )
    talker = _talker_config(
        **RELEASED_TALKER[preset],
        **RELEASED_CODEC,
        **RELEASED_TTS,
        **_id_fields(RELEASED_TOKENS),
        embedding_size=width,
        max_position_embeddings=MAX_POSITIONS,
    )
    return _whole(thinker, talker)


def _tiny_config(tokenizer: PreTrainedTokenizerFast, sizes: TinySizes) -> Qwen2_5OmniConfig:
    return _whole(_tiny_thinker(tokenizer, sizes), _tiny_talker(tokenizer, sizes))


def _tiny_thinker(tokenizer: PreTrainedTokenizerFast, sizes: TinySizes) -> Qwen2_5OmniThinkerConfig:
    heads = sizes.text_width // TINY_HEAD_DIM
    return Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": sizes.text_width,
            "intermediate_size": 3 * sizes.text_width,
            "num_hidden_layers": sizes.text_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "rope_parameters": TINY_ROPE,
            "max_position_embeddings": MAX_POSITIONS,
            "tie_word_embeddings": False,
        },
        audio_config={
            "d_model": sizes.audio_width,
            "encoder_layers": sizes.audio_layers,
            "encoder_attention_heads": sizes.audio_width // TINY_HEAD_DIM,
            "encoder_ffn_dim": 4 * sizes.audio_width,
            "num_mel_bins": 128,
            "n_window": 100,
            # Positions restart in each chunk of 100 frames after the convolutions.
            "max_source_positions": 100,
            "output_dim": sizes.text_width,
        },
        vision_config={
            "hidden_size": sizes.vision_width,
            "depth": sizes.vision_layers,
            "num_heads": sizes.vision_width // TINY_HEAD_DIM,
            "intermediate_size": 4 * sizes.vision_width,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [sizes.vision_layers - 1],
            "out_hidden_size": sizes.text_width,
        },
        user_token_id=tokenizer.backend_tokenizer.encode("user", add_special_tokens=False).ids[0],
        tie_word_embeddings=False,
        **_id_fields(special_tokens(tokenizer)),
    )


def _tiny_talker(tokenizer: PreTrainedTokenizerFast, sizes: TinySizes) -> Qwen2_5OmniTalkerConfig:
    vocab = tokenizer.get_vocab()
    pad, text_bos, text_eos = (vocab[token] for token in TTS_TOKENS)
    return _talker_config(
        hidden_size=sizes.talker_width,
        intermediate_size=3 * sizes.talker_width,
        num_hidden_layers=sizes.talker_layers,
        num_attention_heads=sizes.talker_width // TINY_HEAD_DIM,
        num_key_value_heads=sizes.talker_width // TINY_HEAD_DIM // 2,
        head_dim=TINY_HEAD_DIM,
        embedding_size=sizes.text_width,
        rope_parameters=TINY_ROPE,
        max_position_embeddings=MAX_POSITIONS,
        tts_text_pad_token_id=pad,
        tts_text_start_token_id=text_bos,
        tts_text_end_token_id=text_eos,
        # The codes first, then the control ids, as in the release.
        vocab_size=sizes.num_codes + 8,
        tts_codec_pad_token_id=sizes.num_codes,
        tts_codec_start_token_id=sizes.num_codes + 1,
        tts_codec_end_token_id=sizes.num_codes + 2,
        tts_codec_mask_token_id=sizes.num_codes + 4,
        **_id_fields(special_tokens(tokenizer)),
    )


def _talker_config(**values: Any) -> Qwen2_5OmniTalkerConfig:
    # transformers warns of each text id: it measures them by the codec table's rows, but they
    # are rows of the Thinker's table.
    with quiet():
        return Qwen2_5OmniTalkerConfig(**values)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from warning of ids that it measures by the wrong table."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _whole(thinker: Qwen2_5OmniThinkerConfig, talker: Qwen2_5OmniTalkerConfig) -> Qwen2_5OmniConfig:
    return Qwen2_5OmniConfig(thinker_config=thinker, talker_config=talker, token2wav_config={})


def _known_fields(cls: Any, raw: dict[str, Any]) -> Any:
    """Build `cls` from those keys of `raw` that it declares; sub-configs likewise."""
    known = {spec.name for spec in dataclasses.fields(cls)} | set(cls.attribute_map)
    # Ids that transformers reads but no class declares (RECIPE.md section 2).
    known |= {"vision_start_token_id", "vision_end_token_id"}
    known -= {"auto_map", "transformers_version", "_name_or_path"}
    kept = {key: value for key, value in raw.items() if key in known}
    # Old files say rope_scaling and rope_theta; transformers turns them into rope_parameters.
    kept |= {key: raw[key] for key in ("rope_scaling", "rope_theta") if raw.get(key) is not None}
    for key, sub in cls.sub_configs.items():
        if isinstance(raw.get(key), dict):
            kept[key] = _known_fields(sub, raw[key])
    with quiet():
        return cls(**kept)


def _complete(config: Qwen2_5OmniThinkerConfig) -> None:
    """Fill ids that released files leave out, though transformers' position code reads them."""
    if getattr(config, "vision_start_token_id", None) is None:
        config.vision_start_token_id = RELEASED_TOKENS.vision_bos
    if getattr(config, "vision_end_token_id", None) is None:
        config.vision_end_token_id = RELEASED_TOKENS.vision_eos
