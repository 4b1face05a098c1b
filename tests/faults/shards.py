"""Small shards of real samples (text, some with sound), and the index made before any damage."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from data_pipelines.shards import Sample, write_shards
from omni_train.data.index import index_path, read_index
from omni_train.data.types import IndexRow
from tests.unit.data.samples import TOKENIZER

PROMPT = "Write down what is said."


@dataclass(slots=True)
class Whole:
    """A shard before it is damaged.

    Args:
        data: its bytes.
        rows: its index.
        members: bytes of every member by (key, member name).
    """

    data: bytes
    rows: list[IndexRow]
    members: dict[tuple[str, str], bytes]


def wav(seed: int, num_samples: int = 480) -> bytes:
    wave = np.random.default_rng(seed).uniform(-0.5, 0.5, num_samples)
    sink = io.BytesIO()
    soundfile.write(sink, wave, 16_000, format="WAV", subtype="PCM_16")
    return sink.getvalue()


def samples(prefix: str, count: int, *, num_samples: int = 480) -> list[Sample]:
    """Samples by turns: text alone, one sound, two sounds."""
    made = []
    for number in range(count):
        sounds = {f"{i}.wav": wav(31 * number + i, num_samples) for i in range(number % 3)}
        content: list[dict[str, str]] = [{"type": "audio", "audio": name} for name in sounds]
        content.append({"type": "text", "text": f"{PROMPT} ({number})"})
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": f"sample {number} of {prefix}"},
        ]
        made.append(Sample(f"{prefix}-{number:04d}", {"messages": messages}, sounds))
    return made


def write_set(
    folder: Path, *, num_shards: int, per_shard: int, num_samples: int = 480
) -> list[Whole]:
    """Write a set of shards with index and manifest; return what each holds."""
    made = samples("k", num_shards * per_shard, num_samples=num_samples)
    write_shards(made, folder, tokenizer=TOKENIZER, samples_per_shard=per_shard)
    return [read_whole(path) for path in sorted(folder.glob("*.tar"))]


def read_whole(path: Path) -> Whole:
    data, rows = path.read_bytes(), read_index(index_path(path))
    members = {}
    for row in rows:
        members[row.key, "json"] = data[row.json_offset : row.json_offset + row.json_size]
        for info in row.media:
            members[row.key, info.member] = data[info.offset : info.offset + info.size]
    return Whole(data, rows, members)
