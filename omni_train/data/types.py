"""The five types of the data path, and what a data worker knows of the model.

`IndexRow -> PackSpec -> RawSample -> EncodedSample -> Batch`

    index.py     IndexRow        a row of the Parquet index: where a sample lies, how large it is
    plan.py      PackSpec        samples that share one packed sequence; no media touched so far
    fetch.py     RawSample       verified bytes of one sample
    encode.py    EncodedSample   ids, labels, TMRoPE positions, uint8 patches, log-mel frames
    collate.py   Batch           one pack [1, T], with all that the forward pass needs precomputed

Letters: T tokens of a pack, S audio samples, L mel frames, P vision patches before the 2x2 merge,
N supervised tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni_train.config.errors import ConfigError
from omni_train.data.visibility import Segments

IGNORE_INDEX = -100


class MediaKind(Enum):
    """Kind of a medium; member names are what the index stores."""

    image = "image"
    audio = "audio"
    video = "video"


class FrameRate(Enum):
    """How many frames of a clip are used.

    `fixed` takes `video_fps`; `budget` starts there and lowers it, then the frame size, until the
    clip fits `video_max_tokens`.
    """

    fixed = "fixed"
    budget = "budget"


class SoundMismatch(Enum):
    """What becomes of a clip whose sound and picture end apart by more than the tolerance."""

    keep = "keep"
    trim = "trim"
    drop = "drop"


@dataclass(slots=True)
class MemberPlace:
    """A member of a sample: its name, and where its bytes lie in the shard."""

    member: str
    offset: int = 0
    size: int = 0
    xxh3: str = ""


@dataclass(slots=True)
class MediaInfo:
    """What probing one member of a shard found. Times are integers in microseconds.

    Args:
        kind: what the member holds.
        member: name inside the sample, without the key: `0.wav` for tar member `<key>.0.wav`; of
            a clip given as pictures the first one's.
        offset: byte offset of the member's data in the shard.
        size: number of bytes.
        xxh3: xxh3-64 of the bytes as 16 hex digits.
        width, height: pixels as displayed (after EXIF orientation); 0 for audio.
        num_frames: decoded video frames; 1 for an image; 0 for audio.
        frame_times_us: presentation time of each frame on the container's own clock; empty
            where frames are regular (then `first_frame_us + i * 1e6 / fps`).
        first_frame_us: presentation time of the first frame on the container's clock.
        fps: frames per second, measured from the timestamps; 0.0 for images and audio.
        keyframe_interval: frames between key frames (largest gap); 0 where it does not apply.
        has_audio: whether there is sound: always for audio, the clip's own fact for video.
        audio_start_us: presentation time of the first decoded sample on the container's clock.
        num_audio_samples: samples per channel as really decoded, at `sample_rate_hz`.
        sample_rate_hz, num_channels: of the sound; 0 where there is none.
        duration_us: of the whole medium, the longer of sound and picture; 0 for images.
        use_audio: False where the dialogue leaves the sound of a clip out (its item says
            `"audio_in_video": false`); not a fact of the file, so probing never sets it.
        parts: members of a clip given as pictures, one for each frame, then its sound if it names
            one; empty for a medium that is one member.
        first_sample: of a part of a long recording or clip, how many samples of the whole's sound
            come before it (split.py); None for a whole. An index holds wholes only.
    """

    kind: MediaKind
    member: str
    offset: int = 0
    size: int = 0
    xxh3: str = ""
    width: int = 0
    height: int = 0
    num_frames: int = 0
    frame_times_us: list[int] = field(default_factory=list)
    first_frame_us: int = 0
    fps: float = 0.0
    keyframe_interval: int = 0
    has_audio: bool = False
    audio_start_us: int = 0
    num_audio_samples: int = 0
    sample_rate_hz: int = 0
    num_channels: int = 0
    duration_us: int = 0
    use_audio: bool = True
    parts: list[MemberPlace] = field(default_factory=list)
    first_sample: int | None = None

    def places(self) -> list[MemberPlace]:
        """Every member that the medium is read from."""
        return self.parts or [MemberPlace(self.member, self.offset, self.size, self.xxh3)]


@dataclass(slots=True)
class SpeechInfo:
    """How the last turn of a dialogue is spoken: what the Talker learns, not what anyone hears.

    Args:
        member: name of its codes inside the sample, `reply.codes.npy`.
        offset, size, xxh3: of the codes, as in `MediaInfo`; 0 and empty where the sample has a
            sound and no codes yet.
        num_codes: codes of the speech codec; 0 where there are none yet.
        num_reply_tokens: ids of `text`, tokenised by itself, without `<|im_end|>`.
        text: what is spoken.
    """

    member: str
    offset: int
    size: int
    xxh3: str
    num_codes: int
    num_reply_tokens: int
    text: str


@dataclass(slots=True)
class IndexRow:
    """One sample of a shard, as the index describes it.

    Args:
        key: sample key, unique in the shard; `[A-Za-z0-9_-]+`.
        json_offset, json_size, json_xxh3: the `.json` member.
        media: the media members in the order in which the messages name them.
        num_text_tokens: ids of the rendered dialogue without media spans (media placeholders and
            their bos/eos ids are counted by `measure`), under the tokenizer whose hash the
            manifest carries.
        num_target_tokens: supervised ids among them.
        task, language, speaker, source: as the JSON member says; empty where it does not.
        content_hash: xxh3-128 of media, texts and replies as 32 hex digits, the same for exact
            duplicates; empty where quality was not measured.
        quality: scores by name (`filters.QUALITY`); a score that does not apply is missing.
        speech: of a dialogue with a spoken reply.
    """

    key: str
    json_offset: int
    json_size: int
    json_xxh3: str
    media: list[MediaInfo]
    num_text_tokens: int
    num_target_tokens: int
    task: str = ""
    language: str = ""
    speaker: str = ""
    source: str = ""
    content_hash: str = ""
    quality: dict[str, float] = field(default_factory=dict)
    speech: SpeechInfo | None = None


class SampleRef(NamedTuple):
    """Where the plan's sample lies: number of the source, of its shard and of the row in it.

    Of a spoken reply, which may be prepared in another way each time, `visit` counts how often the
    source has given it before; `reference` is the row of the speech that it continues, or -1.
    """

    source: int
    shard: int
    row: int
    visit: int = 0
    reference: int = -1


@dataclass(frozen=True, slots=True)
class PackSpec:
    """Samples that will share one packed sequence; empty where a rank only keeps in step.

    Args:
        samples: in the order in which they are packed.
        num_tokens: sum of the samples' tokens, at most the token budget.
        vision_cost, audio_cost, llm_cost: relative cost of each part (see `measure`).
        source_tokens: tokens of each source, by its number.
    """

    samples: tuple[SampleRef, ...] = ()
    num_tokens: int = 0
    vision_cost: float = 0.0
    audio_cost: float = 0.0
    llm_cost: float = 0.0
    source_tokens: tuple[int, ...] = ()


@dataclass(slots=True)
class RawSample:
    """Bytes of one sample, already checked against the index's hashes.

    Args:
        row: its index row.
        record: the parsed `.json` member (`messages` and the descriptive fields).
        media: bytes by member name (`0.wav`); the codes of a spoken reply where they were asked
            for.
    """

    row: IndexRow
    record: dict[str, Any]
    media: dict[str, bytes]


@dataclass(slots=True)
class EncodedSample:
    """One dialogue as the model sees it.

    Args:
        key: sample key.
        input_ids: int64 [T], placeholders repeated once per embedding.
        labels: int64 [T], already aligned with input_ids (not shifted); -100 is ignored.
        position_ids: int64 [3, T], TMRoPE time, height, width.
        patches: uint8 [P, 3 * temporal_patch_size * patch_size ** 2], images and video in the
            order of their placeholders.
        grid_thw: int64 [num_images + num_videos, 3], patches in time, height, width.
        mel: float32 [num_mel_bins, L], all clips of the sample one after the other.
        mel_lengths: int64 [num_audios], mel frames of each clip.
        source: name of the source that it was planned from, for metrics; empty elsewhere.
        task: task name, for metrics.
        modality: media of the dialogue, for metrics: `text` without any, else the kinds of media
            spans in it (image, video, audio, audio_video), sorted and joined by `+`.
        label_weights: float32 [T], factor of each label's loss; None where all are 1.
    """

    key: str
    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    patches: Tensor
    grid_thw: Tensor
    mel: Tensor
    mel_lengths: Tensor
    source: str = ""
    task: str = ""
    modality: str = "text"
    label_weights: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens T, placeholders counted one by one."""
        return int(self.input_ids.numel())


@dataclass(frozen=True, slots=True)
class SequencePlace:
    """This rank's place among those that share packs (sequence parallelism).

    Args:
        rank: 0 .. size - 1.
        size: ranks that share a pack; 1 where each has its own.
    """

    rank: int = 0
    size: int = 1


@dataclass(frozen=True, slots=True)
class Exchange:
    """How many embeddings of a tower this rank trades with each of those that share its pack.

    Args:
        send, receive: one number for each rank of the group; rows are in the pack's order.
    """

    send: list[int]
    receive: list[int]

    @classmethod
    def none(cls, place: SequencePlace) -> Exchange:
        """Return the exchange of a pack without such media."""
        return cls([0] * place.size, [0] * place.size)


@dataclass(slots=True)
class Batch:
    """One pack, ready for the forward pass; nothing in it needs a host sync on a GPU.

    A part that the pack lacks holds a minimal dummy medium, so that every rank calls both towers
    exactly once per micro-step; its index is empty and its output is multiplied by zero.

    Where ranks share a pack, T, N, P and the chunks are this rank's own; `segments` is of the whole
    pack, and the towers' embeddings are exchanged before they are placed (sequence.py).

    Args:
        keys: sample keys in pack order.
        input_ids: int64 [1, T].
        position_ids: int64 [4, 1, T]; row 0 restarts at each document, rows 1-3 are TMRoPE.
        segments: one for each document; their lengths add up to T.
        target_index: int64 [N], positions t whose hidden state predicts `target_ids`.
        target_ids: int64 [N].
        target_weights: float32 [N], positive; 0 only for the dummy target of a pack without
            supervision.
        num_target_tokens: supervised tokens of the pack (0 with the dummy).
        patches: uint8 [P, 3 * temporal_patch_size * patch_size ** 2].
        grid_thw: int64 [num_visuals, 3].
        vision_index: int64 [P / merge_size ** 2], positions in T; empty with the dummy.
        vision_kwargs: what the vision tower takes precomputed (`position_ids`, `cu_seqlens`,
            `window_index`, `cu_window_seqlens`, and the longest of either).
        mel_chunks: float32 [num_chunks, num_mel_bins, chunk_frames], padded 2 s chunks.
        mel_lengths: int64 [num_audios].
        audio_index: int64 [num_audio_tokens], positions in T; empty with the dummy.
        audio_kwargs: what the audio tower takes precomputed (`chunk_lengths`, `valid_indices`,
            `pool_indices`, `cu_seqlens` and the longest).
        bad: (source, shard, key, reason) of samples that were planned but could not be used.
        document_targets: supervised tokens of each document, in order; they add up to
            `num_target_tokens`.
        kinds: (source, task, modality) of the documents, each once.
        kind_targets: supervised tokens of each kind.
        target_kind: int64 [N], which kind a target belongs to.
        vision_exchange, audio_exchange: where ranks share the pack; else None.
        pack_signature: of the whole pack, where ranks share it; it is the same on all of them.
    """

    keys: list[str]
    input_ids: Tensor
    position_ids: Tensor
    segments: Segments
    target_index: Tensor
    target_ids: Tensor
    target_weights: Tensor
    num_target_tokens: int
    patches: Tensor
    grid_thw: Tensor
    vision_index: Tensor
    vision_kwargs: dict[str, Tensor | int]
    mel_chunks: Tensor
    mel_lengths: Tensor
    audio_index: Tensor
    audio_kwargs: dict[str, Tensor | int]
    bad: list[tuple[str, str, str, str]]
    document_targets: list[int]
    kinds: list[tuple[str, str, str]]
    kind_targets: list[int]
    target_kind: Tensor
    vision_exchange: Exchange | None = None
    audio_exchange: Exchange | None = None
    pack_signature: str = ""

    @property
    def num_tokens(self) -> int:
        """Tokens T of the pack."""
        return int(self.input_ids.shape[1])

    def to(self, device: torch.device) -> Batch:
        """Return the batch with every tensor on `device`; host-side numbers stay as they are."""
        moved: dict[str, Any] = {}
        for spec in fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, Tensor):
                value = value.to(device, non_blocking=True)
            elif isinstance(value, Segments):
                value = value.to(device)
            elif isinstance(value, dict):
                value = {
                    k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v
                    for k, v in value.items()
                }
            moved[spec.name] = value
        return Batch(**moved)


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of the Thinker's table that the chat format and the media spans use."""

    im_start: int
    im_end: int
    audio: int
    audio_bos: int
    audio_eos: int
    vision_bos: int
    vision_eos: int
    image: int
    video: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a data worker must know of the model; built from its config, small and picklable.

    Args:
        tokens: special ids.
        patch_size: pixels of one vision patch's side.
        temporal_patch_size: frames in one patch.
        merge_size: patches merged along each side into one token.
        window_size: pixels of the vision tower's attention window.
        num_mel_bins: mel bins.
        audio_chunk_frames: mel frames of one attention chunk of the audio tower (2 s).
        positions_per_second: TMRoPE ids per second of time.
        seconds_per_chunk: length of an interleaving block of video with sound.
        sequence: this rank among those that share packs with it.
    """

    tokens: SpecialTokens
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    window_size: int
    num_mel_bins: int
    audio_chunk_frames: int
    positions_per_second: int
    seconds_per_chunk: int
    sequence: SequencePlace = SequencePlace()


@dataclass(kw_only=True, slots=True)
class ProcessingConfig:
    """How media become tokens; part of the run's fingerprint.

    Args:
        image_min_pixels, image_max_pixels: area of a picture after resizing.
        video_min_pixels, video_max_pixels: area of a frame after resizing.
        video_rate: whether a clip is taken at one rate or within a budget of tokens.
        video_fps: frames per second taken from a clip at most; a slower clip keeps all its frames.
        video_min_fps: with `budget`, the rate below which frames become smaller instead.
        video_max_frames: a clip that would give more is taken at a lower rate.
        video_max_tokens: vision tokens of one clip at most; only with `budget`, else 0.
        av_mismatch: what becomes of a clip whose sound and picture end apart.
        av_mismatch_tolerance_s: by how much they may end apart.
    """

    image_min_pixels: int = 4 * 28 * 28
    image_max_pixels: int = 16384 * 28 * 28
    video_min_pixels: int = 128 * 28 * 28
    video_max_pixels: int = 768 * 28 * 28
    video_rate: FrameRate = FrameRate.fixed
    video_fps: float = 2.0
    video_min_fps: float = 0.5
    video_max_frames: int = 768
    video_max_tokens: int = 0
    av_mismatch: SoundMismatch = SoundMismatch.keep
    av_mismatch_tolerance_s: float = 0.5

    def __post_init__(self) -> None:
        if (self.video_max_tokens > 0) != (self.video_rate is FrameRate.budget):
            raise ConfigError(
                key="data.processing.video_max_tokens",
                value=self.video_max_tokens,
                rule="a budget of tokens belongs to video_rate=budget, and only to it",
                remedy="set video_rate=budget and a positive video_max_tokens, or neither",
            )
        budget = self.video_rate is FrameRate.budget
        if self.video_fps <= 0 or (budget and not 0 < self.video_min_fps <= self.video_fps):
            raise ConfigError(
                key="data.processing.video_fps",
                value=self.video_fps,
                rule="a rate is positive, and with video_rate=budget not below video_min_fps",
                remedy=f"use at least {self.video_min_fps}",
            )
        if self.av_mismatch_tolerance_s < 0:
            raise ConfigError(
                key="data.processing.av_mismatch_tolerance_s",
                value=self.av_mismatch_tolerance_s,
                rule="a tolerance is not negative",
                remedy="use 0 or more",
            )
