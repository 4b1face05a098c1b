"""Small media and sources in every format, for the tests of `prepare`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image
from transformers import PreTrainedTokenizerFast

from data_pipelines.prepare import Job
from data_pipelines.sources.base import SourceFormat, SourceOptions
from omni_train.data.tokenizer import train_tokenizer


def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    made = train_tokenizer(["write down what is said apple river"] * 3, vocab_size=320)
    made.save_pretrained(str(folder))
    return made


def wav(number: int, *, seconds: float = 0.2) -> bytes:
    sink = io.BytesIO()
    wave = 0.5 * np.sin(np.arange(round(seconds * 16000) + number) / 10).astype(np.float32)
    soundfile.write(sink, wave, 16000, format="WAV", subtype="PCM_16")
    return sink.getvalue()


def png(number: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (32 + number, 28), (number, 9, 9)).save(sink, "PNG")
    return sink.getvalue()


def write_media(folder: Path, count: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.wav").write_bytes(wav(number))
        (folder / f"{number}.png").write_bytes(png(number))


def write_lines(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def talks(folder: Path, count: int) -> Path:
    """JSON Lines with sound; every seventh row is broken in one way or another."""
    write_media(folder / "media", count)
    broken: list[Any] = [
        "{not json",
        {"audio": "media/none.wav", "text": "gone", "task": "asr"},
        {"audio": "media/bad.wav", "text": "damaged", "task": "asr"},
    ]
    (folder / "media" / "bad.wav").write_bytes(wav(1)[:200])
    rows = [
        broken[number // 7 % 3]
        if number % 7 == 6
        else {"audio": f"media/{number}.wav", "text": f"apple {number}", "task": "asr", "n": number}
        for number in range(count)
    ]
    return write_lines(folder / "talks.jsonl", rows)


def job(path: Path, out: Path, tokenizer_dir: Path, format_: str, **options: Any) -> Job:
    source = SourceOptions(
        **{
            "path": str(path),
            "format": SourceFormat[format_],
            "name": "set",
            "rows_per_chunk": 4,
            **options,
        }
    )
    return Job(source=source, out_dir=str(out), tokenizer_dir=str(tokenizer_dir))


def set_bytes(folder: Path) -> dict[str, bytes]:
    """What a user of the set reads, by file name."""
    names = ("*.tar", "*.parquet", "manifest.json", "rejected.jsonl")
    return {path.name: path.read_bytes() for name in names for path in folder.glob(name)}
