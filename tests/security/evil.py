"""Files that try to run code or reach other files when they are read."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zipfile
from pathlib import Path

import torch

# Directory with the files that nothing may open.
SECRET = "secret"


class Command:
    """Becomes a shell command where a pickle is loaded as torch did before 2.6."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def zip_pickle(path: Path, marker: Path) -> Path:
    """A file of torch.save as it is today, with a command among its tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weight": torch.zeros(2), "extra": Command(marker)}, path)
    return path


def old_pickle(path: Path, marker: Path) -> Path:
    """The same in the format before 1.6: bare pickles one after the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"extra": Command(marker)}, path, _use_new_zipfile_serialization=False)
    return path


def text_pickle(path: Path, marker: Path) -> Path:
    """A pickle of protocol 0, which has no magic bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    return path


def repacked(path: Path, marker: Path) -> Path:
    """A file of torch.save whose pickle is compressed, as a bomb would be."""
    whole = zip_pickle(path.with_suffix(".whole"), marker)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return path


def allowed_name(path: Path, _marker: Path) -> Path:
    """A pickle that only asks for a harmless-looking class of the standard library."""
    import fractions

    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"a": fractions.Fraction(1, 3)}, path)
    return path


PICKLES = {
    "today's torch.save": zip_pickle,
    "torch.save before 1.6": old_pickle,
    "protocol 0": text_pickle,
    "compressed": repacked,
    "another class": allowed_name,
}


def safetensors_with(header: bytes) -> bytes:
    """A safetensors file of nothing but a header."""
    return struct.pack("<Q", len(header)) + header


# Files that call themselves safetensors.
BAD_SAFETENSORS = {
    "header of exabytes": struct.pack("<Q", 1 << 62) + b"{}",
    "tensor outside the file": safetensors_with(
        json.dumps({"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()
    ),
    "overlapping tensors": safetensors_with(
        json.dumps(
            {n: {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]} for n in ("a", "b")}
        ).encode()
    )
    + b"xx",
    "header nested too deep": safetensors_with(b"[" * 100_000),
}


def said(*media: tuple[str, str], text: str = "yes") -> bytes:
    """The JSON of a sample."""
    content = [{"type": kind, kind: member} for kind, member in media]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": text}]
    return json.dumps({"messages": turns}).encode()


def tar_of(path: Path, *members: tuple[str | tarfile.TarInfo, bytes]) -> Path:
    """A tar, whatever its members are called."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for named, data in members:
            info = named if isinstance(named, tarfile.TarInfo) else tarfile.TarInfo(named)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def special(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    """A member that is a link or a device."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info
