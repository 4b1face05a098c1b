"""A place for hostile input, with files beside it that nothing may open."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.security.evil import SECRET
from tests.unit.data.clips import clip, every, tone


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory for the input, with a file in it that nothing may open."""
    (tmp_path / "in" / SECRET).mkdir(parents=True)
    secret = tmp_path / "in" / SECRET
    (secret / "clip.mp4").write_bytes(clip(every(5.0, 3), sound=tone(0.6, 16_000)))
    save_file({"w": torch.zeros(2)}, str(secret / "weights.safetensors"))
    return tmp_path / "in"
