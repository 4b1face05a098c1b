"""Hashes of what a rank holds: of parameter groups, to prove what a stage changed, and of files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import xxhash
from torch import Tensor, nn

from omni_train.engine import shards
from omni_train.engine.deepspeed import Engine
from omni_train.engine.distributed import gather_json, get_world

_CHUNK_BYTES = 1 << 22


def update_with_tensor(digest: xxhash.xxh3_128, tensor: Tensor) -> None:
    """Feed a tensor's bytes, in its own dtype, to `digest`."""
    flat = tensor.detach().cpu().contiguous().flatten()
    digest.update(flat.view(torch.uint8).numpy().data)


def weights_hash(models: Sequence[nn.Module]) -> str:
    """Return xxh3-128 of names, shapes, dtypes and bytes of all parameters of plain models."""
    digest = xxhash.xxh3_128()
    for number, model in enumerate(models):
        for name, param in sorted(model.named_parameters()):
            assert not shards.is_partitioned(param), f"{name} is partitioned"
            digest.update(f"{number} {name} {tuple(param.shape)} {param.dtype}".encode())
            update_with_tensor(digest, param)
    return digest.hexdigest()


def group_hashes(engine: Engine) -> dict[str, str]:
    """Return a hash per named group, the same on every rank.

    Trained groups are hashed by their fp32 master weights, frozen ones as they are stored. The
    value depends on the number of ranks; compare hashes of one launch only. All ranks must call.
    """
    world = get_world()
    local: dict[str, str] = {}
    for group in engine.groups:
        digest = xxhash.xxh3_128()
        for name, param in group.params:
            piece = shards.piece_of(param, rank=world.rank, world_size=world.size)
            digest.update(f"{name}:{piece.start}:{piece.stop};".encode())
            if piece.length:
                read = shards.master if group.trainable else shards.frozen
                update_with_tensor(digest, read(param, piece))
        local[group.name] = digest.hexdigest()
    ranks = gather_json(local)
    return {
        group.name: xxhash.xxh3_128_hexdigest("".join(rank[group.name] for rank in ranks).encode())
        for group in engine.groups
    }


def file_hash(path: Path) -> str:
    """Return the xxh3-64 of a file as 16 hex digits."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return str(digest.hexdigest())


def keys_hash(keys: list[str]) -> int:
    """Return a 64-bit hash of a multiset of sample keys.

    The sum makes it independent of order, so that it stays the same when another number of ranks
    or another assignment of packs serves the same global step; add the ranks' values modulo 2**64.
    """
    return sum(xxhash.xxh3_64_intdigest(key.encode()) for key in keys) % (1 << 64)
