"""Reads any flat range of any parameter out of a checkpoint, whatever number of ranks wrote it.

Knows the safetensors keys; verifying bytes is checkpoint_files.py's, putting values into an engine
checkpoint.py's.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from omni_train.engine.checkpoint_files import (
    CheckpointError,
    Manifest,
    verify_checkpoint,
)

STATE = "state.json"
MASTER = "master"
FROZEN = "frozen"


def slice_key(kind: str, name: str, start: int) -> str:
    """Return the safetensors key of a slice: `master|thinker.lm_head.weight|4096`."""
    return f"{kind}|{name}|{start}"


@dataclass(frozen=True, slots=True)
class _Slice:
    start: int
    stop: int
    key: str
    file: Any


class CheckpointReader:
    """A `step-N` directory as named tensors.

    Args:
        path: the directory.
        verify: check size and hash of every file first; False where that has just been done.

    Raises:
        CheckpointError: the manifest or a file is not what was written.
    """

    def __init__(self, path: Path | str, *, verify: bool = True) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        if verify:
            problems = verify_checkpoint(self.path)
            if problems:
                found = "; ".join(f"{p.file}: {p.reason} ({p.detail})" for p in problems)
                raise CheckpointError(f"{self.path}: {found}")
        self._slices: dict[tuple[str, str], list[_Slice]] = {}
        folders = [(self.path, self.manifest.files)]
        if self.manifest.frozen:
            folders.append((self.path.parent / self.manifest.frozen, self.manifest.frozen_files))
        for folder, files in folders:
            for name in sorted(files):
                if name.endswith(".safetensors"):
                    self._index(folder / name)
        for slices in self._slices.values():
            slices.sort(key=lambda piece: piece.start)

    def _index(self, path: Path) -> None:
        try:
            file = safe_open(str(path), framework="pt")
            for key in file.keys():  # noqa: SIM118  not a dict
                kind, name, start = key.split("|")
                length = math.prod(file.get_slice(key).get_shape())
                piece = _Slice(int(start), int(start) + length, key, file)
                self._slices.setdefault((kind, name), []).append(piece)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from None

    def notes(self) -> dict[str, Any]:
        """Return what the run said of its model besides the tensors (`Engine.notes`)."""
        path = self.path / STATE
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("notes", {})
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: {error}") from None
        if not isinstance(found, dict):
            raise CheckpointError(f"{path}: notes are {found!r}")
        return found

    def names(self) -> list[str]:
        """Return the names of all parameters, frozen ones too."""
        return list(self.manifest.params)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a parameter's shape."""
        if name not in self.manifest.params:
            raise CheckpointError(f"{self.path}: has no parameter {name}")
        return tuple(self.manifest.params[name]["shape"])

    def is_trained(self, name: str) -> bool:
        """Return whether the stage that wrote this trained the parameter."""
        return bool(self.manifest.params[name]["trainable"])

    def full(self, name: str) -> Tensor:
        """Return a whole parameter: fp32 master weights if trained, else as it is kept."""
        shape = self.shape(name)
        kind = MASTER if self.is_trained(name) else FROZEN
        return self.range(name, 0, math.prod(shape), kind=kind).view(shape)

    def range(self, name: str, start: int, stop: int, *, kind: str) -> Tensor:
        """Return elements [start, stop) of the flattened parameter: [stop - start].

        Args:
            name: of the parameter.
            start, stop: flat range.
            kind: `master`, `exp_avg`, `exp_avg_sq` (fp32) or `frozen` (as kept).

        Raises:
            CheckpointError: no file holds part of the range.
        """
        parts: list[Tensor] = []
        reached = start
        for piece in self._slices.get((kind, name), []):
            if piece.stop <= reached or piece.start >= stop:
                continue
            if piece.start > reached:
                break
            upto = min(stop, piece.stop)
            stored = piece.file.get_slice(piece.key)
            parts.append(stored[reached - piece.start : upto - piece.start])
            reached = upto
        if reached < stop:
            where = f"[{reached}, {stop})"
            raise CheckpointError(f"{self.path}: {kind} of {name} lacks elements {where}")
        return torch.cat(parts) if len(parts) != 1 else parts[0]
