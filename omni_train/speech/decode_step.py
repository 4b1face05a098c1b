"""One decoding step of the Talker for B rows, each at its own place of its own cache.

The same arithmetic as transformers' layers (a test holds it to their logits), in fewer and larger
operations: one product for queries, keys and values, one for gate and up, their weights transposed
once; a cache of fixed size that is written in place; grouped heads as rows of one key head, so
that no key is repeated. All shapes stay the same from step to step. Norms, rotary angles, output
products and heads are transformers' modules. In the last layer a prompt needs keys and values
everywhere, but only its last position goes on.

Letters: B rows, S cache positions, L prompt positions, H the Talker's width, E the Thinker's, D
head size, Hq query heads, Hk key and value heads, V rows of the codec table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from omni_train.models.talker import Talker


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that has run.

    Args:
        logits: float32 [V], of its last position.
        keys, values: [Hk, L, D] of each layer.
    """

    logits: Tensor
    keys: list[Tensor]
    values: list[Tensor]


class _Layer:
    """One layer with joined weights, its keys and its values [B, Hk, S, D]."""

    def __init__(self, layer: Any, num_rows: int, length: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        joined: list[nn.Linear] = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.module, self.head_dim = layer, attention.head_dim
        self.key_heads: int = attention.num_key_value_heads
        self.scaling: float = attention.scaling
        self.weight = torch.cat([part.weight for part in joined]).T.contiguous()
        self.bias = torch.cat([part.bias for part in joined])
        self.gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).T.contiguous()
        shape = (num_rows, self.key_heads, length, self.head_dim)
        self.keys, self.values = self.weight.new_zeros((2, *shape)).unbind(0)

    def project(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, Hq, D], keys and values [N, Hk, D] of N positions with angles [N, 1, D/2]."""
        normed = self.module.input_layernorm(hidden)
        mixed = torch.addmm(self.bias, normed, self.weight).view(len(hidden), -1, self.head_dim)
        first, second = mixed[:, : -self.key_heads].chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        keys = turned[:, -self.key_heads :]
        return turned[:, : -self.key_heads], keys, mixed[:, -self.key_heads :]

    def finish(self, hidden: Tensor, heard: Tensor) -> Tensor:
        """Hidden states [N, H] after the layer; `heard` [N, Hq * D] is what attention gave."""
        hidden = hidden + self.module.self_attn.o_proj(heard)
        mlp = self.module.mlp
        gate, up = (self.module.post_attention_layernorm(hidden) @ self.gate_up).chunk(2, dim=-1)
        out: Tensor = hidden + mlp.down_proj(mlp.act_fn(gate) * up)
        return out


class DecodeStep:
    """The layers of a Talker with caches for B rows.

    Args:
        talker: a plain replica; its weights must not change while this lives.
        num_rows: B.
        length: S.
    """

    def __init__(self, talker: Talker, *, num_rows: int, length: int) -> None:
        self.talker = talker
        self.layers = [_Layer(layer, num_rows, length) for layer in talker.model.layers]
        device = talker.codec_head.weight.device
        self.rows = torch.arange(num_rows, device=device)
        self.columns = torch.arange(length, device=device)

    def prefill(self, embeds: Tensor, position_ids: Tensor) -> Prompt:
        """Run one prompt by itself.

        Args:
            embeds: [L, H], projected.
            position_ids: int64 [3, L].
        """
        cos, sin = self._angles(embeds, position_ids)
        hidden = embeds
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            last = number + 1 == len(self.layers)
            query, key, value = layer.project(hidden, cos, sin)
            if last:
                query, hidden = query[-1:], hidden[-1:]
            keys.append(key.transpose(0, 1))
            values.append(value.transpose(0, 1))
            heard = scaled_dot_product_attention(
                query.transpose(0, 1)[None],
                keys[-1][None],
                values[-1][None],
                is_causal=not last,
                scale=layer.scaling,
                enable_gqa=True,
            )
            hidden = layer.finish(hidden, heard[0].transpose(0, 1).flatten(1))
        return Prompt(self._logits(hidden)[0], keys, values)

    def fill(self, row: int, prompt: Prompt) -> None:
        """Copy the keys and values of a prompt that has run into a row."""
        for layer, keys, values in zip(self.layers, prompt.keys, prompt.values, strict=True):
            layer.keys[row, :, : keys.shape[1]] = keys
            layer.values[row, :, : keys.shape[1]] = values

    def __call__(self, text: Tensor, codes: Tensor, at: Tensor, positions: Tensor) -> Tensor:
        """Return the logits float32 [B, V] after one more code in each row.

        Args:
            text: [B, E], the text item that comes with each code.
            codes: int64 [B].
            at: int64 [B], where in the cache each row goes; later places are not looked at.
            positions: int64 [B], position id on all axes.
        """
        hidden = self.talker.project(text, self.rows, codes)
        cos, sin = self._angles(hidden, positions.expand(3, -1))
        later = self.columns > at[:, None]
        mask = hidden.new_zeros(later.shape).masked_fill(later, -torch.inf)[:, None, None]
        for layer in self.layers:
            query, key, value = layer.project(hidden, cos, sin)
            layer.keys[self.rows, :, at] = key
            layer.values[self.rows, :, at] = value
            grouped = query.reshape(len(query), layer.key_heads, -1, layer.head_dim)
            heard = scaled_dot_product_attention(
                grouped, layer.keys, layer.values, attn_mask=mask, scale=layer.scaling
            )
            hidden = layer.finish(hidden, heard.reshape(len(query), -1))
        return self._logits(hidden)

    def _angles(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, 1, D/2] of positions int64 [3, N], in the dtype of `hidden`."""
        cos, sin = self.talker.model.rotary_emb(hidden, position_ids[:, None])
        # The second half of a head turns as the first.
        half = cos.shape[-1] // 2
        return cos[0, :, None, :half], sin[0, :, None, :half]

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.talker.codec_head(self.talker.model.norm(hidden))
        return logits.float()
