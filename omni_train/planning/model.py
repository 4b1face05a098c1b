"""From a stage's resolved settings to its model's groups and sizes, on the meta device.

What a stage trains is its recipe's to say; recipes are never imported, so the table below repeats
it and a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from omni_train.config.errors import ConfigError
from omni_train.config.keys import field_types
from omni_train.engine.optim import OptimConfig
from omni_train.models.config import ModelConfig, ModelPreset
from omni_train.models.groups import THINKER_GROUPS, select_groups
from omni_train.models.presets import (
    build_config,
    resolve_config,
    resolve_speech_config,
)
from omni_train.models.talker import Talker
from omni_train.models.talker_layout import TalkerSpec
from omni_train.models.talker_spec import released_talker_spec, talker_spec
from omni_train.planning.shapes import DecoderShape

_TALKER = ("talker", "talker_projection", "codec_head")
_TOWERS = {
    "stage1_audio": {
        "adapter": ("audio_projection",),
        "encoder": ("audio_projection", "audio_encoder"),
    },
    "stage1_vision": {
        "adapter": ("vision_merger",),
        "encoder": ("vision_merger", "vision_encoder"),
    },
}
_TRAINED = {
    "text_lm": ("llm", "lm_head"),
    "stage2_multimodal": tuple(sorted(THINKER_GROUPS)),
    "stage3_long": tuple(sorted(THINKER_GROUPS)),
    "thinker_sft": tuple(sorted(THINKER_GROUPS)),
    "talker_icl": _TALKER,
    "talker_dpo": _TALKER,
    "talker_speaker_sft": _TALKER,
}
PLANNABLE = (*_TOWERS, *_TRAINED)


@dataclass(frozen=True, slots=True)
class GroupSize:
    """Parameters of a named group, and whether the stage trains them."""

    name: str
    parameters: int
    trained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerShape:
    """Sizes of an encoder; `parameters` are what each of its units is multiplied with."""

    parameters: float
    layers: int
    width: int
    ffn: int
    heads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """A stage's model.

    Args:
        groups: in the model's order.
        largest_tensor: elements of the largest weight.
        thinker: None where the Talker is alone in memory.
        talker: None where there is none.
        vision, audio: the towers, None without a Thinker.
        heads, kv_heads: by model, thinker and talker.
        max_positions: that the text model was made for.
    """

    groups: tuple[GroupSize, ...]
    largest_tensor: int
    thinker: DecoderShape | None
    talker: DecoderShape | None
    vision: TowerShape | None
    audio: TowerShape | None
    heads: dict[str, tuple[int, int]]
    max_positions: int

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return sum(group.parameters for group in self.groups)

    @property
    def trained_parameters(self) -> int:
        """Of what the stage trains."""
        return sum(group.parameters for group in self.groups if group.trained)

    def trains(self, name: str) -> bool:
        """Whether a group is there and trained."""
        return any(group.name == name and group.trained for group in self.groups)


def trained_groups(recipe: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the groups that a recipe trains before `optim.groups` is asked.

    Args:
        recipe: its name.
        values: its resolved settings.

    Raises:
        ConfigError: the recipe trains no part of the model, so there is nothing to plan.
    """
    if recipe in _TOWERS:
        return _TOWERS[recipe][values["phase"]]
    if recipe not in _TRAINED:
        raise ConfigError(
            key="STAGE",
            value=recipe,
            rule="it trains no part of the model under DeepSpeed",
            remedy=f"plan one of {', '.join(PLANNABLE)}",
        )
    if values.get("lora", {}).get("rank"):
        raise ConfigError(
            key="lora.rank",
            value=values["lora"]["rank"],
            rule="the estimates know trained and frozen weights, not adapters",
            remedy="plan with lora.rank=0; adapters need less memory and about as much time",
        )
    groups = _TRAINED[recipe]
    if recipe in ("talker_icl", "talker_speaker_sft"):
        groups += ("speaker_rows",) if values["model"]["new_speakers"] else ()
        joint = values.get("thinker") == "joint"
        groups += tuple(sorted(THINKER_GROUPS - {"lm_head"})) if joint else ()
    return groups


def measure_model(
    recipe: str,
    values: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerFast | None,
    *,
    root: Path = Path(),
) -> ModelSizes:
    """Build a stage's model without memory and return its sizes.

    Args:
        recipe, values: as in `trained_groups`.
        tokenizer: the run's; None where it is not there yet, which only a released size allows.
        root: what relative paths of the settings start from.

    Raises:
        ConfigError: the settings do not describe a model.
    """
    settings = model_settings(values, root)
    speech = recipe.startswith("talker")
    config = _config(settings, tokenizer, speech=speech)
    alone = values.get("thinker") == "cached"
    model = _meta_model(config, settings, tokenizer, speech=speech, alone=alone)
    optim: OptimConfig = section(OptimConfig, values["optim"])
    groups = select_groups(model, optim, trained=trained_groups(recipe, values))
    sizes = tuple(GroupSize(g.name, g.num_parameters, g.trainable) for g in groups)
    counts = {group.name: group.parameters for group in sizes}
    text, thinker = config.thinker_config.text_config, None
    heads: dict[str, tuple[int, int]] = {}
    if not alone:
        thinker = _decoder(text, has_head=not speech)
        heads["thinker"] = (text.num_attention_heads, text.num_key_value_heads)
    talker = None
    if speech:
        talker = _decoder(config.talker_config, has_head=True)
        own = config.talker_config
        heads["talker"] = (own.num_attention_heads, own.num_key_value_heads)
    return ModelSizes(
        groups=sizes,
        largest_tensor=max(param.numel() for param in model.parameters()),
        thinker=thinker,
        talker=talker,
        vision=None if alone else _vision(config, counts),
        audio=None if alone else _audio(config, counts),
        heads=heads,
        max_positions=text.max_position_embeddings,
    )


def model_settings(values: Mapping[str, Any], root: Path) -> ModelConfig:
    """Return the model's settings with the directory of its weights under `root`."""
    settings: ModelConfig = section(ModelConfig, values["model"])
    if settings.init_from:
        settings.init_from = str(root / settings.init_from)
    return settings


def section(schema: type, values: Mapping[str, Any]) -> Any:
    """A section as its dataclass; keys that only a subclass has are left out."""
    names = field_types(schema)
    known = {key: value for key, value in values.items() if key in names}
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), known))


def _config(
    settings: ModelConfig, tokenizer: PreTrainedTokenizerFast | None, *, speech: bool
) -> Qwen2_5OmniConfig:
    if tokenizer is not None:
        resolve = resolve_speech_config if speech else resolve_config
        return resolve(settings, tokenizer)
    if settings.preset is ModelPreset.tiny:
        raise ConfigError(
            key="model.tokenizer",
            value=settings.tokenizer,
            rule="the tiny preset takes its vocabulary from the tokenizer, which is not there",
            remedy="give its directory, or plan a released size: model=qwen2_5_omni_7b",
        )
    return build_config(settings.preset)


def _meta_model(
    config: Qwen2_5OmniConfig,
    settings: ModelConfig,
    tokenizer: PreTrainedTokenizerFast | None,
    *,
    speech: bool,
    alone: bool,
) -> nn.Module:
    # By these names the groups' table knows the parameters.
    parts = nn.ModuleDict()
    with torch.device("meta"):
        if not alone:
            parts["thinker"] = Qwen2_5OmniThinkerForConditionalGeneration(config.thinker_config)
        if speech:
            spec = (
                _without_tokenizer(config, settings)
                if tokenizer is None
                else talker_spec(config, settings, tokenizer)
            )
            parts["talker"] = Talker(config.talker_config, spec)
    return parts


def _without_tokenizer(config: Qwen2_5OmniConfig, settings: ModelConfig) -> TalkerSpec:
    """Enough of a spec for the number of rows; ids of new speakers need a tokenizer."""
    released, new = released_talker_spec(config), len(settings.new_speakers)
    rows = (*released.row_ids, *released.row_ids[-1:] * new)
    return replace(released, row_ids=rows, num_new_speakers=new)


def _decoder(config: Any, *, has_head: bool) -> DecoderShape:
    size = getattr(config, "head_dim", None)
    size = size or config.hidden_size // config.num_attention_heads
    return DecoderShape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        query_width=config.num_attention_heads * size,
        kv_width=config.num_key_value_heads * size,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        has_head=has_head,
    )


def _vision(config: Qwen2_5OmniConfig, counts: dict[str, int]) -> TowerShape:
    vision = config.thinker_config.vision_config
    merged = counts["vision_merger"] / vision.spatial_merge_size**2
    return TowerShape(
        parameters=counts["vision_encoder"] + merged,
        layers=vision.depth,
        width=vision.hidden_size,
        ffn=vision.intermediate_size,
        heads=vision.num_heads,
    )


def _audio(config: Qwen2_5OmniConfig, counts: dict[str, int]) -> TowerShape:
    audio = config.thinker_config.audio_config
    # Neighbouring frames are averaged before the projection.
    return TowerShape(
        parameters=counts["audio_encoder"] + counts["audio_projection"] / 2,
        layers=audio.encoder_layers,
        width=audio.d_model,
        ffn=audio.encoder_ffn_dim,
        heads=audio.encoder_attention_heads,
    )
