"""Encoded samples to one packed batch [1, T], with all lengths and indices the towers need.

Everything that depends on lengths is computed here, in the worker, so that the forward pass on a
GPU has no reason to wait for the host. Order of media: the order of their placeholders.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    chunk_and_pad_features,
    get_audio_cu_seqlens,
    get_pool_indices,
    get_valid_indices,
)
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
)

from omni_train.data.types import IGNORE_INDEX, Batch, EncodedSample, ModelSpec
from omni_train.data.visibility import Segments

# Four mel frames are the shortest clip that gives one audio token (RECIPE.md section 4).
DUMMY_MEL_FRAMES = 4


def collate(
    samples: list[EncodedSample],
    spec: ModelSpec,
    *,
    bad: list[tuple[str, str, str, str]] | None = None,
) -> Batch:
    """Pack samples into one sequence; an empty list gives a batch that only keeps a rank in step.

    Args:
        samples: documents of the pack, in order.
        spec: the model's sizes and ids.
        bad: (source, shard, key, reason) of samples that were planned but left out.
    """
    if samples:
        input_ids = torch.cat([s.input_ids for s in samples])
        lengths = [s.num_tokens for s in samples]
        positions = torch.cat([s.position_ids for s in samples], dim=1)
    else:
        input_ids = torch.tensor([spec.tokens.im_end])
        lengths = [1]
        positions = torch.zeros(3, 1, dtype=torch.long)
    restart = torch.cat([torch.arange(n) for n in lengths])
    position_ids = torch.cat([restart[None], positions])[:, None, :]
    target_index, target_ids, weights, document_targets = _targets(samples)
    num_targets = sum(document_targets)
    kinds, kind_targets, target_kind = _kinds(samples, document_targets)
    patches, grid_thw, vision_index = _vision(samples, input_ids, spec)
    mel, mel_lengths, audio_index = _audio(samples, input_ids, spec)
    mel_chunks, chunk_lengths = chunk_and_pad_features(
        mel, mel_lengths, spec.audio_chunk_frames // 2
    )
    return Batch(
        keys=[s.key for s in samples],
        input_ids=input_ids[None],
        position_ids=position_ids,
        segments=Segments(lengths),
        target_index=target_index,
        target_ids=target_ids,
        target_weights=weights,
        num_target_tokens=num_targets,
        patches=patches,
        grid_thw=grid_thw,
        vision_index=vision_index,
        vision_kwargs=vision_kwargs(grid_thw, spec),
        mel_chunks=mel_chunks,
        mel_lengths=mel_lengths,
        audio_index=audio_index,
        audio_kwargs=audio_kwargs(chunk_lengths, mel_lengths),
        bad=bad or [],
        document_targets=document_targets,
        kinds=kinds,
        kind_targets=kind_targets,
        target_kind=target_kind,
    )


def _targets(samples: list[EncodedSample]) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Positions that predict, ids to predict, their weights, and how many of each document.

    One dummy of weight 0 where there are none.
    """
    index, ids, weights, start = [], [], [], 0
    for sample in samples:
        # The first token of a document has no predecessor of its own document to predict it.
        supervised = torch.nonzero(sample.labels[1:] != IGNORE_INDEX).squeeze(1)
        index.append(start + supervised)
        ids.append(sample.labels[1:][supervised])
        factors = sample.label_weights
        weights.append(torch.ones(len(supervised)) if factors is None else factors[1:][supervised])
        start += sample.num_tokens
    counts = [part.numel() for part in ids]
    if not sum(counts):
        none = torch.zeros(1, dtype=torch.long)
        return none, none.clone(), torch.zeros(1), counts
    return torch.cat(index), torch.cat(ids), torch.cat(weights), counts


def _kinds(
    samples: list[EncodedSample], document_targets: list[int]
) -> tuple[list[tuple[str, str, str]], list[int], Tensor]:
    """Source, task and modality, their targets, and the kind of each target; a dummy has none."""
    counts: dict[tuple[str, str, str], int] = {}
    for sample, count in zip(samples, document_targets, strict=True):
        kind = (sample.source, sample.task, sample.modality)
        counts[kind] = counts.get(kind, 0) + count
    kinds = list(counts) or [("", "", "text")]
    of_document = torch.tensor([kinds.index((s.source, s.task, s.modality)) for s in samples])
    target_kind = torch.zeros(1, dtype=torch.long)
    if sum(document_targets):
        target_kind = of_document.repeat_interleave(torch.tensor(document_targets))
    return kinds, list(counts.values()) or [0], target_kind


def _vision(
    samples: list[EncodedSample], input_ids: Tensor, spec: ModelSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Patches, grids and positions of the pack's pictures, or a single black dummy token."""
    is_visual = (input_ids == spec.tokens.image) | (input_ids == spec.tokens.video)
    index = torch.nonzero(is_visual).squeeze(1)
    visual = [s for s in samples if s.grid_thw.numel()]
    if visual:
        patches = torch.cat([s.patches for s in visual])
        grid_thw = torch.cat([s.grid_thw for s in visual])
    else:
        patches, grid_thw = dummy_vision(spec)
    expected = patches.shape[0] // spec.merge_size**2 if visual else 0
    assert index.numel() == expected, f"{index.numel()} vision placeholders, {expected} embeddings"
    return patches, grid_thw, index


def _audio(
    samples: list[EncodedSample], input_ids: Tensor, spec: ModelSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Mel frames, lengths and positions of the pack's sounds, or a single silent dummy token."""
    index = torch.nonzero(input_ids == spec.tokens.audio).squeeze(1)
    heard = [s for s in samples if s.mel_lengths.numel()]
    if heard:
        mel = torch.cat([s.mel for s in heard], dim=1)
        lengths = torch.cat([s.mel_lengths for s in heard])
        expected = int(sum(((n - 1) // 2 + 1 - 2) // 2 + 1 for n in lengths.tolist()))
    else:
        mel, lengths = dummy_mel(spec)
        expected = 0
    assert index.numel() == expected, f"{index.numel()} audio placeholders, {expected} embeddings"
    return mel, lengths, index


def dummy_vision(spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """Return patches and grid of a single black token, for a rank without pictures."""
    merge = spec.merge_size
    width = 3 * spec.temporal_patch_size * spec.patch_size**2
    patches = torch.zeros(merge * merge, width, dtype=torch.uint8)
    return patches, torch.tensor([[1, merge, merge]])


def dummy_mel(spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """Return mel frames and their number, of a single silent token, for a rank without sound."""
    return torch.zeros(spec.num_mel_bins, DUMMY_MEL_FRAMES), torch.tensor([DUMMY_MEL_FRAMES])


def vision_kwargs(grid_thw: Tensor, spec: ModelSpec) -> dict[str, Tensor | int]:
    """Return what the vision tower takes precomputed; see `Batch`."""
    window_index, cu_window_seqlens = get_vision_window_index(
        grid_thw, spec.merge_size, spec.window_size, spec.patch_size
    )
    cu_seqlens = get_vision_cu_seqlens(grid_thw)
    return {
        "position_ids": get_vision_position_ids(grid_thw, spec.merge_size),
        "cu_seqlens": cu_seqlens,
        "max_seqlen": int(cu_seqlens.diff().max()),
        "window_index": window_index,
        "cu_window_seqlens": cu_window_seqlens,
        "max_window_seqlen": int(cu_window_seqlens.diff().max()),
    }


def audio_kwargs(chunk_lengths: Tensor, mel_lengths: Tensor) -> dict[str, Tensor | int]:
    """Return what the audio tower takes precomputed; see `Batch`."""
    cu_seqlens = get_audio_cu_seqlens(chunk_lengths)
    return {
        "chunk_lengths": chunk_lengths,
        "valid_indices": get_valid_indices(chunk_lengths),
        "pool_indices": get_pool_indices(mel_lengths),
        "cu_seqlens": cu_seqlens,
        "max_seqlen": int(cu_seqlens.diff().max()),
    }
