"""Tokens and costs of a shard from its index as columns: no object per row.

The same figures as `measure`. Rows with video have a choice of frames to make, row by row, and are
handed to `measure`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from omni_train.data.image import smart_resize_many
from omni_train.data.measure import (
    AUDIO_COST_PER_CONV_FRAME,
    TOKENS_WHERE_ATTENTION_EQUALS_MATMUL,
    VISION_COST_PER_PATCH,
    Costs,
    measure,
)
from omni_train.data.media import num_samples_16k
from omni_train.data.types import IndexRow, MediaKind, ModelSpec, ProcessingConfig
from omni_train.speech.mel import num_audio_tokens, num_mel_frames

# A picture or a sound has a bos and an eos of its own.
_BRACKETS = 2
MEASURED_COLUMNS = (
    "num_text_tokens",
    "media.list.element.kind",
    "media.list.element.width",
    "media.list.element.height",
    "media.list.element.num_audio_samples",
    "media.list.element.sample_rate_hz",
)


def measure_table(
    table: pa.Table,
    config: ProcessingConfig,
    spec: ModelSpec,
    rows: Callable[[list[int]], list[IndexRow]],
) -> Costs:
    """Return tokens and costs of an index's rows; equals `measure` of the same rows.

    Args:
        table: with `MEASURED_COLUMNS` at least.
        config, spec: as for `measure`.
        rows: returns whole rows by their numbers; asked for those with video.
    """
    media = table.column("media").combine_chunks()
    num_media = np.diff(media.offsets.to_numpy()) if len(media) else np.empty(0, np.int64)
    owner = np.repeat(np.arange(table.num_rows), num_media)
    fields = media.flatten()
    kind = fields.field("kind")
    is_image, is_audio, is_video = (
        pc.equal(kind, k.name).to_numpy(zero_copy_only=False)
        for k in (MediaKind.image, MediaKind.audio, MediaKind.video)
    )
    patches = _image_patches(fields, is_image, config, spec)
    frames = _sound_frames(fields, is_audio)
    sound = num_audio_tokens(frames)
    tokens = patches // spec.merge_size**2 + sound + _BRACKETS
    text = table.column("num_text_tokens").to_numpy()
    num_tokens = text + _by_row(tokens, owner, table.num_rows).astype(np.int64)
    conv_frames = _by_row(np.where(sound > 0, (frames + 1) // 2, 0), owner, table.num_rows)
    costs = Costs(
        num_tokens=num_tokens,
        vision_cost=_by_row(patches, owner, table.num_rows) * VISION_COST_PER_PATCH,
        audio_cost=conv_frames * AUDIO_COST_PER_CONV_FRAME,
        llm_cost=num_tokens * (1.0 + num_tokens / TOKENS_WHERE_ATTENTION_EQUALS_MATMUL),
    )
    filmed = np.unique(owner[is_video])
    if len(filmed):
        exact = measure(rows(filmed.tolist()), config, spec)
        costs.num_tokens[filmed] = exact.num_tokens
        costs.vision_cost[filmed] = exact.vision_cost
        costs.audio_cost[filmed] = exact.audio_cost
        costs.llm_cost[filmed] = exact.llm_cost
    return costs


def _image_patches(
    fields: pa.StructArray, is_image: NDArray[np.bool_], config: ProcessingConfig, spec: ModelSpec
) -> NDArray[np.int64]:
    height = np.maximum(fields.field("height").to_numpy()[is_image], 1).astype(np.int64)
    width = np.maximum(fields.field("width").to_numpy()[is_image], 1).astype(np.int64)
    high, wide = smart_resize_many(
        height,
        width,
        factor=spec.patch_size * spec.merge_size,
        min_pixels=config.image_min_pixels,
        max_pixels=config.image_max_pixels,
    )
    patches = np.zeros(len(is_image), dtype=np.int64)
    patches[is_image] = (high // spec.patch_size) * (wide // spec.patch_size)
    return patches


def _sound_frames(fields: pa.StructArray, is_audio: NDArray[np.bool_]) -> NDArray[np.int64]:
    samples = np.where(is_audio, fields.field("num_audio_samples").to_numpy(), 0).astype(np.int64)
    rates = np.maximum(fields.field("sample_rate_hz").to_numpy(), 1).astype(np.int64)
    return num_mel_frames(num_samples_16k(samples, rates))


def _by_row(
    values: NDArray[np.int64], owner: NDArray[np.int64], num_rows: int
) -> NDArray[np.float64]:
    return np.bincount(owner, weights=values, minlength=num_rows).astype(np.float64)
