"""Pickles of others: refused, or read by torch's restricted reader where they must be.

A pickle is a program. Nothing of ours is one; the two places that have to read one, a released
table of speakers and DeepSpeed's checkpoints, come through `load_tensors`, which builds tensors and
plain containers and calls nothing else.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from omni_train.config.errors import DamagedError, UnsafeError

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_GLOBAL = re.compile(r"(?:GLOBAL|global:?|class) `?([\w.]+\.[\w.]+)")
_SAFE_REMEDY = "have its owner save it as safetensors"


def refuse_pickles(folder: Path, *, key: str) -> None:
    """Return if a directory has safetensors, or else no weights at all.

    Raises:
        UnsafeError: its weights are pickles; names the first of them.
    """
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path for suffix in _PICKLES for path in folder.rglob(suffix))
    if pickles:
        raise UnsafeError(
            key=key,
            value=str(folder),
            rule=f"{pickles[0].relative_to(folder)} is a pickle, which can run code",
            remedy=f"{_SAFE_REMEDY}; of DeepSpeed's directories: omni-train checkpoint convert",
        )


def load_tensors(path: Path, *, key: str, stand_ins: Mapping[str, type] | None = None) -> Any:
    """Return the tensors and plain containers of a file that `torch.save` wrote.

    Args:
        path: of the file; its tensors stay mapped from it, on the CPU.
        key: setting that named it, for the message.
        stand_ins: class by the full name under which the file has it; each is one of ours that
            only holds what it is given, so that no class of the file's own choice is ever made.

    Raises:
        UnsafeError: it names anything else, or is compressed (a bomb).
        DamagedError: it is no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [
                i.filename for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED
            ]
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        # Older files are one bare pickle; torch would read them with fewer checks.
        raise _unsafe(key, path, f"not a file of torch.save since 1.6 ({error})") from None
    if packed:
        raise _unsafe(key, path, f"{packed[0]!r} in it is compressed; torch never does that")
    allowed: list[Any] = [(made, name) for name, made in (stand_ins or {}).items()]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001  a hostile file may raise anything
        # Not torch's own text: it advises to switch the restriction off.
        if type(error).__name__ == "UnpicklingError":
            named = _GLOBAL.search(str(error))
            what = f"asks for {named[1]}" if named else "does more than hold tensors"
            raise _unsafe(key, path, f"its pickle {what}") from None
        reason = " ".join(str(error).split())[:200]
        raise DamagedError(
            key=key,
            value=str(path),
            rule=f"cannot be read ({type(error).__name__}: {reason})",
            remedy="copy it again",
        ) from None


def _unsafe(key: str, path: Path, rule: str) -> UnsafeError:
    return UnsafeError(key=key, value=str(path), rule=rule, remedy=_SAFE_REMEDY)
