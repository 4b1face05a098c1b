"""The Thinker from its parts: a Qwen2.5 LLM, a Qwen2.5-VL vision tower, a Whisper encoder.

Done here: what of each directory becomes which tensor of the Thinker, and the sizes that the
directories' `config.json` say. Not done here: reading files (weights.py), filling the model
(build.py), the tokenizer (`omni_train.data.tokenizer.rename_tokens`).

    Qwen2.5      model.* -> language_model.*, lm_head; a tied embedding is copied into lm_head
    Qwen2.5-VL   visual.* -> visual.*; fused qkv is split; a merger of another width starts fresh
    Whisper      encoder.* -> audio_tower.*; its final layer norm is ln_post; positions are fixed

The audio projection is always new. A part that is not given starts fresh.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig

from omni_train.config.errors import ConfigError
from omni_train.models.config import ModelParts
from omni_train.models.weights import LM_HEAD, TEXT_TABLE, StoredTensors

# Sizes that are taken over; the families use the same names.
_TEXT_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings"),
)
_VISION_FIELDS = (
    *("depth", "hidden_size", "intermediate_size", "num_heads", "patch_size"),
    *("spatial_merge_size", "temporal_patch_size", "window_size", "fullatt_block_indexes"),
)
_AUDIO_FIELDS = (
    *("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim"),
    *("num_mel_bins", "max_source_positions"),
)
_TEXT, _VISUAL, _AUDIO = (
    f"thinker.model.{part}." for part in ("language_model", "visual", "audio_tower")
)


@dataclass(frozen=True, slots=True)
class _Taken:
    """One tensor of ours in a stored one.

    Args:
        stored: its name in the file.
        piece, pieces: of how many equal pieces along the first axis it is which.
        note: what was done to it; empty where it is as stored.
    """

    stored: str
    piece: int = 0
    pieces: int = 1
    note: str = ""


class PartSource:
    """One part's directory as tensors of the Thinker.

    Args:
        path: directory with safetensors.
        rename: tensors of ours in a stored one, by our name.
    """

    def __init__(self, path: str, rename: Callable[[str], dict[str, _Taken]]) -> None:
        self.path = path
        self._stored = StoredTensors(path)
        self.places: dict[str, _Taken] = {}
        for stored in self._stored.names():
            self.places |= rename(stored)

    def names(self) -> set[str]:
        """Return our names of what is used, and the stored names of all else."""
        used = {taken.stored for taken in self.places.values()}
        return set(self.places) | (self._stored.names() - used)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, or its piece of a fused one."""
        taken = self.places[name]
        whole = self._stored.tensor(taken.stored)
        if whole.shape[0] % taken.pieces:
            raise ConfigError(
                key="model.parts",
                value=self.path,
                rule=f"{taken.stored} {tuple(whole.shape)} is not {taken.pieces} equal pieces",
                remedy="give the directory as it was released",
            )
        piece: Tensor = whole.chunk(taken.pieces)[taken.piece]
        return piece

    def note(self, name: str) -> str:
        """Return what was done to a tensor; empty where it is as stored."""
        return self.places[name].note


@dataclass(frozen=True, slots=True)
class PartSources:
    """What the parts fill.

    Args:
        by_group: source of each parameter group that a part fills.
        fresh: why a group that a reader might look for is filled by none.
    """

    by_group: dict[str, PartSource]
    fresh: list[str]


def part_sources(parts: ModelParts, config: Qwen2_5OmniThinkerConfig) -> PartSources:
    """Open the parts of a Thinker.

    Args:
        parts: the directories; none of them is an empty result.
        config: of the assembled Thinker.

    Raises:
        ConfigError: a directory cannot be read.
    """
    sources: dict[str, PartSource] = {}
    fresh: list[str] = []
    if not parts.llm:
        return PartSources(sources, fresh)
    width = config.text_config.hidden_size
    llm = PartSource(parts.llm, _from_llm)
    if LM_HEAD not in llm.places and TEXT_TABLE in llm.places and _is_tied(parts.llm):
        table = llm.places[TEXT_TABLE].stored
        llm.places[LM_HEAD] = _Taken(table, note="copied from the tied embedding")
    sources |= {"llm": llm, "lm_head": llm}
    if parts.vision:
        vision = PartSource(parts.vision, _from_vision)
        sources["vision_encoder"] = vision
        theirs = _vision_width(parts.vision)
        if theirs == width:
            sources["vision_merger"] = vision
        else:
            fresh.append(f"vision_merger: its embeddings are {theirs} wide, the LLM's {width}")
    else:
        fresh.append("vision_encoder, vision_merger: model.parts.vision is not given")
    if parts.audio:
        sources["audio_encoder"] = PartSource(parts.audio, _from_whisper)
    else:
        fresh.append("audio_encoder: model.parts.audio is not given")
    return PartSources(sources, [*fresh, "audio_projection: no part has one"])


def use_part_sizes(config: Qwen2_5OmniThinkerConfig, parts: ModelParts) -> None:
    """Give `config` the sizes that the parts' own config.json say; the rest stays the preset's.

    Raises:
        ConfigError: a config.json cannot be read, is another family's, or lacks a size.
    """
    if parts.llm:
        raw = _read(parts.llm, "qwen2", "model.parts.llm")
        sizes = _sizes(raw, config.text_config, _TEXT_FIELDS, parts.llm)
        theta = (raw.get("rope_parameters") or raw).get("rope_theta", 10_000.0)
        pairs = sizes["hidden_size"] // sizes["num_attention_heads"] // 2
        # Time, height and width share half a head as 2 : 3 : 3, as in the released models.
        section = [pairs // 4, 3 * pairs // 8, 3 * pairs // 8]
        rope = {"rope_type": "default", "rope_theta": float(theta), "mrope_section": section}
        # Made anew: what the class derives from the sizes must follow them.
        config.text_config = type(config.text_config)(
            **sizes, rope_parameters=rope, tie_word_embeddings=False
        )
        config.audio_config.output_dim = sizes["hidden_size"]
        config.vision_config.out_hidden_size = sizes["hidden_size"]
    if parts.vision:
        raw = _read(parts.vision, "qwen2_5_vl", "model.parts.vision")
        vision, raw_vision = config.vision_config, raw.get("vision_config") or {}
        for name, value in _sizes(raw_vision, vision, _VISION_FIELDS, parts.vision).items():
            setattr(vision, name, value)
    if parts.audio:
        raw = _read(parts.audio, "whisper", "model.parts.audio")
        audio = config.audio_config
        for name, value in _sizes(raw, audio, _AUDIO_FIELDS, parts.audio).items():
            setattr(audio, name, value)


def _from_llm(stored: str) -> dict[str, _Taken]:
    inner = stored.removeprefix("model.").removeprefix("language_model.")
    if inner == "lm_head.weight":
        return {LM_HEAD: _Taken(stored)}
    if inner.startswith(("layers.", "embed_tokens.", "norm.")):
        return {f"{_TEXT}{inner}": _Taken(stored)}
    return {}


def _from_vision(stored: str) -> dict[str, _Taken]:
    name = stored.removeprefix("model.")
    inner = name.removeprefix("visual.")
    if inner == name:
        return {}
    if ".attn.qkv." not in inner:
        return {f"{_VISUAL}{inner}": _Taken(stored)}
    return {
        _VISUAL + inner.replace(".qkv.", f".{letter}."): _Taken(stored, i, 3, "split from qkv")
        for i, letter in enumerate("qkv")
    }


def _from_whisper(stored: str) -> dict[str, _Taken]:
    name = stored.removeprefix("model.")
    inner = name.removeprefix("encoder.")
    # The positions are sinusoids in both; ours restart in each chunk and are no weights.
    if inner == name or inner.startswith("embed_positions."):
        return {}
    if inner.startswith("layer_norm."):
        renamed = inner.replace("layer_norm.", "ln_post.")
        return {f"{_AUDIO}{renamed}": _Taken(stored, note="Whisper's final layer norm")}
    return {f"{_AUDIO}{inner}": _Taken(stored)}


def _read(path: str, family: str, key: str) -> dict[str, Any]:
    try:
        raw = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        found = raw.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise _wrong(key, path, f"its config.json cannot be read ({error})") from error
    if found != family:
        raise _wrong(key, path, f"its config.json is of model_type {found!r}, not {family!r}")
    config: dict[str, Any] = raw
    return config


def _sizes(raw: dict[str, Any], like: Any, fields: tuple[str, ...], path: str) -> dict[str, Any]:
    """Return the named fields; `like` has them as numbers or lists of numbers."""
    for name in fields:
        value = raw.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number and not (isinstance(getattr(like, name), list) and isinstance(value, list)):
            raise _wrong("model.parts", path, f"its config.json has {name}={value!r}")
    return {name: raw[name] for name in fields}


def _is_tied(path: str) -> bool:
    return bool(_read(path, "qwen2", "model.parts.llm").get("tie_word_embeddings", False))


def _vision_width(path: str) -> int:
    raw = _read(path, "qwen2_5_vl", "model.parts.vision")
    return int(raw["vision_config"].get("out_hidden_size", 0))


def _wrong(key: str, path: str, rule: str) -> ConfigError:
    return ConfigError(
        key=key,
        value=path,
        rule=rule,
        remedy="give a directory of Qwen2.5 (llm), Qwen2.5-VL (vision) or Whisper (audio)",
    )
