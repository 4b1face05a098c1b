"""Thinker states on disk, so that a frozen Thinker runs once over each dialogue, not every epoch.

    DIR/<hash of what makes them>/<hash of the sample's name>.safetensors    `states` [tokens, E]

Many processes may write; a file appears whole or not at all. A changed Thinker has another hash, so
its states are never taken for the old ones. Nothing here runs a model.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omni_train.engine.hashing import update_with_tensor


def thinker_hash(model: nn.Module) -> str:
    """Return xxh3-128 of names, shapes, dtypes and bytes of all `thinker.` parameters.

    Args:
        model: a plain one; under ZeRO-3 the parameters are not there.
    """
    digest = xxhash.xxh3_128()
    for name, param in sorted(model.named_parameters()):
        if name.startswith("thinker."):
            assert not hasattr(param, "ds_id"), f"{name} is partitioned"
            digest.update(f"{name} {tuple(param.shape)} {param.dtype}".encode())
            update_with_tensor(digest, param)
    return digest.hexdigest()


class StateStore:
    """States of one Thinker.

    Args:
        folder: made if it is not there.
        thinker: names what makes the states: `thinker_hash`, and how media become tokens.
        width: E.
        dtype: of the states.
    """

    def __init__(self, folder: str | Path, *, thinker: str, width: int, dtype: torch.dtype) -> None:
        self._width, self._dtype = width, dtype
        self._folder = Path(folder) / thinker
        self._folder.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, states: Tensor) -> None:
        """Keep the states [tokens, E] of a sample; `name` is unique over all sources."""
        path = self._path(name)
        unfinished = path.with_suffix(f".tmp-{os.getpid()}")
        # A copy, for a slice would be refused or saved with the whole pack behind it.
        save_file({"states": states.detach().cpu().clone()}, unfinished, metadata={"name": name})
        unfinished.replace(path)

    def get(self, name: str, *, num_tokens: int) -> Tensor | None:
        """Return the states of a sample, or None where there are none for so many tokens.

        A file that cannot be read counts as missing: it is only a cache.
        """
        try:
            states: Tensor = load_file(self._path(name))["states"]
        except (OSError, SafetensorError, KeyError):
            return None
        return states if states.shape == (num_tokens, self._width) else None

    def has(self, name: str) -> bool:
        """Say whether there is a file of a sample's states; `get` may still find it unusable."""
        return self._path(name).is_file()

    @property
    def bytes_per_token(self) -> int:
        """Size of one token's state."""
        return self._width * self._dtype.itemsize

    def empty(self) -> Tensor:
        """Return the states [0, E] of no token."""
        return torch.empty(0, self._width, dtype=self._dtype)

    def _path(self, name: str) -> Path:
        return self._folder / f"{xxhash.xxh3_128_hexdigest(name.encode())}.safetensors"
