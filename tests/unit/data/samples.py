"""Samples with index rows made by probing, as an indexer makes them."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
from PIL import Image

from benchmarks import loads
from omni_train.data.chatml import MediaPiece, count_text_tokens, render
from omni_train.data.media import probe
from omni_train.data.tokenizer import special_tokens, train_tokenizer
from omni_train.data.types import IndexRow, ProcessingConfig, RawSample

TOKENIZER = train_tokenizer(["which word was said and what is on the picture"], vocab_size=330)
SPEC = replace(loads.SPEC, tokens=special_tokens(TOKENIZER))
CONFIG = ProcessingConfig(
    image_min_pixels=28 * 28,
    image_max_pixels=112 * 112,
    video_min_pixels=28 * 28,
    video_max_pixels=84 * 84,
)


def png(height: int, width: int, seed: int = 0) -> bytes:
    """Bytes of a noisy picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def raw_sample(messages: list[dict], media: dict[str, bytes]) -> RawSample:
    """A dialogue with its bytes and index row."""
    infos = []
    for piece in render(messages, TOKENIZER):
        if isinstance(piece, MediaPiece):
            info = probe(media[piece.member], piece.member)
            info.use_audio = piece.audio_in_video is not False
            infos.append(info)
    num_text, num_target = count_text_tokens(messages, TOKENIZER)
    row = IndexRow("sample", 0, 0, "", infos, num_text, num_target, task="test")
    return RawSample(row, {"messages": messages}, media)
