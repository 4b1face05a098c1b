"""Attention over the documents of a pack, registered with transformers under a name of ours.

Each document sees itself alone and causally; no T x T mask is ever built. Where no
`segment_lengths` come along (decoding with a cache), this is transformers' own SDPA with the mask
it was given. The towers keep transformers' SDPA, which already works window by window.

Letters: T tokens of the pack, Hq query heads, Hk key and value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SEGMENT_ATTENTION = "omni_segments"


def register_attention() -> str:
    """Make the attention known to transformers and return its name; calling it again is fine."""
    ALL_ATTENTION_FUNCTIONS.register(SEGMENT_ATTENTION, segment_attention)
    # For transformers' own `generate` on such a model: masks as for SDPA.
    ALL_MASK_ATTENTION_FUNCTIONS.register(SEGMENT_ATTENTION, sdpa_mask)
    return SEGMENT_ATTENTION


def segment_kwargs(segment_lengths: list[int], device: torch.device) -> dict[str, Any]:
    """What the language model must be called with, computed once for all its layers.

    Args:
        segment_lengths: tokens of each document; they add up to T.
        device: where the model runs.
    """
    ends = torch.tensor([0, *segment_lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return {
        "segment_lengths": segment_lengths,
        "segment_starts": ends.to(device, non_blocking=True) if device.type == "cuda" else None,
    }


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segment_lengths: list[int] | None = None,
    segment_starts: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document, in the form that transformers calls.

    Args:
        module: the attention layer.
        query: [1, Hq, T, D].
        key, value: [1, Hk, T, D].
        attention_mask: must be None with segments; passed on without.
        dropout: probability.
        scaling: factor of the scores; 1 / sqrt(D) where None.
        segment_lengths: tokens of each document.
        segment_starts: int32 [documents + 1] on the GPU.

    Returns:
        [1, T, Hq, D] and None (no weights).
    """
    if segment_lengths is None:
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out
    assert attention_mask is None, "a mask beside segments would be ignored"
    total = query.shape[2]
    assert query.shape[0] == 1, f"a pack has one row, not {query.shape[0]}"
    assert sum(segment_lengths) == total, f"segments {segment_lengths} for {total} tokens"
    if segment_starts is not None and _fits_varlen(query, dropout):
        return _varlen(query, key, value, segment_starts, max(segment_lengths), scaling), None
    outputs = [
        scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=True
        )
        for q, k, v in zip(
            *(torch.split(tensor, segment_lengths, dim=2) for tensor in (query, key, value)),
            strict=True,
        )
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scaling: float | None
) -> Tensor:
    """The same in one kernel on the GPU; returns [1, T, Hq, D]."""
    flat_query, flat_key, flat_value = (t[0].transpose(0, 1) for t in (query, key, value))
    packed = varlen_attn(
        flat_query,
        flat_key,
        flat_value,
        starts,
        starts,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(packed, Tensor)
    return packed[None]


def _fits_varlen(query: Tensor, dropout: float) -> bool:
    """Whether torch's varlen kernel takes this: half precision on a GPU of Ampere or later."""
    return (
        query.is_cuda
        and dropout == 0.0
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[3] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )
