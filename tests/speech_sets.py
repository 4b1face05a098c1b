"""Sets of shards with spoken replies, made of codes alone: every word has a sound of its own.

A word spoken by a voice is always the same few codes, so a Talker can learn them in some steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from data_pipelines.shards import Sample, write_shards
from omni_train.data.index import Manifest
from omni_train.speech.codec import dump_codes
from tests.faults.shards import wav

WORDS = ("apple", "banana", "garden", "window", "yellow", "monday", "summer", "winter")
VOICES = ("<|speaker_0|>", "<|speaker_1|>")
# More than letters: a reference's codes must outlast its text, which is spelled out here.
CODES_PER_WORD = 8
NUM_CODES = 96


def codes_of(text: str, voice: str) -> Tensor:
    """Codes int64 [words * CODES_PER_WORD]."""
    found = []
    for word in text.split():
        seed = sum(word.encode()) + 1000 * VOICES.index(voice)
        found.append(np.random.default_rng(seed).integers(0, NUM_CODES, CODES_PER_WORD))
    return torch.from_numpy(np.concatenate(found))


def spoken_sample(
    key: str, text: str, voice: str = VOICES[0], *, heard: bytes | None = None, **fields: Any
) -> Sample:
    """A dialogue whose reply is spoken; with a sound that the user sends, if there is one."""
    question: list[dict[str, str]] = [{"type": "text", "text": f"Say: {text}"}]
    media: dict[str, bytes] = {"reply.codes.npy": dump_codes(codes_of(text, voice))}
    if heard is not None:
        question.insert(0, {"type": "audio", "audio": "0.wav"})
        media["0.wav"] = heard
    reply = [{"type": "text", "text": text}, {"type": "speech", "speech": "reply.codes.npy"}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": reply},
    ]
    return Sample(key, {"messages": messages, "speaker": voice, "language": "en", **fields}, media)


def some_samples(count: int, *, seed: int = 0) -> list[Sample]:
    """Utterances of one to three words in two voices; every fourth user sends a sound."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        text = " ".join(rng.choice(WORDS, int(rng.integers(1, 4)), replace=False))
        heard = wav(number, 4800) if number % 4 == 0 else None
        made.append(spoken_sample(f"s-{number:04d}", text, VOICES[number % 2], heard=heard))
    return made


def write_set(
    folder: Path,
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerFast,
    *,
    samples_per_shard: int = 32,
) -> Manifest:
    """Write the shards of a set."""
    return write_shards(samples, folder, tokenizer=tokenizer, samples_per_shard=samples_per_shard)
