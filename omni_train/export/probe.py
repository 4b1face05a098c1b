"""Logits of a Thinker on one fixed prompt with a picture and a sound, as bytes to compare.

    python -m omni_train.export.probe DIRECTORY DTYPE      prints their xxh3

The same function runs on the trained weights and, in a new process, on what
`Qwen2_5OmniForConditionalGeneration.from_pretrained` makes of an export.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import Qwen2_5OmniForConditionalGeneration

from omni_train.engine.deepspeed import DTYPES, Precision

_TEXT_TOKENS = 12
_MEL_FRAMES = 40
_SIDE_PATCHES = 4


@torch.no_grad()
def probe_logits(thinker: Any) -> Tensor:
    """Return the logits [1, T, V] of a prompt whose numbers follow from the config alone.

    Args:
        thinker: transformers' Thinker, in evaluation mode.
    """
    config = thinker.config
    device, dtype = thinker.lm_head.weight.device, thinker.lm_head.weight.dtype
    vision, audio = config.vision_config, config.audio_config
    ramp = torch.arange(_TEXT_TOKENS, device=device) * 7 % 200
    heard = ((_MEL_FRAMES - 1) // 2 + 1 - 2) // 2 + 1
    seen = (_SIDE_PATCHES // vision.spatial_merge_size) ** 2
    ids = [
        *ramp.tolist(),
        config.vision_start_token_id,
        *[config.image_token_id] * seen,
        config.vision_end_token_id,
        config.audio_start_token_id,
        *[config.audio_token_id] * heard,
        config.audio_end_token_id,
        *ramp.flip(0).tolist(),
    ]
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    patches = torch.sin(torch.arange(_SIDE_PATCHES**2 * width, dtype=torch.float64)).float()
    mel = torch.cos(torch.arange(audio.num_mel_bins * _MEL_FRAMES, dtype=torch.float64)).float()
    out = thinker(
        input_ids=torch.tensor([ids], device=device),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=device),
        pixel_values=patches.view(-1, width).to(device, dtype),
        image_grid_thw=torch.tensor([[1, _SIDE_PATCHES, _SIDE_PATCHES]], device=device),
        input_features=mel.view(1, audio.num_mel_bins, _MEL_FRAMES).to(device, dtype),
        feature_attention_mask=torch.ones(1, _MEL_FRAMES, dtype=torch.long, device=device),
        use_cache=False,
    )
    logits: Tensor = out.logits
    return logits


def logits_hash(logits: Tensor) -> str:
    """Return the xxh3-128 of the logits' bytes."""
    flat = logits.detach().cpu().contiguous().view(torch.uint8)
    return str(xxhash.xxh3_128_hexdigest(flat.numpy().tobytes()))


def reload_hash(folder: str, precision: Precision) -> str:
    """Load an export the way its users do and return the hash of its logits."""
    model = Qwen2_5OmniForConditionalGeneration.from_pretrained(
        folder, dtype=DTYPES[precision], local_files_only=True, attn_implementation="sdpa"
    )
    return logits_hash(probe_logits(model.thinker.eval()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(reload_hash(sys.argv[1], Precision[sys.argv[2]]))
