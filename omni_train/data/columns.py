"""Tokens and costs of a shard from its index as columns: no object per row.

The same figures as `measure`. How many frames a clip gives follows from its rate alone where that
is steady and taken at a fixed rate; other clips have a choice to make, frame by frame, and their
rows are handed to `measure`.
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
    VISION_COST_PER_PATCH,
    Costs,
    llm_cost,
    measure,
)
from omni_train.data.media import num_samples_16k
from omni_train.data.types import (
    FrameRate,
    IndexRow,
    MediaKind,
    ModelSpec,
    ProcessingConfig,
    SoundMismatch,
)
from omni_train.data.video import MICROSECONDS, RATE_TOLERANCE, TIME_GUARD_US
from omni_train.speech.mel import num_audio_tokens, num_mel_frames

# A picture or a sound has a bos and an eos of its own.
_BRACKETS = 2
MEASURED_COLUMNS = (
    "num_text_tokens",
    "media.list.element.kind",
    "media.list.element.width",
    "media.list.element.height",
    "media.list.element.num_frames",
    "media.list.element.frame_times_us.list.element",
    "media.list.element.fps",
    "media.list.element.has_audio",
    "media.list.element.use_audio",
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
        rows: returns whole rows by their numbers; asked for those whose clips are irregular.
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
    steady, patches[is_video] = _clip_patches(fields, is_video, config, spec)
    frames = _sound_frames(fields, is_audio, is_video)
    sound = num_audio_tokens(frames)
    # A clip with sound has the bos and eos of both.
    brackets = np.where(is_video & (sound > 0), 2 * _BRACKETS, _BRACKETS)
    tokens = patches // spec.merge_size**2 + sound + brackets
    text = table.column("num_text_tokens").to_numpy()
    num_tokens = text + _by_row(tokens, owner, table.num_rows).astype(np.int64)
    conv_frames = _by_row(np.where(sound > 0, (frames + 1) // 2, 0), owner, table.num_rows)
    costs = Costs(
        num_tokens=num_tokens,
        vision_cost=_by_row(patches, owner, table.num_rows) * VISION_COST_PER_PATCH,
        audio_cost=conv_frames * AUDIO_COST_PER_CONV_FRAME,
        llm_cost=llm_cost(num_tokens),
    )
    filmed = np.unique(owner[is_video][~steady])
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


def _clip_patches(
    fields: pa.StructArray, is_video: NDArray[np.bool_], config: ProcessingConfig, spec: ModelSpec
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Return, for each clip, whether its patches are known here, and how many they are.

    What `plan_clip` does for a clip at a steady rate: as frames lie closer than slots, no slot is
    empty, and the last frame's slot says how many there are.
    """
    clips = fields.filter(pa.array(is_video))
    count = clips.field("num_frames").to_numpy().astype(np.int64)
    fps = clips.field("fps").to_numpy()
    listed = pc.fill_null(pc.list_value_length(clips.field("frame_times_us")), 0).to_numpy()
    steady = (listed == 0) & (count > 1) & (fps > 0)
    if config.video_rate is not FrameRate.fixed or config.av_mismatch is SoundMismatch.trim:
        steady[:] = False
    before = np.maximum(count - 1, 0)
    last_us = np.rint(before * (MICROSECONDS / np.where(steady, fps, 1.0))).astype(np.int64)
    slots = np.floor((last_us + TIME_GUARD_US) * (config.video_fps / MICROSECONDS)) + 1
    slow = before * MICROSECONDS <= last_us * config.video_fps * RATE_TOLERANCE
    chosen = np.where(slow, count, slots).astype(np.int64)
    deep = spec.temporal_patch_size
    most = max(config.video_max_frames // deep * deep, deep)
    step_us = last_us // np.maximum(before, 1)
    # Rounding could leave a slot empty only where there are more frames than microseconds of one.
    steady &= (chosen <= most) | (step_us > np.maximum(count, TIME_GUARD_US))
    capped = np.minimum(
        (last_us + TIME_GUARD_US) * most // np.maximum(last_us + step_us, 1), most - 1
    )
    chosen = np.where(chosen > most, capped + 1, chosen)
    missing = -chosen % deep
    chosen += np.where(count - chosen >= missing, missing, 0)
    high, wide = smart_resize_many(
        np.maximum(clips.field("height").to_numpy(), 1).astype(np.int64),
        np.maximum(clips.field("width").to_numpy(), 1).astype(np.int64),
        factor=spec.patch_size * spec.merge_size,
        min_pixels=min(config.video_min_pixels, config.video_max_pixels),
        max_pixels=config.video_max_pixels,
    )
    area = (high // spec.patch_size) * (wide // spec.patch_size)
    return steady, area * -(-chosen // deep)


def _sound_frames(
    fields: pa.StructArray, is_audio: NDArray[np.bool_], is_video: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Return int64 [media]: mel frames, of sounds and of clips whose sound is used."""
    used = pc.and_(fields.field("has_audio"), fields.field("use_audio"))
    heard = is_audio | (is_video & used.to_numpy(zero_copy_only=False))
    samples = np.where(heard, fields.field("num_audio_samples").to_numpy(), 0).astype(np.int64)
    rates = np.maximum(fields.field("sample_rate_hz").to_numpy(), 1).astype(np.int64)
    return num_mel_frames(num_samples_16k(samples, rates))


def _by_row(
    values: NDArray[np.int64], owner: NDArray[np.int64], num_rows: int
) -> NDArray[np.float64]:
    return np.bincount(owner, weights=values, minlength=num_rows).astype(np.float64)
