"""One sample's bytes -> ids, labels, TMRoPE positions, uint8 patches and log-mel frames.

    RawSample -> render (chatml.py) -> media spans -> rope_positions (models/tmrope.py)
              -> EncodedSample

Done here: decoding by the index row, media spans with their bos and eos, labels, the order of the
media arrays. Not done here: the chat format, packing, normalisation (on the device).

Letters: see types.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from omni_train.config.errors import DataError
from omni_train.data.chatml import MediaPiece, TextPiece, render
from omni_train.data.clip import decode_frames
from omni_train.data.image import check_aspect, patchify_each, resize_picture, smart_resize
from omni_train.data.media import (
    decode_audio,
    decode_picture,
    decode_pictures,
    num_samples_16k,
)
from omni_train.data.types import (
    IGNORE_INDEX,
    EncodedSample,
    MediaInfo,
    MediaKind,
    ModelSpec,
    ProcessingConfig,
    RawSample,
)
from omni_train.data.video import MICROSECONDS, audio_offset_us, patch_times_us, plan_clip
from omni_train.models.tmrope import (
    AudioSpan,
    ImageSpan,
    SoundVideoSpan,
    Span,
    TextSpan,
    VideoSpan,
    rope_positions,
)
from omni_train.speech.mel import log_mel, num_audio_tokens, num_mel_frames

Int64Array = NDArray[np.int64]
# What a media span counts as in the metrics.
_MODALITIES: dict[type[Span], str] = {
    AudioSpan: "audio",
    ImageSpan: "image",
    VideoSpan: "video",
    SoundVideoSpan: "audio_video",
}


@dataclass(slots=True)
class _Parts:
    """What has been collected of a sample so far; spans and texts are in the order of tokens."""

    config: ProcessingConfig
    spec: ModelSpec
    spans: list[Span] = field(default_factory=list)
    texts: list[TextPiece | None] = field(default_factory=list)
    patches: list[Tensor] = field(default_factory=list)
    grids: list[tuple[int, int, int]] = field(default_factory=list)
    mels: list[Tensor] = field(default_factory=list)


def encode(
    raw: RawSample,
    tokenizer: PreTrainedTokenizerFast,
    config: ProcessingConfig,
    spec: ModelSpec,
    *,
    add_generation_prompt: bool = False,
) -> EncodedSample:
    """Return a sample as the model sees it.

    Works for dialogues without supervised text too: then every label is -100.

    Args:
        raw: verified bytes and their index row.
        tokenizer: the run's tokenizer.
        config: how media become tokens.
        spec: what the model expects.
        add_generation_prompt: end in an open assistant turn (for generation; `measure` counts
            dialogues without it).

    Raises:
        DataError: with a reason code, where a medium cannot be decoded, does not match its index
            row (`stale_index`), or has no token to give (`empty_audio`).
    """
    messages = raw.record.get("messages")
    if not isinstance(messages, list):
        raise DataError("bad_messages", "the sample's JSON has no list of messages")
    parts = _Parts(config, spec)
    infos = iter(raw.row.media)
    for piece in render(messages, tokenizer, add_generation_prompt=add_generation_prompt):
        if isinstance(piece, TextPiece):
            _check_text(piece, spec)
            parts.spans.append(TextSpan(len(piece.ids)))
            parts.texts.append(piece)
            continue
        info = next(infos, None)
        if info is None or (info.kind, info.member) != (piece.kind, piece.member):
            found = f"{info.kind.value} {info.member}" if info else "nothing"
            raise DataError(
                "stale_index", f"dialogue names {piece.kind.value} {piece.member}, index {found}"
            )
        if missing := [name for name in piece.members if name not in raw.media]:
            raise DataError("missing_member", f"no bytes for {', '.join(missing)}")
        _add_medium(parts, piece, raw.media, info)
        parts.texts.append(None)
    return _assemble(parts, raw)


def _check_text(piece: TextPiece, spec: ModelSpec) -> None:
    """A media id inside text would shift every embedding after it."""
    tokens = spec.tokens
    if not {tokens.audio, tokens.image, tokens.video}.isdisjoint(piece.ids):
        raise DataError("media_id_in_text", "text holds the id of a media placeholder")


def _add_medium(parts: _Parts, piece: MediaPiece, media: dict[str, bytes], info: MediaInfo) -> None:
    if piece.kind is MediaKind.image:
        _add_image(parts, media[piece.member], info)
    elif piece.kind is MediaKind.audio:
        wave = decode_audio(media[piece.member], info)
        parts.spans.append(AudioSpan(_add_sound(parts, wave, info)))
    else:
        _add_clip(parts, piece, media, info)


def _add_image(parts: _Parts, data: bytes, info: MediaInfo) -> None:
    config = parts.config
    picture = decode_picture(data)
    if picture.size != (info.width, info.height):
        raise DataError(
            "stale_index",
            f"{info.member} is {picture.width}x{picture.height}, "
            f"the index has {info.width}x{info.height}",
        )
    size = smart_resize(
        info.height,
        info.width,
        factor=parts.spec.patch_size * parts.spec.merge_size,
        min_pixels=config.image_min_pixels,
        max_pixels=config.image_max_pixels,
    )
    _, height, width = _add_patches(parts, [resize_picture(picture, *size)], 1)
    parts.spans.append(ImageSpan(height, width))


def _add_clip(parts: _Parts, piece: MediaPiece, media: dict[str, bytes], info: MediaInfo) -> None:
    """Add a clip; its sound goes along where it has any, unless the dialogue leaves it out."""
    spec = parts.spec
    if len(piece.pictures) != (info.num_frames if info.parts else 0):
        raise DataError("stale_index", f"{info.member}: dialogue and index name other pictures")
    if (piece.audio_in_video is not False) != info.use_audio:
        raise DataError("stale_index", f"{info.member}: dialogue and index disagree on its sound")
    check_aspect(info.height, info.width)
    plan = plan_clip(info, parts.config, spec)
    if plan.dropped:
        raise DataError(
            "av_mismatch",
            f"the sound of {info.member} ends {plan.mismatch_us / MICROSECONDS:+.3f} s after its "
            "picture",
        )
    samples = num_samples_16k(plan.num_audio_samples, max(info.sample_rate_hz, 1))
    with_sound = num_audio_tokens(num_mel_frames(samples)) > 0
    if piece.audio_in_video and not with_sound:
        raise DataError("empty_audio", f"the sound of {info.member} is asked for; it has none")

    size = (plan.height, plan.width)
    frames: Iterable[Tensor]
    if piece.pictures:
        pictures = [media[piece.pictures[number]] for number in plan.frames]
        frames = decode_pictures(pictures, info, size=size)
    else:
        frames = decode_frames(media[piece.member], plan.frames, info, size=size)
    _, height, width = _add_patches(parts, frames, len(plan.frames))
    times = patch_times_us(
        info, plan.frames, temporal_patch_size=spec.temporal_patch_size, with_sound=with_sound
    )
    if with_sound:
        wave = decode_audio(media[piece.sound or piece.member], info)
        tokens = _add_sound(parts, wave[:samples], info)
        start_us = audio_offset_us(info)
        parts.spans.append(SoundVideoSpan(times, height, width, tokens, start_us))
    else:
        parts.spans.append(VideoSpan(times, height, width))


def _add_patches(parts: _Parts, frames: Iterable[Tensor], num_frames: int) -> tuple[int, int, int]:
    """Add the patches of one picture or clip; return its grid after the merge."""
    patches, grid = patchify_each(frames, num_frames, parts.spec)
    parts.patches.append(patches)
    parts.grids.append(grid)
    return grid[0], grid[1] // parts.spec.merge_size, grid[2] // parts.spec.merge_size


def _add_sound(parts: _Parts, wave: Tensor, info: MediaInfo) -> int:
    """Add the log-mel frames of one medium's sound [S]; return its tokens."""
    mel = log_mel(wave, parts.spec.num_mel_bins)
    tokens = num_audio_tokens(int(mel.shape[1]))
    if tokens == 0:
        raise DataError("empty_audio", f"{info.member} has {mel.shape[1]} mel frames, needs 3")
    parts.mels.append(mel)
    return tokens


def _assemble(parts: _Parts, raw: RawSample) -> EncodedSample:
    spec = parts.spec
    rope = rope_positions(
        parts.spans,
        positions_per_second=spec.positions_per_second,
        seconds_per_chunk=spec.seconds_per_chunk,
    )
    ids: list[Int64Array] = []
    labels: list[Int64Array] = []
    weights: list[NDArray[np.float32]] = []
    for span, text, is_audio in zip(parts.spans, parts.texts, rope.is_audio, strict=True):
        if text is not None:
            ids.append(np.asarray(text.ids, dtype=np.int64))
        else:
            ids.append(_span_ids(span, is_audio, spec))
        supervised = text is not None and text.supervised
        labels.append(ids[-1] if supervised else np.full_like(ids[-1], IGNORE_INDEX))
        weight = text.weight if text is not None and supervised else 1.0
        weights.append(np.full(len(ids[-1]), weight, dtype=np.float32))
    factors = torch.from_numpy(np.concatenate(weights))
    side = 3 * spec.temporal_patch_size * spec.patch_size**2
    media = [span for span in parts.spans if not isinstance(span, TextSpan)]
    return EncodedSample(
        key=raw.row.key,
        input_ids=torch.from_numpy(np.concatenate(ids)),
        labels=torch.from_numpy(np.concatenate(labels)),
        position_ids=torch.from_numpy(rope.position_ids),
        patches=_joined(parts.patches, torch.empty(0, side, dtype=torch.uint8), dim=0),
        grid_thw=torch.tensor(parts.grids, dtype=torch.int64).reshape(-1, 3),
        mel=_joined(parts.mels, torch.empty(spec.num_mel_bins, 0), dim=1),
        mel_lengths=torch.tensor([mel.shape[1] for mel in parts.mels], dtype=torch.int64),
        task=raw.row.task,
        modality="+".join(sorted({_MODALITIES[type(s)] for s in media})) or "text",
        label_weights=None if bool((factors == 1).all()) else factors,
    )


def _joined(parts: list[Tensor], empty: Tensor, *, dim: int) -> Tensor:
    """Return the parts one after the other; a single one, often tens of megabytes, uncopied."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([*parts, empty], dim=dim)


def _span_ids(span: Span, is_audio: NDArray[np.bool_] | None, spec: ModelSpec) -> Int64Array:
    """Return the ids of a media span: bos, placeholders, eos."""
    tokens = spec.tokens
    match span:
        case AudioSpan():
            inner = np.full(span.num_tokens, tokens.audio)
            bos, eos = [tokens.audio_bos], [tokens.audio_eos]
        case ImageSpan():
            inner = np.full(span.height * span.width, tokens.image)
            bos, eos = [tokens.vision_bos], [tokens.vision_eos]
        case VideoSpan():
            inner = np.full(len(span.patch_times_us) * span.height * span.width, tokens.video)
            bos, eos = [tokens.vision_bos], [tokens.vision_eos]
        case SoundVideoSpan():
            assert is_audio is not None, "a clip with sound has an order of placeholders"
            inner = np.where(is_audio, tokens.audio, tokens.video)
            bos = [tokens.vision_bos, tokens.audio_bos]
            eos = [tokens.audio_eos, tokens.vision_eos]
        case TextSpan():
            raise AssertionError("text carries its own ids")
    return np.concatenate([bos, inner, eos]).astype(np.int64)
