"""Clips for the alignment probe: at every audio token, the colour on screen at that moment.

A clip with sound, encoded as for training, is cut behind its last placeholder; the id of a colour's
word is what each audio token has to predict. What differs between the arms is the order of the
clip's tokens and their positions; features, weights and samples are the same.

Letters: T tokens of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from omni_train.config.errors import DataError
from omni_train.data.encode import encode
from omni_train.data.fetch import fetch
from omni_train.data.tokenizer import encode_text
from omni_train.data.types import IGNORE_INDEX, EncodedSample, ModelSpec
from omni_train.data.work import PackMaker, PlannedSample

# One audio token stands for 40 ms (RECIPE.md section 4).
AUDIO_TOKEN_S = 0.04


class Arm(Enum):
    """What the probe is given.

    tmrope: as in training, 2 s blocks of video and audio in turn, positions in time.
    interleaved_1d: the same order, positions counted one by one. video_first_1d: all video, then
    all audio, counted one by one.
    """

    tmrope = "tmrope"
    interleaved_1d = "interleaved_1d"
    video_first_1d = "video_first_1d"

    def __str__(self) -> str:
        """Return the bare name, as a run directory has it."""
        return self.name


def probe_sample(
    sample: EncodedSample,
    slots: list[dict[str, Any]],
    arm: Arm,
    spec: ModelSpec,
    colors: dict[str, int],
) -> EncodedSample:
    """Return a clip as the probe sees it.

    Args:
        sample: one clip, whose sound starts with its picture; without sound it has no targets.
        slots: what is shown from `start_s` to `end_s`, with its `color`.
        arm: order and positions.
        spec: the model's ids.
        colors: id by colour.
    """
    tokens = spec.tokens
    media = (sample.input_ids == tokens.video) | (sample.input_ids == tokens.audio)
    # One more: a target is the label of the next place.
    end = int(torch.nonzero(media).max()) + 2
    ids, positions = sample.input_ids[:end], sample.position_ids[:, :end]
    if arm is not Arm.tmrope:
        positions = torch.arange(end).expand(3, end)
    if arm is Arm.video_first_1d:
        ids = _video_first(ids, media[:end], spec)
    labels = torch.full((end,), IGNORE_INDEX)
    audio = torch.nonzero(ids == tokens.audio).squeeze(1)
    for number, place in enumerate(audio.tolist()):
        color = _shown_at((number + 0.5) * AUDIO_TOKEN_S, slots)
        if color is not None:
            labels[place + 1] = colors[color]
    return replace(sample, input_ids=ids, position_ids=positions, labels=labels)


def _video_first(ids: Tensor, media: Tensor, spec: ModelSpec) -> Tensor:
    """Ids with the placeholders of video before those of audio; features keep their own order."""
    reordered = ids.clone()
    num_video = int((ids == spec.tokens.video).sum())
    places = torch.nonzero(media).squeeze(1)
    reordered[places[:num_video]] = spec.tokens.video
    reordered[places[num_video:]] = spec.tokens.audio
    return reordered


def _shown_at(time_s: float, slots: list[dict[str, Any]]) -> str | None:
    for slot in slots:
        if slot["start_s"] <= time_s < slot["end_s"]:
            return str(slot["color"])
    return None


@dataclass(slots=True)
class ProbeMaker(PackMaker):
    """Makes packs of probe samples; the schedule of a clip is in its record's `meta`.

    Args:
        arm: order and positions.
    """

    arm: Arm = Arm.tmrope

    def _encode(self, sample: PlannedSample) -> EncodedSample:
        raw = fetch(sample.shard, sample.row, self.store)
        slots = raw.record.get("meta", {}).get("slots")
        if not slots or len(raw.row.media) != 1:
            raise DataError("no_schedule", "the probe needs one clip with meta.slots")
        whole = encode(raw, self.tokenizer, self.config, self.spec)
        colors = {slot["color"]: encode_text(self.tokenizer, slot["color"])[0] for slot in slots}
        if len(set(colors.values())) != len(colors):
            raise DataError("ambiguous_colors", f"colours begin with the same token: {colors}")
        return probe_sample(whole, slots, self.arm, self.spec, colors)
