"""What one sample's picture shows, taken from the very arrays that the model would get.

Pixels come out of the encoded patches, kinds out of the ids, token times and blocks out of the
TMRoPE positions; only frame times and the waveform are read again from row and bytes. So the
picture shows what encoding did, not what it should have done.

Letters: T tokens of the sample, t temporal patches of a clip, S samples of sound, L mel frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from data_pipelines.lint import Encoding
from omni_train.data.chatml import media_pieces
from omni_train.data.media import decode_audio
from omni_train.data.types import (
    IGNORE_INDEX,
    EncodedSample,
    MediaInfo,
    MediaKind,
    ModelSpec,
    RawSample,
    SpecialTokens,
)
from omni_train.data.video import clip_zero_us, frame_times_us, plan_clip
from omni_train.speech.mel import HOP_SAMPLES, SAMPLE_RATE_HZ

Int64Array = NDArray[np.int64]
Pixels = NDArray[np.uint8]


class TokenKind(Enum):
    """What a token stands for; the value is its name in the legend."""

    text = "text"
    chat = "chat marker"
    bracket = "media bos / eos"
    image = "image"
    video = "video"
    audio = "audio"


@dataclass(frozen=True, slots=True)
class Block:
    """A stretch of two seconds of a medium.

    Args:
        start_s, end_s: on the medium's clock.
        num_video, num_audio: placeholders whose time lies in it.
        first, end: range of tokens that holds them, without `end`.
    """

    start_s: float
    end_s: float
    num_video: int
    num_audio: int
    first: int
    end: int


@dataclass(slots=True)
class MediumView:
    """One medium of the sample.

    Args:
        info: its index entry.
        first, end: its tokens, bos and eos included, without `end`.
        grid: tokens in time, height and width; zeros for sound.
        frames: pictures as the model gets them, with their time; the time of an image is 0.
        patch_times_s: float64 [t], time of each temporal patch as its position says.
        sound_times_s: float64 [audio tokens], likewise; each lasts 40 ms.
        wave: float32 [S] at 16 kHz; empty where there is no sound or it is left out.
        mel: float32 [bins, L].
        sound_start_s: when the sound starts on the medium's clock.
        duration_s: of the medium on its clock; 0 for an image.
        block_s: length of a block.
        blocks: stretches of so many seconds that hold tokens; empty for an image.
    """

    info: MediaInfo
    first: int
    end: int
    grid: tuple[int, int, int] = (0, 0, 0)
    frames: list[tuple[float, Pixels]] = field(default_factory=list)
    patch_times_s: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    sound_times_s: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    wave: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    mel: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    sound_start_s: float = 0.0
    duration_s: float = 0.0
    block_s: float = 0.0
    blocks: list[Block] = field(default_factory=list)

    @property
    def frame_s(self) -> float:
        """How long the last frame is taken to stay: as long as those before it on average."""
        return (self.frames[-1][0] - self.frames[0][0]) / max(1, len(self.frames) - 1)


@dataclass(slots=True)
class Timeline:
    """One sample, ready to draw.

    Args:
        shard, key: where it lies.
        facts: task, language, speaker and source, where it says them.
        turns: role and text of each turn, media as `[kind member]`.
        ids: int64 [T].
        supervised: bool [T], whether the loss reads the token.
        positions: int64 [3, T], time, height, width.
        kinds: one per token.
        pieces: one per token, the text of it; empty for media placeholders.
        media: in the order of the dialogue.
        token_s: length of one sound token.
    """

    shard: str
    key: str
    facts: dict[str, str]
    turns: list[tuple[str, str]]
    ids: Int64Array
    supervised: NDArray[np.bool_]
    positions: Int64Array
    kinds: list[TokenKind]
    pieces: list[str]
    media: list[MediumView]
    token_s: float

    @property
    def num_tokens(self) -> int:
        """Tokens T."""
        return len(self.ids)

    def runs(self) -> Iterator[tuple[int, int]]:
        """Ranges of neighbouring tokens of one kind and one side of the loss mask."""
        start = 0
        for at in range(1, self.num_tokens + 1):
            if at == self.num_tokens or (self.kinds[at], self.supervised[at]) != (
                self.kinds[start],
                self.supervised[start],
            ):
                yield start, at
                start = at


def build_timeline(shard: str, raw: RawSample, sample: EncodedSample, how: Encoding) -> Timeline:
    """Take a sample apart for drawing."""
    ids = sample.input_ids.numpy()
    kinds = _kinds(ids, how.spec.tokens)
    facts = {name: getattr(raw.row, name) for name in ("task", "language", "speaker", "source")}
    return Timeline(
        shard=shard,
        key=raw.row.key,
        facts={name: value for name, value in facts.items() if value},
        turns=[_turn(turn) for turn in raw.record["messages"]],
        ids=ids,
        supervised=sample.labels.numpy() != IGNORE_INDEX,
        positions=sample.position_ids.numpy(),
        kinds=kinds,
        pieces=_pieces(ids, kinds, how.tokenizer),
        media=_media(raw, sample, how),
        token_s=1.0 / how.spec.positions_per_second,
    )


def _kinds(ids: Int64Array, tokens: SpecialTokens) -> list[TokenKind]:
    known = {
        tokens.audio: TokenKind.audio,
        tokens.image: TokenKind.image,
        tokens.video: TokenKind.video,
        tokens.im_start: TokenKind.chat,
        tokens.im_end: TokenKind.chat,
    }
    for token in (tokens.audio_bos, tokens.audio_eos, tokens.vision_bos, tokens.vision_eos):
        known[token] = TokenKind.bracket
    return [known.get(token, TokenKind.text) for token in ids.tolist()]


def _pieces(
    ids: Int64Array, kinds: Sequence[TokenKind], tokenizer: PreTrainedTokenizerFast
) -> list[str]:
    placeholders = (TokenKind.image, TokenKind.video, TokenKind.audio)
    pieces = []
    for token, kind in zip(ids.tolist(), kinds, strict=True):
        text = "" if kind in placeholders else str(tokenizer.decode([token]))
        pieces.append(text.replace("\n", "\\n").replace("\t", "\\t"))
    return pieces


def _turn(turn: Mapping[str, Any]) -> tuple[str, str]:
    content = turn["content"]
    if isinstance(content, str):
        return turn["role"], content
    return turn["role"], " ".join(_item(item) for item in content)


def _item(item: Mapping[str, Any]) -> str:
    kind = item["type"]
    if kind == "text":
        return str(item["text"])
    value = item[kind]
    if isinstance(value, list):
        return f"[{kind} of {len(value)} pictures from {value[0]}]"
    return f"[{kind} {value}]"


def _media(raw: RawSample, sample: EncodedSample, how: Encoding) -> list[MediumView]:
    ids, positions = sample.input_ids.numpy(), sample.position_ids.numpy()
    grids = iter(sample.grid_thw.tolist())
    mels = iter(sample.mel.split(sample.mel_lengths.tolist(), dim=1))
    views: list[MediumView] = []
    at, patch = 0, 0
    pieces = media_pieces(raw.record["messages"])
    for info, piece in zip(raw.row.media, pieces, strict=True):
        first, end = _find_span(ids, at, info.kind, how.spec.tokens)
        at = end
        view = MediumView(info, first, end)
        is_sound = ids[first:end] == how.spec.tokens.audio
        if info.kind is not MediaKind.audio:
            deep, high, wide = next(grids)
            count = deep * high * wide
            merge = how.spec.merge_size
            view.grid = (deep, high // merge, wide // merge)
            pixels = unpatchify(sample.patches[patch : patch + count], (deep, high, wide), how.spec)
            patch += count
            _add_frames(view, pixels, how, with_sound=bool(is_sound.any()))
        if is_sound.any():
            view.mel = next(mels).numpy()
            wave = decode_audio(raw.media[piece.sound or piece.member], info).numpy()
            # The policy may use only the first part of a clip's sound.
            view.wave = wave[: view.mel.shape[1] * HOP_SAMPLES]
            if info.kind is MediaKind.video:
                zero = clip_zero_us(info, with_sound=True)
                view.sound_start_s = (info.audio_start_us - zero) / 1e6
        if info.kind is not MediaKind.image:
            _add_times(view, ids[first:end], positions[0, first:end], how.spec)
        views.append(view)
    return views


def _find_span(
    ids: Int64Array, start: int, kind: MediaKind, tokens: SpecialTokens
) -> tuple[int, int]:
    """Range of the next medium's tokens, bos and eos included."""
    audio = kind is MediaKind.audio
    bos = tokens.audio_bos if audio else tokens.vision_bos
    eos = tokens.audio_eos if audio else tokens.vision_eos
    first = start + int(np.flatnonzero(ids[start:] == bos)[0])
    return first, first + int(np.flatnonzero(ids[first:] == eos)[0]) + 1


def unpatchify(patches: Tensor, grid: tuple[int, int, int], spec: ModelSpec) -> Pixels:
    """Turn patches back into frames, uint8 [N, H, W, 3]: the inverse of `image.patchify`."""
    side, merge, deep = spec.patch_size, spec.merge_size, spec.temporal_patch_size
    num, high, wide = grid
    split = patches.reshape(num, high // merge, wide // merge, merge, merge, 3, deep, side, side)
    frames = split.permute(0, 6, 1, 3, 7, 2, 4, 8, 5)
    return frames.reshape(num * deep, high * side, wide * side, 3).numpy()


def _add_frames(view: MediumView, pixels: Pixels, how: Encoding, *, with_sound: bool) -> None:
    if view.info.kind is MediaKind.image:
        view.frames = [(0.0, pixels[0])]
        return
    chosen = plan_clip(view.info, how.config, how.spec).frames
    times = frame_times_us(view.info)[chosen] - clip_zero_us(view.info, with_sound=with_sound)
    # A last frame that only fills its temporal patch has no time of its own and is not shown.
    view.frames = [(us / 1e6, frame) for us, frame in zip(times.tolist(), pixels, strict=False)]


def _add_times(view: MediumView, ids: Int64Array, time_ids: Int64Array, spec: ModelSpec) -> None:
    """Fill token times, blocks and the length of a medium that has time."""
    tokens = spec.tokens
    seconds = (time_ids - time_ids[0] - 1) / spec.positions_per_second
    is_video, is_sound = ids == tokens.video, ids == tokens.audio
    per_patch = view.grid[1] * view.grid[2]
    view.patch_times_s = seconds[is_video][:: max(1, per_patch)]
    view.sound_times_s = seconds[is_sound]

    length = spec.seconds_per_chunk
    view.block_s = float(length)
    held = np.flatnonzero(is_video | is_sound)
    numbers = (seconds[held] // length).astype(np.int64)
    for number in np.unique(numbers):
        mine = held[numbers == number]
        view.blocks.append(
            Block(
                start_s=float(number * length),
                end_s=float((number + 1) * length),
                num_video=int(is_video[mine].sum()),
                num_audio=int(is_sound[mine].sum()),
                first=view.first + int(mine[0]),
                end=view.first + int(mine[-1]) + 1,
            )
        )
    sound_s = max(len(view.wave) / SAMPLE_RATE_HZ, view.mel.shape[1] * HOP_SAMPLES / SAMPLE_RATE_HZ)
    ends = [view.sound_start_s + sound_s] if len(view.wave) else []
    if view.frames:
        ends.append(view.frames[-1][0] + view.frame_s)
    # What the policy leaves out at the end is seen as an empty stretch.
    ends.append(view.info.duration_us / 1e6)
    view.duration_s = max([*ends, float(seconds[held].max()) + 1 / spec.positions_per_second])
