"""TensorBoard as a view of `events.jsonl`: curves, scores and samples, rebuilt whenever asked.

Off unless `tracking.tensorboard=true`; the package `tensorboard` is an extra, and whether it is
there is asked before training starts.
"""

from __future__ import annotations

import importlib.util
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from omni_train.config.errors import ConfigError
from omni_train.tracking.curves import last_evaluations, read_curves
from omni_train.tracking.events import read_jsonl
from omni_train.tracking.samples import MediaType, SampleTable, media_type, read_tables

FOLDER = "tensorboard"


def check_installed() -> None:
    """Raise ConfigError where the package is not there."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            key="tracking.tensorboard",
            value=True,
            rule="the package tensorboard is not installed",
            remedy="pip install -c constraints.txt tensorboard, or leave it false",
        )


def write_tensorboard(run_dir: Path) -> Path:
    """Rebuild the view of a run and return its directory, `tensorboard/`.

    Args:
        run_dir: run directory.

    Raises:
        ConfigError: the package is not there.
        OSError: the directory cannot be written.
    """
    check_installed()
    from torch.utils.tensorboard import SummaryWriter

    events = list(read_jsonl(run_dir / "events.jsonl"))
    staging = run_dir / f"{FOLDER}.tmp-{uuid.uuid4().hex[:8]}"
    writer = SummaryWriter(log_dir=str(staging))
    points = read_curves(events)
    try:
        for point in points:
            for name, value in point.figures.items():
                writer.add_scalar(name, value, point.step, walltime=point.time)
        last = points[-1].step if points else 0
        for name, value in last_evaluations(events).items():
            writer.add_scalar(f"evaluation/{name}", value, last)
        for title, table in read_tables(run_dir, events).items():
            _add_table(writer, title, table, last)
    finally:
        writer.close()
    target = run_dir / FOLDER
    if target.exists():
        shutil.rmtree(target)
    return staging.replace(target)


def _add_table(writer: Any, title: str, table: SampleTable, step: int) -> None:
    """Add the texts as a Markdown table, and each file under the number of its row."""
    lines = ["| " + " | ".join(table.columns) + " |", "|---" * len(table.columns) + "|"]
    for number, row in enumerate(table.rows):
        cells = []
        for column, cell in zip(table.columns, row, strict=True):
            if isinstance(cell, Path):
                _add_file(writer, f"{title}/{number}/{column}", cell, step)
                cells.append(cell.name)
            else:
                cells.append("" if cell is None else str(cell).replace("|", "\\|"))
        lines.append("| " + " | ".join(" ".join(cell.split()) for cell in cells) + " |")
    writer.add_text(title, "\n".join(lines), step)


def _add_file(writer: Any, tag: str, path: Path, step: int) -> None:
    kind = media_type(path)
    if kind is MediaType.audio:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
        mono = torch.from_numpy(wave.mean(axis=1))
        writer.add_audio(tag, mono[None], step, sample_rate=rate)
    elif kind is MediaType.image:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        writer.add_image(tag, pixels, step, dataformats="HWC")
