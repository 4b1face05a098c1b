"""How many tokens a sample has and what it costs, from its index row alone.

Done here: the exact token count of `encode` without touching media, and relative costs for the
plan. Not done here: packing (plan.py).

A spoken reply has a second length: its positions in the Talker. A pack respects both budgets where
each sample counts as the larger of its tokens and its share of the positions, in tokens
(`joint_tokens`).

Costs are multiplications of one training step, in units of one text token through the 7B Thinker
without attention, so that the three parts of a sample can be added:

    llm_cost    = T * (1 + T / 70,450)       6 * 7.07e9 per token, 6 * 28 * 3584 * T for attention
    vision_cost = 0.089 * P                  0.63e9 parameters per patch before the merge
    audio_cost  = 0.090 * ceil(L / 2)        0.635e9 parameters per frame after the convolutions
    talker_cost = 0.187 * S                  1.32e9 parameters per Talker position, part of llm_cost

Letters: T tokens, P patches, L mel frames, S Talker positions, R rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from omni_train.data.image import smart_resize_many
from omni_train.data.media import num_samples_16k
from omni_train.data.types import IndexRow, MediaInfo, MediaKind, ModelSpec, ProcessingConfig
from omni_train.data.video import ClipPlan, plan_clip
from omni_train.speech.mel import num_audio_tokens, num_mel_frames

# Matmul parameters of the released 7B model; see the module docstring.
TOKENS_WHERE_ATTENTION_EQUALS_MATMUL = 7.07e9 / (28 * 3584)
VISION_COST_PER_PATCH = 0.63 / 7.07
AUDIO_COST_PER_CONV_FRAME = 0.635 / 7.07
TALKER_COST_PER_POSITION = 1.32 / 7.07

Int64Array = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(slots=True)
class Costs:
    """Measured rows.

    Args:
        num_tokens: int64 [R], exactly what `encode` gives.
        vision_cost, audio_cost, llm_cost: float64 [R], relative, addable.
    """

    num_tokens: Int64Array
    vision_cost: FloatArray
    audio_cost: FloatArray
    llm_cost: FloatArray


def measure(rows: Sequence[IndexRow], config: ProcessingConfig, spec: ModelSpec) -> Costs:
    """Return tokens and costs of index rows. Pure: depends on nothing but its arguments.

    A row that `encode` refuses (say, sound too short for a token) is measured all the same.
    """
    owner = np.array([i for i, row in enumerate(rows) for _ in row.media], dtype=np.int64)
    media = [info for row in rows for info in row.media]
    is_image = _flags(info.kind is MediaKind.image for info in media)
    is_video = _flags(info.kind is MediaKind.video for info in media)

    plans = {int(i): plan_clip(media[i], config, spec) for i in np.flatnonzero(is_video)}
    patches = _num_patches(media, is_image, plans, config, spec)
    frames = _num_sound_frames(media, plans)
    sound = num_audio_tokens(frames)
    # A span has bos and eos; a clip with sound has both pairs.
    brackets = np.where(is_video & (sound > 0), 4, 2)
    tokens = patches // spec.merge_size**2 + sound + brackets

    text = np.array([row.num_text_tokens for row in rows], dtype=np.int64)
    num_tokens = text + _sum_by_row(tokens, owner, len(rows)).astype(np.int64)
    total_patches = _sum_by_row(patches, owner, len(rows))
    conv_frames = _sum_by_row(np.where(sound > 0, (frames + 1) // 2, 0), owner, len(rows))
    return Costs(
        num_tokens=num_tokens,
        vision_cost=total_patches * VISION_COST_PER_PATCH,
        audio_cost=conv_frames * AUDIO_COST_PER_CONV_FRAME,
        llm_cost=llm_cost(num_tokens),
    )


def llm_cost(num_tokens: Int64Array) -> FloatArray:
    """Return float64 [R]: the Thinker's cost of so many tokens int64 [R]."""
    costs: FloatArray = num_tokens * (1.0 + num_tokens / TOKENS_WHERE_ATTENTION_EQUALS_MATMUL)
    return costs


def talker_positions(
    num_tokens: Int64Array, num_reply_tokens: Int64Array, num_codes: Int64Array
) -> Int64Array:
    """Return the Talker positions int64 [R] of spoken replies, exactly those of `lay_out`.

    P + 2 + K (RECIPE.md section 5). The prompt's P tokens are all but the reply, its `<|im_end|>`
    and the newline behind it, and those two are as many as the speaker and the codec bos.

    Args:
        num_tokens: int64 [R], of the whole dialogues.
        num_reply_tokens: int64 [R], of the text that is spoken.
        num_codes: int64 [R], a reference's among them.
    """
    positions: Int64Array = num_tokens - num_reply_tokens + num_codes
    return positions


def joint_tokens(
    num_tokens: Int64Array, num_positions: Int64Array, *, token_budget: int, position_budget: int
) -> Int64Array:
    """Return int64 [R]: sizes such that a pack of `token_budget` keeps within both budgets.

    Each is the larger of a sample's tokens and of its positions in units of the token budget,
    rounded up; so their sum is at least that of either, and a sample over either is over both.
    """
    in_tokens = -(-num_positions * token_budget // position_budget)
    sizes: Int64Array = np.maximum(num_tokens, in_tokens)
    return sizes


def charge_talker(
    costs: Costs,
    num_tokens: Int64Array,
    num_positions: Int64Array,
    *,
    token_budget: int,
    position_budget: int,
) -> None:
    """Put what spoken samples take into their costs: sizes by both budgets, work of both models.

    Args:
        costs: of R samples.
        num_tokens, num_positions: int64 [R], of the Thinker and of the Talker.
        token_budget, position_budget: of a pack.
    """
    costs.num_tokens = joint_tokens(
        num_tokens, num_positions, token_budget=token_budget, position_budget=position_budget
    )
    costs.llm_cost = llm_cost(num_tokens) + num_positions * TALKER_COST_PER_POSITION


def _num_patches(
    media: list[MediaInfo],
    is_image: NDArray[np.bool_],
    plans: dict[int, ClipPlan],
    config: ProcessingConfig,
    spec: ModelSpec,
) -> Int64Array:
    """Return int64 [media]: vision patches before the merge; 0 for sound."""
    height = np.array([max(info.height, 1) for info in media], dtype=np.int64)
    width = np.array([max(info.width, 1) for info in media], dtype=np.int64)
    patches = np.zeros(len(media), dtype=np.int64)
    new_h, new_w = smart_resize_many(
        height[is_image],
        width[is_image],
        factor=spec.patch_size * spec.merge_size,
        min_pixels=config.image_min_pixels,
        max_pixels=config.image_max_pixels,
    )
    patches[is_image] = (new_h // spec.patch_size) * (new_w // spec.patch_size)
    for i, plan in plans.items():
        area = (plan.height // spec.patch_size) * (plan.width // spec.patch_size)
        patches[i] = area * -(-len(plan.frames) // spec.temporal_patch_size)
    return patches


def _num_sound_frames(media: list[MediaInfo], plans: dict[int, ClipPlan]) -> Int64Array:
    """Return int64 [media]: mel frames; 0 where there is no sound or it is left out."""
    samples = np.array(
        [
            plans[i].num_audio_samples if i in plans else info.num_audio_samples
            for i, info in enumerate(media)
        ],
        dtype=np.int64,
    )
    rates = np.array([max(info.sample_rate_hz, 1) for info in media], dtype=np.int64)
    return num_mel_frames(num_samples_16k(samples, rates))


def _flags(values: Iterable[bool]) -> NDArray[np.bool_]:
    return np.fromiter(values, dtype=np.bool_)


def _sum_by_row(values: Int64Array, owner: Int64Array, num_rows: int) -> FloatArray:
    return np.bincount(owner, weights=values, minlength=num_rows).astype(np.float64)
