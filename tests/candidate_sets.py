"""Candidates with known sound, as `talker_candidates` leaves them: words, silence, cut ends."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from data_pipelines.voices import SAMPLE_RATE_HZ, speak
from omni_train.data.candidates import CANDIDATES_FILE
from omni_train.data.index import hash_file
from omni_train.data.tars import Sample, write_tar
from omni_train.speech.codec import dump_codes

# Text of a request, and what its candidates say: words, or a special sound.
SILENT, ENDLESS, NOTHING = "(silent)", "(endless)", "(nothing)"
REQUESTS: dict[str, tuple[str, list[str]]] = {
    "r0": ("river, doctor", ["river doctor", "river, doctor", "paper window", SILENT]),
    "r1": ("apple garden", ["apple garden", "apple river", ENDLESS, NOTHING]),
    "r2": ("...", ["river", "doctor"]),
    "r3": ("paper window", ["paper window", "paper", "window paper", "apple banana garden"]),
}


def wav(said: str) -> bytes:
    sink = io.BytesIO()
    wave = np.zeros(8000, np.float32) if said == SILENT else speak(said, "en-us")
    soundfile.write(sink, wave, SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    return sink.getvalue()


def request(key: str, text: str, said: list[str]) -> Sample:
    media: dict[str, bytes] = {}
    listed: list[dict[str, Any]] = []
    for number, words in enumerate(said):
        name, ended = f"sample-{number}", words != ENDLESS
        count = 0 if words == NOTHING else 10 * len(words.split()) + number
        listed.append({"name": name, "ended": ended, "num_codes": count})
        if count:
            media[f"{name}.wav"] = wav("river" if words == ENDLESS else words)
            media[f"{name}.codes.npy"] = dump_codes(torch.arange(count))
    asked = {"role": "user", "content": [{"type": "text", "text": f"say {text}"}]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": text}]}
    record = {"messages": [asked, reply], "speaker": "en-us", "language": "en", "text": text}
    return Sample(key, {**record, "candidates": listed, "model": "m"}, media)


def write_candidates(folder: Path, requests: dict[str, tuple[str, list[str]]] = REQUESTS) -> Path:
    """Write one request a shard; return the folder."""
    folder.mkdir(parents=True)
    shards = []
    for number, (key, (text, said)) in enumerate(requests.items()):
        tar = folder / f"shard-{number:06d}.tar"
        write_tar(tar, [request(key, text, said)])
        shards.append({"name": tar.name, "xxh3": hash_file(tar), "requests": [key]})
    record = {"model": "m", "shards": shards}
    (folder / CANDIDATES_FILE).write_text(json.dumps(record))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path there."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
