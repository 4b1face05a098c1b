"""The Thinker as it is trained: one pack in, one log-probability per supervised token out.

Every call runs the vision tower once and the audio tower once, whatever the pack holds, so that
ZeRO-3's gathers are the same on every rank (RECIPE.md section 4). Nothing here computes positions,
window indices or lengths; the data worker has done that (`omni_train.data.collate`).

Letters: T tokens of the pack, N supervised tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniThinkerForConditionalGeneration,
)
from trl.kernels import ChunkedLogProbFunction

from omni_train.data.image import normalize_patches
from omni_train.data.types import Batch, ModelSpec
from omni_train.models.attention import (
    attend_by_windows,
    packed_hidden,
    register_attention,
)
from omni_train.models.sequence_parallel import SequenceParallel
from omni_train.models.weights import BuildReport

# Vocabulary columns of one tile of logits; with TRL's 4,096 rows a bf16 tile takes 32 MiB.
TILE_COLUMNS = 4096
# On a CPU a tile is read and written a dozen times in fp32: a small one stays nearer.
CPU_TILE_COLUMNS = 1024


def tile_columns(device: torch.device) -> int:
    """Return how many columns of the vocabulary `LogProbHead` takes at once."""
    return CPU_TILE_COLUMNS if device.type == "cpu" else TILE_COLUMNS


class LogProbHead(nn.Linear):
    """`lm_head` that gives log-probabilities without building the logits of a pack.

    The fused kernel runs inside this module's own `forward`, so ZeRO-3's hooks gather the weight
    for it, forward and backward.
    """

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, *, score: bool = False
    ) -> Tensor:
        """Return the log-probabilities of `targets`, or all logits without them (decoding).

        Args:
            hidden: [N, H]; any leading shape without targets.
            targets: int64 [N].
            score: say also where a target is the most probable token.

        Returns:
            float32 [N]; [2, N] with `score`, the second row 1 where it is and 0 elsewhere; without
            targets logits [..., V] in the dtype of `hidden`.
        """
        if targets is None:
            return super().forward(hidden)
        columns = tile_columns(hidden.device)
        logprobs: Tensor = ChunkedLogProbFunction.apply(
            hidden, self.weight, self.bias, targets, 1.0, columns, None, 1.0, ()
        )[0]
        if not score:
            return logprobs
        return torch.stack([logprobs, (self._most_probable(hidden) == targets).float()])

    def _most_probable(self, hidden: Tensor) -> Tensor:
        """Return int64 [N], tile by tile: no logits of a pack are built here either."""
        best = torch.full(hidden.shape[:1], -torch.inf, device=hidden.device, dtype=hidden.dtype)
        chosen = torch.zeros(hidden.shape[:1], device=hidden.device, dtype=torch.long)
        size = tile_columns(hidden.device)
        for start in range(0, self.out_features, size):
            tile = slice(start, start + size)
            bias = None if self.bias is None else self.bias[tile]
            highest = linear(hidden, self.weight[tile], bias).max(dim=-1)
            better = highest.values > best
            best = torch.where(better, highest.values, best)
            chosen = torch.where(better, highest.indices + start, chosen)
        return chosen


class ThinkerForTraining(nn.Module):
    """transformers' Thinker with a training forward of its own.

    Args:
        thinker: the model; its `lm_head` becomes a LogProbHead with the same weight, its language
            model attends document by document.
    """

    def __init__(self, thinker: Qwen2_5OmniThinkerForConditionalGeneration) -> None:
        super().__init__()
        head = thinker.lm_head
        with torch.device("meta"):
            fused = LogProbHead(head.in_features, head.out_features, bias=head.bias is not None)
        fused.weight, fused.bias = head.weight, head.bias
        thinker.lm_head = fused
        thinker.model.language_model.set_attn_implementation(register_attention())
        for tower in (thinker.model.visual, thinker.model.audio_tower):
            attend_by_windows(tower)
        self.thinker = thinker
        # Where each tensor came from, and what data workers must know; set by build.py.
        self.report = BuildReport()
        self.spec: ModelSpec
        # Where ranks share packs; set by build.py.
        self.sequence: SequenceParallel | None = None

    @property
    def units_per_token(self) -> dict[str, int]:
        """What a tower's layers have for each token: patches, or frames after the convolutions."""
        merge: int = self.thinker.model.visual.spatial_merge_size
        return {"thinker.model.visual.blocks": merge**2, "thinker.model.audio_tower.layers": 2}

    def embed(self, batch: Batch) -> Tensor:
        """Return the input embeddings [1, T, H] with all media at their places."""
        thinker = self.thinker.model
        embeds: Tensor = thinker.language_model.embed_tokens(batch.input_ids)
        visual, audio = thinker.visual, thinker.audio_tower
        dtype = visual.patch_embed.proj.weight.dtype
        seen = visual(
            normalize_patches(batch.patches, dtype), grid_thw=batch.grid_thw, **batch.vision_kwargs
        ).pooler_output
        heard = audio(
            feature_lens=batch.mel_lengths, padded_feature=batch.mel_chunks, **batch.audio_kwargs
        ).last_hidden_state
        if self.sequence is not None:
            assert batch.vision_exchange is not None, "a whole pack, where ranks share packs"
            assert batch.audio_exchange is not None, "a whole pack, where ranks share packs"
            seen = self.sequence.exchange(seen, batch.vision_exchange)
            heard = self.sequence.exchange(heard, batch.audio_exchange)
        flat = _place(embeds[0], batch.vision_index, seen)
        return _place(flat, batch.audio_index, heard)[None]

    def hidden(self, batch: Batch) -> Tensor:
        """Return the last hidden states [1, T, H], after the final norm."""
        language_model = self.thinker.model.language_model
        return packed_hidden(
            language_model,
            self.embed(batch),
            batch.position_ids,
            batch.segments,
            across=self.sequence.attention if self.sequence is not None else None,
        )

    def forward(self, batch: Batch, *, score: bool = False) -> Tensor:
        """Return the log-probabilities float32 [N] of the pack's supervised tokens.

        With `score` [2, N], see `LogProbHead`.
        """
        hidden = self.hidden(batch)[0].index_select(0, batch.target_index)
        logprobs: Tensor = self.thinker.lm_head(hidden, batch.target_ids, score=score)
        return logprobs


def _place(embeds: Tensor, index: Tensor, features: Tensor) -> Tensor:
    """Put `features` [M, H] at positions `index` [M] of `embeds` [T, H], out of place.

    With a dummy the index is empty, no row is taken and the tower's gradient is exactly zero;
    the operations, and so the backward pass, are the same as with real media.
    """
    count = index.numel()
    assert count in (0, features.shape[0]), f"{count} placeholders, {features.shape[0]} embeddings"
    return embeds.index_copy(0, index, features[:count].to(embeds.dtype))
