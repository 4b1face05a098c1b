"""Attention over the segments of a pack, and the one way in which a packed language model is run.

A token sees its own segment up to itself and the segment's ancestors whole
(`omni_train.data.visibility`); no T x T mask or matrix is ever built. Registered with transformers
under a name of ours. Where no segments come along (decoding with a cache), this is transformers'
own SDPA with the mask it was given. The towers attend window by window, by the offsets that the
data worker made.

Letters: T tokens of the pack, Hq query heads, Hk key and value heads, D head size, R tokens of a
segment, A of its ancestors.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from omni_train.config.errors import ConfigError
from omni_train.data.visibility import Segments

SEGMENT_ATTENTION = "omni_segments"
# transformers reads the name: with `flash` in it the towers pass offsets on, and the host waits for
# no lengths.
WINDOW_ATTENTION = "omni_flash_windows"


def register_attention() -> str:
    """Make the attention known to transformers and return its name; calling it again is fine."""
    ALL_ATTENTION_FUNCTIONS.register(SEGMENT_ATTENTION, segment_attention)
    # For transformers' own `generate` on such a model: masks as for SDPA.
    ALL_MASK_ATTENTION_FUNCTIONS.register(SEGMENT_ATTENTION, sdpa_mask)
    return SEGMENT_ATTENTION


def attend_by_windows(tower: PreTrainedModel) -> None:
    """Give the layers of a tower `window_attention`.

    The tower's own config stays as it is: whoever builds a model from it, or asks transformers to
    set this name, would have transformers look for a kernel to install.
    """
    ALL_ATTENTION_FUNCTIONS.register(WINDOW_ATTENTION, window_attention)
    config = copy.copy(tower.config)
    config._attn_implementation = WINDOW_ATTENTION
    for module in tower.modules():
        if module is not tower and getattr(module, "config", None) is tower.config:
            module.config = config


def packed_hidden(
    language_model: nn.Module,
    embeds: Tensor,
    position_ids: Tensor,
    segments: Segments,
    *,
    across: nn.Module | None = None,
) -> Tensor:
    """Run transformers' text model of the Thinker or the Talker over one pack.

    Args:
        language_model: with `segment_attention` as its attention.
        embeds: [1, T, H].
        position_ids: int64 [4, 1, T]; row 0 restarts at each document, rows 1-3 are TMRoPE.
        segments: who sees whom, on the device of `embeds`; of the whole pack where ranks share it.
        across: attention over the tokens of all ranks that share the pack.

    Returns:
        [1, T, H], after the final norm.
    """
    out = language_model(
        inputs_embeds=embeds,
        # A dict is taken as it is; anything else would make transformers build a mask.
        attention_mask={"full_attention": None},
        position_ids=position_ids,
        use_cache=False,
        segments=segments,
        across=across,
    )
    hidden: Tensor = out.last_hidden_state
    return hidden


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Segments | None = None,
    across: nn.Module | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment and over its ancestors, in the form of transformers.

    Args:
        module: the attention layer.
        query: [1, Hq, T, D].
        key, value: [1, Hk, T, D].
        attention_mask: must be None with segments; passed on without.
        dropout: probability; must be 0 with segments.
        scaling: factor of the scores; 1 / sqrt(D) where None.
        segments: who sees whom.
        across: trades tokens for heads with other ranks, and calls this again without it.

    Returns:
        [1, T, Hq, D] and None (no weights).

    Raises:
        ConfigError: segments with parents on a GPU, in a precision that its kernel does not take.
    """
    if segments is None:
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out
    if across is not None:
        positions = kwargs["position_ids"]
        exchanged: tuple[Tensor, None] = across(
            module, query, key, value, None, dropout, scaling, segments, position_ids=positions
        )
        return exchanged
    assert attention_mask is None, "a mask beside segments would be ignored"
    # With dropout torch's CPU kernel is one that builds T x T.
    assert dropout == 0.0, f"attention dropout of {dropout}"
    assert query.shape[0] == 1, f"a pack has one row, not {query.shape[0]}"
    total = query.shape[2]
    assert segments.num_tokens == total, f"segments {segments.lengths} for {total} tokens"
    if _fits_varlen(query):
        return _varlen(query, key, value, segments, scaling), None
    if segments.has_parents and query.is_cuda:
        raise ConfigError(
            key="deepspeed.precision",
            value=str(query.dtype),
            rule="on a GPU, answers that share a prompt need half precision",
            remedy="use bf16",
        )
    return _by_segment(query, key, value, segments, scaling), None


def window_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Full attention inside each window of a tower, in the form of transformers.

    Args:
        module: the attention layer.
        query, key, value: [1, Hq, T, D].
        attention_mask: None.
        cu_seq_lens_q: int32 [windows + 1], where windows begin, and T.
        max_length_q: tokens of the longest one.
        scaling: factor of the scores.
        dropout: must be 0.

    Returns:
        [1, T, Hq, D] and None (no weights).
    """
    assert dropout == 0.0, f"attention dropout of {dropout}"
    if _fits_varlen(query):
        flat_query, flat_key, flat_value = (t[0].transpose(0, 1) for t in (query, key, value))
        packed = varlen_attn(
            flat_query,
            flat_key,
            flat_value,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
        )
        assert isinstance(packed, Tensor)
        return packed[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    windows = zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)
    outputs = [scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in windows]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _by_segment(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None
) -> Tensor:
    """One call of SDPA for each segment, two where it has ancestors; returns [1, T, Hq, D]."""
    outputs, tokens = [], segments.slices()
    for number, own in enumerate(tokens):
        q, k, v = query[:, :, own], key[:, :, own], value[:, :, own]
        if seen := [tokens[ancestor] for ancestor in segments.ancestors(number)]:
            past_k, past_v = (torch.cat([x[:, :, a] for a in seen], dim=2) for x in (key, value))
            outputs.append(_WithPast.apply(q, k, v, past_k, past_v, scaling))
        else:
            outputs.append(
                scaled_dot_product_attention(
                    q, k, v, scale=scaling, is_causal=True, enable_gqa=True
                )
            )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


class _WithPast(torch.autograd.Function):
    """Causal attention inside a segment and full attention over what comes before it, on CPU.

    torch's flash kernel has no causal mask for more keys than queries that is aligned at the end;
    so it runs twice, and the results are joined by their log-sum-exp. The backward kernel takes the
    joint output and the joint log-sum-exp for either part: the weights that it rebuilds from them
    are the joint softmax's (arXiv 2205.14135, section 3.1 and appendix B).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        scale: float | None,
    ) -> Tensor:
        """Return [1, Hq, R, D] of query [1, Hq, R, D], keys [1, Hk, R, D] and [1, Hk, A, D]."""
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        own, own_lse = flash(query, key, value, 0.0, True, scale=scale)
        past, past_lse = flash(query, past_key, past_value, 0.0, False, scale=scale)
        lse = torch.logaddexp(own_lse, past_lse)
        share = (past_lse - lse).exp()[..., None]
        # In the log-sum-exp's fp32, rounded once.
        out = torch.lerp(own.to(share.dtype), past.to(share.dtype), share).to(query.dtype)
        ctx.save_for_backward(query, key, value, past_key, past_value, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the five tensors."""
        query, key, value, past_key, past_value, out, lse = ctx.saved_tensors
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        own, past = (
            flash(grads[0], query, k, v, out, lse, 0.0, causal, scale=ctx.scale)
            for k, v, causal in ((key, value, True), (past_key, past_value, False))
        )
        return own[0] + past[0], own[1], own[2], past[1], past[2], None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None
) -> Tensor:
    """The same in one kernel on the GPU; returns [1, T, Hq, D].

    Its causal mask is aligned at the end of the keys, so that all ancestors are seen whole.
    """
    flat_query, flat_key, flat_value = (t[0].transpose(0, 1) for t in (query, key, value))
    if segments.key_index is not None:
        flat_key, flat_value = (
            t.index_select(0, segments.key_index) for t in (flat_key, flat_value)
        )
    packed = varlen_attn(
        flat_query,
        flat_key,
        flat_value,
        segments.query_starts,
        segments.key_starts,
        segments.max_query_length,
        segments.max_key_length,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(packed, Tensor)
    return packed[None]


def _fits_varlen(query: Tensor) -> bool:
    """Whether torch's varlen kernel takes this: half precision on a GPU of Ampere or later."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[3] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )
