"""Random samples of every mix of media, with what transformers' own Thinker needs for the same.

Positions come from transformers' `get_rope_index`, which is right for one clip per call and one
rate; so these samples do not depend on our own position code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from omni_train.data.image import normalize_patches
from omni_train.data.tokenizer import train_tokenizer
from omni_train.data.types import IGNORE_INDEX, EncodedSample, ModelSpec
from omni_train.models.config import ModelConfig, TinySizes
from omni_train.models.presets import build_config, model_spec

SMALL = TinySizes(
    text_width=64, text_layers=2, audio_width=64, audio_layers=1, vision_width=64, vision_layers=2
)
PATCH_WIDTH = 3 * 2 * 14 * 14


def small_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokenizer in every process."""
    return train_tokenizer(["which word was said and what is on the picture"], vocab_size=330)


def small_config(tokenizer: PreTrainedTokenizerFast) -> tuple[ModelConfig, ModelSpec]:
    """A model of a few hundred thousand parameters; its tokenizer is passed beside it."""
    config = ModelConfig(tokenizer="in memory", tiny=SMALL)
    whole = build_config(config.preset, tokenizer, config.tiny)
    return config, model_spec(whole.thinker_config, tokenizer)


@dataclass
class Parts:
    """What has been put together of one sample so far."""

    ids: list[int] = field(default_factory=list)
    patches: list[Tensor] = field(default_factory=list)
    grids: list[list[int]] = field(default_factory=list)
    image_patches: list[Tensor] = field(default_factory=list)
    image_grids: list[list[int]] = field(default_factory=list)
    video_patches: list[Tensor] = field(default_factory=list)
    video_grids: list[list[int]] = field(default_factory=list)
    mels: list[Tensor] = field(default_factory=list)


@dataclass
class Sample:
    """One sample and the keyword arguments with which transformers sees the same."""

    encoded: EncodedSample
    hf: dict[str, Any]


def audio_tokens(num_frames: int) -> int:
    """Audio tokens of a clip of `num_frames` mel frames."""
    return ((num_frames - 1) // 2 + 1 - 2) // 2 + 1


def make_sample(
    thinker: Qwen2_5OmniThinkerForConditionalGeneration,
    spec: ModelSpec,
    kinds: list[str],
    *,
    seed: int,
    prompt: bool = False,
) -> Sample:
    """Build a sample with the media of `kinds` (image, audio, video, av) in that order.

    Args:
        thinker: any model of the config, for its position code.
        spec: the model's sizes and ids.
        kinds: media in order; `av` is a clip with its sound read along and must stand alone.
        seed: of all contents.
        prompt: end with an open assistant turn and supervise nothing.
    """
    rng = torch.Generator().manual_seed(seed)
    parts = Parts(ids=[spec.tokens.im_start, *_text(rng)])
    for kind in kinds:
        _ADD[kind](parts, spec, rng)
        parts.ids += _text(rng)
    parts.ids += [spec.tokens.im_end, *_text(rng)]
    labels = torch.full((len(parts.ids),), IGNORE_INDEX)
    if prompt:
        parts.ids += [spec.tokens.im_start]
        labels = torch.full((len(parts.ids),), IGNORE_INDEX)
    else:
        start = len(parts.ids)
        parts.ids += [*_text(rng), *_text(rng), spec.tokens.im_end]
        labels = torch.tensor([IGNORE_INDEX] * start + parts.ids[start:])
    return _finish(thinker, spec, parts, labels, av="av" in kinds, key=f"s{seed}")


def _text(rng: torch.Generator) -> list[int]:
    count = int(torch.randint(2, 6, (1,), generator=rng))
    return torch.randint(0, 250, (count,), generator=rng).tolist()


def _pixels(count: int, rng: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (count, PATCH_WIDTH), generator=rng, dtype=torch.uint8)


def _add_image(parts: Parts, spec: ModelSpec, rng: torch.Generator) -> None:
    height, width = (2 * int(torch.randint(1, 5, (1,), generator=rng)) for _ in range(2))
    patches, grid = _pixels(height * width, rng), [1, height, width]
    tokens = spec.tokens
    parts.ids += [tokens.vision_bos, *[tokens.image] * (height * width // 4), tokens.vision_eos]
    parts.patches.append(patches)
    parts.grids.append(grid)
    parts.image_patches.append(patches)
    parts.image_grids.append(grid)


def _add_audio(parts: Parts, spec: ModelSpec, rng: torch.Generator) -> None:
    frames = int(torch.randint(30, 260, (1,), generator=rng))
    tokens = spec.tokens
    parts.ids += [tokens.audio_bos, *[tokens.audio] * audio_tokens(frames), tokens.audio_eos]
    parts.mels.append(torch.randn(spec.num_mel_bins, frames, generator=rng))


def _add_video(parts: Parts, spec: ModelSpec, rng: torch.Generator) -> None:
    tokens = spec.tokens
    count = _clip(parts, rng)
    parts.ids += [tokens.vision_bos, *[tokens.video] * count, tokens.vision_eos]


def _add_av(parts: Parts, spec: ModelSpec, rng: torch.Generator) -> None:
    """Three grids of one second each, so one block of two seconds and one of the rest."""
    tokens = spec.tokens
    count = _clip(parts, rng) // 3
    frames = 300
    parts.mels.append(torch.randn(spec.num_mel_bins, frames, generator=rng))
    sound = audio_tokens(frames)
    spans = [tokens.video] * (2 * count) + [tokens.audio] * 50
    spans += [tokens.video] * count + [tokens.audio] * (sound - 50)
    parts.ids += [tokens.vision_bos, tokens.audio_bos, *spans, tokens.audio_eos, tokens.vision_eos]


def _clip(parts: Parts, rng: torch.Generator) -> int:
    grid = [3, 4, 2]
    patches = _pixels(3 * 4 * 2, rng)
    parts.patches.append(patches)
    parts.grids.append(grid)
    parts.video_patches.append(patches)
    parts.video_grids.append(grid)
    return 3 * 4 * 2 // 4


_ADD = {"image": _add_image, "audio": _add_audio, "video": _add_video, "av": _add_av}


def _finish(
    thinker: Qwen2_5OmniThinkerForConditionalGeneration,
    spec: ModelSpec,
    parts: Parts,
    labels: Tensor,
    *,
    av: bool,
    key: str,
) -> Sample:
    ids = torch.tensor(parts.ids)
    lengths = torch.tensor([mel.shape[1] for mel in parts.mels], dtype=torch.long)
    hf: dict[str, Any] = {
        "input_ids": ids[None],
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "use_audio_in_video": av,
    }
    rope: dict[str, Any] = {"audio_seqlens": lengths if parts.mels else None}
    if parts.image_patches:
        hf["pixel_values"] = normalize_patches(torch.cat(parts.image_patches), torch.float32)
        hf["image_grid_thw"] = rope["image_grid_thw"] = torch.tensor(parts.image_grids)
    if parts.video_patches:
        seconds = torch.ones(len(parts.video_grids))
        hf["pixel_values_videos"] = normalize_patches(torch.cat(parts.video_patches), torch.float32)
        hf["video_grid_thw"] = rope["video_grid_thw"] = torch.tensor(parts.video_grids)
        hf["video_second_per_grid"] = rope["second_per_grids"] = seconds
    if parts.mels:
        longest = int(lengths.max())
        padded = [torch.nn.functional.pad(mel, (0, longest - mel.shape[1])) for mel in parts.mels]
        hf["input_features"] = torch.stack(padded)
        hf["feature_attention_mask"] = (torch.arange(longest)[None] < lengths[:, None]).long()
    positions, _ = thinker.get_rope_index(
        ids[None], attention_mask=hf["attention_mask"], use_audio_in_video=av, **rope
    )
    empty = torch.zeros(0, PATCH_WIDTH, dtype=torch.uint8)
    encoded = EncodedSample(
        key=key,
        input_ids=ids,
        labels=labels,
        position_ids=positions[:, 0].long(),
        patches=torch.cat(parts.patches) if parts.patches else empty,
        grid_thw=torch.tensor(parts.grids, dtype=torch.long).reshape(-1, 3),
        mel=torch.cat([torch.zeros(spec.num_mel_bins, 0), *parts.mels], dim=1),
        mel_lengths=lengths,
    )
    return Sample(encoded=encoded, hf=hf)
