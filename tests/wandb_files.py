"""Reads what an offline W&B run wrote."""

from __future__ import annotations

from pathlib import Path

_BLOCK, _HEADER = 32_768, 7


def wandb_bytes(home: Path) -> bytes:
    """Content of the one `.wandb` file below `home`.

    A record that crosses into another block has that block's header in its middle.
    """
    (path,) = home.rglob("*.wandb")
    data = path.read_bytes()
    return b"".join(data[at + _HEADER : at + _BLOCK] for at in range(0, len(data), _BLOCK))
