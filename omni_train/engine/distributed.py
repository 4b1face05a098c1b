"""Process group of a run, with or without torchrun, and the few collectives the engine needs.

Host-side exchanges go over gloo as numbers or JSON, never as pickled objects, also where the
tensors of the model travel over NCCL. Sharding of parameters is not here; DeepSpeed does that.
"""

from __future__ import annotations

import atexit
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, slots=True)
class World:
    """This process among all of the run.

    Args:
        rank: 0 .. size - 1.
        size: number of processes.
        local_rank: number of the process on its machine.
        device: where this process computes.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device


def get_world_size() -> int:
    """Return the number of processes that torchrun started, 1 without it; starts nothing."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def prepare_environment() -> None:
    """Tell DeepSpeed which device there is; it reads this once, when it is first imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # An optimiser that DeepSpeed imports is decorated with torch.compile, which imports all of
        # the compiler: 4 of the 15 processor seconds of a rank's start. Nothing here compiles on a
        # CPU.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # DeepSpeed insists on it, also where torchrun did not start the process.
    os.environ.setdefault("LOCAL_RANK", "0")
    # DeepSpeed calls collectives by names that torch renames; one line per step is too many.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def init_distributed() -> World:
    """Start the process group (gloo on CPU, gloo and NCCL on GPU) and return this process's place.

    Without torchrun a group of one process is made, with no port. Calling it again is harmless.
    """
    prepare_environment()
    if not dist.is_initialized():
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(_local_rank())
            backend = "cpu:gloo,cuda:nccl"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]  # it is public, but not listed
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        atexit.register(shutdown)
    return get_world()


def get_world() -> World:
    """Return this process's place; rank 0 of 1 where no process group was started."""
    local_rank = _local_rank()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if not dist.is_initialized():
        return World(rank=0, size=1, local_rank=local_rank, device=device)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device)


def is_main() -> bool:
    """Return whether this is rank 0, the only one that speaks and writes shared files."""
    return get_world().rank == 0


def barrier() -> None:
    """Wait for all ranks, over gloo."""
    sum_over_ranks([0])


def sum_over_ranks(values: Sequence[int]) -> list[int]:
    """Return the element-wise int64 sum over ranks of equally long lists."""
    total = torch.tensor(list(values), dtype=torch.int64)
    if get_world().size > 1:
        dist.all_reduce(total)
    return [int(value) for value in total.tolist()]


def new_group() -> dist.ProcessGroup | None:
    """Return a gloo group of all ranks for a thread of its own; None for one rank.

    Collectives of two groups do not wait for each other, so the thread may exchange while the
    model trains. All ranks must call.
    """
    if get_world().size == 1:
        return None
    return dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)


def shared_store(name: str) -> Any | None:
    """Return torch's store of keys that all ranks share under `name`; None for one rank.

    The launcher keeps them, so they can be read whatever state the other ranks are in.
    """
    if get_world().size == 1:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False)  # type: ignore[attr-defined]
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every rank's JSON-able `value`, in rank order, on every rank.

    Floats survive bit for bit, NaN and infinity included. The values may differ in length.

    Args:
        value: of this rank.
        group: of `new_group`; None for the ranks' common one.
    """
    size = get_world().size
    if size == 1:
        return [json.loads(json.dumps(value))]
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([payload.numel()]), group=group)
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: payload.numel()] = payload
    received = [torch.empty(longest, dtype=torch.uint8) for _ in range(size)]
    dist.all_gather(received, padded, group=group)
    return [
        json.loads(bytes(row[: int(length)].numpy().tobytes()))
        for row, length in zip(received, lengths, strict=True)
    ]


def shutdown() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
