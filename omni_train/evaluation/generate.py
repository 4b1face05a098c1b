"""Greedy decoding of the Thinker for evaluation, batched, with a key-value cache.

Only for a plain replica: under ZeRO-3 every token would gather all weights, so such a model is
refused. Prompts go the way of training (collate, embed); positions come from the prompt alone and
then grow by one per token, and media ids are never produced, so nothing has to be recomputed when
an untrained model would start a picture of its own.

Letters: B prompts, T tokens of the longest, H hidden size, S tokens decoded so far.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from omni_train.data.collate import collate
from omni_train.data.types import EncodedSample, ModelSpec
from omni_train.engine.shards import check_whole
from omni_train.models.thinker import ThinkerForTraining


def media_ids(spec: ModelSpec) -> list[int]:
    """Ids that only media spans may hold, for `suppress_ids`."""
    tokens = spec.tokens
    return [
        tokens.audio,
        tokens.audio_bos,
        tokens.audio_eos,
        tokens.vision_bos,
        tokens.vision_eos,
        tokens.image,
        tokens.video,
    ]


@torch.no_grad()
def greedy(
    model: ThinkerForTraining,
    samples: list[EncodedSample],
    spec: ModelSpec,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    suppress_ids: Collection[int] | None = None,
) -> list[list[int]]:
    """Continue each prompt with its most probable tokens.

    Args:
        model: a plain replica on one device.
        samples: B prompts, each ending in `<|im_start|>assistant` and a newline.
        spec: the model's sizes and ids.
        max_new_tokens: most tokens per reply.
        stop_ids: ids that end a reply; they are not part of it.
        suppress_ids: ids that are never produced; the media ids where left out.

    Returns:
        The ids of each reply, in the order of the samples.
    """
    check_whole(model, each="token")
    if not samples:
        return []
    was_training = model.training
    model.eval()
    try:
        suppressed = media_ids(spec) if suppress_ids is None else list(suppress_ids)
        return _decode(model, samples, spec, max_new_tokens, set(stop_ids), suppressed)
    finally:
        model.train(was_training)


def _decode(
    model: ThinkerForTraining,
    samples: list[EncodedSample],
    spec: ModelSpec,
    max_new_tokens: int,
    stop_ids: set[int],
    suppress_ids: list[int],
) -> list[list[int]]:
    thinker = model.thinker
    device = next(model.parameters()).device
    embeds, positions, valid = _left_padded(model, samples, spec, device)
    cache = DynamicCache(config=thinker.config.text_config)
    mask = _prompt_mask(valid)
    next_position = positions.amax(dim=(0, 2)) + 1
    replies: list[list[int]] = [[] for _ in samples]
    open_replies = set(range(len(samples)))
    for _ in range(max_new_tokens):
        out = thinker.model.language_model(
            inputs_embeds=embeds,
            attention_mask={"full_attention": mask},
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        logits = thinker.lm_head(out.last_hidden_state[:, -1])
        logits[:, suppress_ids] = -torch.inf
        chosen = logits.argmax(dim=-1)
        for row, token in enumerate(chosen.tolist()):
            if row in open_replies and token in stop_ids:
                open_replies.discard(row)
            elif row in open_replies:
                replies[row].append(token)
        if not open_replies:
            break
        embeds = thinker.model.language_model.embed_tokens(chosen[:, None])
        positions = next_position[None, :, None].expand(3, -1, 1)
        next_position = next_position + 1
        valid = torch.cat([valid, valid.new_ones(len(samples), 1)], dim=1)
        mask = valid[:, None, None, :]
    return replies


def _left_padded(
    model: ThinkerForTraining, samples: list[EncodedSample], spec: ModelSpec, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [B, T, H], positions [3, B, T] and which of them are real, bool [B, T].

    The samples are embedded as one pack, as in training; only the padding is added here.
    """
    batch = collate(samples, spec).to(device)
    rows = list(torch.split(model.embed(batch)[0], batch.segments.lengths))
    embeds = pad_sequence(rows, batch_first=True, padding_side="left")
    ids = [sample.position_ids.T.to(device) for sample in samples]
    positions = pad_sequence(ids, batch_first=True, padding_side="left").permute(2, 0, 1)
    ones = [torch.ones(length, dtype=torch.bool) for length in batch.segments.lengths]
    valid = pad_sequence(ones, batch_first=True, padding_side="left").to(device)
    return embeds, positions, valid


def _prompt_mask(valid: Tensor) -> Tensor:
    """Causal mask bool [B, 1, T, T] over the real tokens of left-padded prompts."""
    length = valid.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
    # A padding row sees itself, for a softmax over nothing is NaN.
    itself = torch.eye(length, dtype=torch.bool, device=valid.device)
    mask: Tensor = (causal & valid[:, None, :]) | itself
    return mask[:, None]
