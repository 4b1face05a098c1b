"""B1: TMRoPE ids of one document, against transformers' `get_rope_index`.

Two documents: 60 s of clip with sound at 2 fps (16.7 thousand tokens), and 18 pictures and 18
sounds in turn with text between. The peer gets its tensors ready made; its model holds no weights,
for its position code reads none. Positions are compared bit by bit first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from benchmarks.report import compare, parser, show
from omni_train.data.tokenizer import train_tokenizer
from omni_train.data.types import ModelSpec
from omni_train.models.config import ModelPreset, TinySizes
from omni_train.models.presets import build_config, model_spec
from omni_train.models.tmrope import (
    AudioSpan,
    ImageSpan,
    RopePositions,
    SoundVideoSpan,
    Span,
    TextSpan,
    rope_positions,
)


def clip() -> list[Span]:
    """60 s at 2 fps: a temporal patch each second, 253 tokens large, and 25 sound tokens."""
    times = np.arange(60, dtype=np.int64) * 1_000_000
    return [TextSpan(20), SoundVideoSpan(times, 11, 23, 60 * 25), TextSpan(20)]


def mix() -> list[Span]:
    """18 pictures of 6 x 8 tokens and 18 sounds of 3 s, text between."""
    items: list[Span] = []
    for _ in range(18):
        items += [TextSpan(5), ImageSpan(6, 8), TextSpan(5), AudioSpan(75)]
    return items


def ours(spans: list[Span], spec: ModelSpec) -> RopePositions:
    """Positions from what the data worker knows of a document."""
    return rope_positions(
        spans,
        positions_per_second=spec.positions_per_second,
        seconds_per_chunk=spec.seconds_per_chunk,
    )


def ids_of(
    spans: Sequence[Span], orders: Sequence[NDArray[np.bool_] | None], spec: ModelSpec
) -> Tensor:
    """Return ids int64 [1, T] with the placeholders of these spans."""
    tokens = spec.tokens
    ids: list[int] = []
    for span, order in zip(spans, orders, strict=True):
        match span:
            case TextSpan():
                ids += [tokens.im_end] * span.num_tokens
            case AudioSpan():
                ids += [tokens.audio_bos, *[tokens.audio] * span.num_tokens, tokens.audio_eos]
            case ImageSpan():
                inner = [tokens.image] * (span.height * span.width)
                ids += [tokens.vision_bos, *inner, tokens.vision_eos]
            case SoundVideoSpan():
                inner = np.where(order, tokens.audio, tokens.video).tolist()
                ids += [tokens.vision_bos, tokens.audio_bos, *inner]
                ids += [tokens.audio_eos, tokens.vision_eos]
            case _:
                raise AssertionError(f"no such span here: {span}")
    return torch.tensor([ids])


def peer_call(
    model: Qwen2_5OmniThinkerForConditionalGeneration, spans: list[Span], ids: Tensor
) -> Callable[[], Tensor]:
    """Return what gives transformers' positions int64 [3, T] of the same document."""
    pictures = [(1, 2 * s.height, 2 * s.width) for s in spans if isinstance(s, ImageSpan)]
    clips = [s for s in spans if isinstance(s, SoundVideoSpan)]
    grids = [(len(s.patch_times_us), 2 * s.height, 2 * s.width) for s in clips]
    sounds = [4 * s.num_tokens for s in spans if isinstance(s, AudioSpan)]
    sounds += [4 * s.num_audio_tokens for s in clips]
    inputs = {
        "input_ids": ids,
        "image_grid_thw": torch.tensor(pictures) if pictures else None,
        "video_grid_thw": torch.tensor(grids) if grids else None,
        "attention_mask": torch.ones_like(ids),
        "use_audio_in_video": bool(clips),
        "audio_seqlens": torch.tensor(sounds),
        "second_per_grids": torch.ones(len(clips)) if clips else None,
    }
    return lambda: model.get_rope_index(**inputs)[0][:, 0]


def main() -> int:
    """Run the table."""
    args = parser("TMRoPE ids against get_rope_index.").parse_args()
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(["the words do not matter here"], vocab_size=320)
    config = build_config(ModelPreset.tiny, tokenizer, TinySizes()).thinker_config
    spec = model_spec(config, tokenizer)
    with torch.device("meta"):
        model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    rows = []
    for name, spans, goal in (
        ("60 s of clip with sound", clip(), 100.0),
        ("36 media", mix(), 10.0),
    ):
        found = ours(spans, spec)
        ids = ids_of(spans, found.is_audio, spec)
        theirs = peer_call(model, spans, ids)
        assert np.array_equal(found.position_ids, theirs().numpy()), f"other positions: {name}"
        title = f"{name}, {ids.shape[1]} tokens"
        rows.append(
            compare(
                title,
                lambda spans=spans: ours(spans, spec),
                theirs,
                goal=goal,
                pairs=args.pairs,
                repeats=20,
            )
        )
    return show(rows, ("transformers", "numpy", "torch"), [], as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
