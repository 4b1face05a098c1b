"""Model FLOPs of a micro-batch, for MFU: what the mathematics needs, nothing recomputed counted.

    decoder     k * matmul parameters * tokens, the head over all of them
    attention   6 * layers * query width * sum(len^2), causal and per document; 2 without gradient
    towers      k * parameters * units; a unit is a patch, or a frame after the convolutions

k is 2 forward, 2 more where a gradient passes through, 2 more where the weights get one: 6 for what
is trained. MFU is that over seconds, devices and a device's dense bf16 peak.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from math import prod

from torch import nn

from omni_train.data.types import Batch
from omni_train.models.groups import group_of
from omni_train.models.thinker import ThinkerForTraining
from omni_train.models.weights import TEXT_TABLE

_DECODER = ("llm", "lm_head")
# A gradient passes through what stands behind something trained in the same tower.
_BEHIND = {"audio_projection": "audio_encoder", "vision_merger": "vision_encoder"}


def thinker_flops(model: nn.Module, batch: Batch) -> float:
    """Return the FLOPs of a forward and backward pass; 0 for a model that is no Thinker.

    Args:
        model: the Thinker, or the DeepSpeed engine around it.
        batch: one pack, or this rank's share of one; over ranks the shares add up to the pack.
    """
    module = getattr(model, "module", model)
    if not isinstance(module, ThinkerForTraining):
        return 0.0
    parameters, trained = _matmul_parameters(module)
    config = module.thinker.config
    text, merge = config.text_config, config.vision_config.spatial_merge_size
    seen, heard = float(batch.vision_index.numel()), float(batch.audio_index.numel())
    units = {
        **dict.fromkeys(_DECODER, float(batch.num_tokens)),
        "vision_encoder": merge**2 * seen,
        "vision_merger": seen,
        "audio_encoder": 2 * heard,
        "audio_projection": heard,
    }
    total = 0.0
    for part, count in parameters.items():
        learns = part in trained
        passes = learns or _BEHIND.get(part) in trained or (part in _DECODER and bool(trained))
        total += (2 + 2 * passes + 2 * learns) * count * units.get(part, 0.0)
    lengths = batch.segments.lengths
    # Documents are whole; where ranks share a pack each does its part of their attention.
    pairs = sum(length**2 for length in lengths) * batch.num_tokens / sum(lengths)
    layer = module.thinker.model.language_model.layers[0].self_attn
    query_width = layer.num_heads * layer.head_dim
    return total + (6 if trained else 2) * text.num_hidden_layers * query_width * pairs


@lru_cache(maxsize=1)
def _matmul_parameters(module: nn.Module) -> tuple[Counter[str], set[str]]:
    """Parameters that are multiplied with, by group, and the groups of them that learn.

    Read once: names and what is frozen do not change while a model trains.
    """
    counts: Counter[str] = Counter()
    trained = set()
    for name, param in module.named_parameters():
        shape = tuple(getattr(param, "ds_shape", param.shape))
        if len(shape) > 1 and name != TEXT_TABLE:
            counts[group_of(name)] += prod(shape)
            if param.requires_grad:
                trained.add(group_of(name))
    return counts, trained
