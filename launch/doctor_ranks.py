"""What `omni-train doctor` has every rank do: time a collective, compare clocks, name software.

Usage, under torchrun: python -m launch.doctor_ranks. The first rank prints one JSON object.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist

from omni_train.engine.distributed import World, gather_json, init_distributed

MIB_GPU, MIB_CPU = 256, 16
_ROUNDS = 5
_PINGS = 20
_PACKAGES = ("torch", "deepspeed", "transformers", "trl")


def all_reduce_rate(world: World) -> float:
    """Return the bus bandwidth of a sum over all ranks in bytes per second; the best of some.

    2 (n - 1) / n of the bytes pass each rank, so that the figure does not depend on their number.
    """
    mib = MIB_GPU if world.device.type == "cuda" else MIB_CPU
    data = torch.ones(mib * 2**20 // 4, device=world.device)
    moved = 2 * (world.size - 1) / world.size * data.numel() * 4
    seconds = []
    for _ in range(_ROUNDS + 1):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(data)
        # The value is needed, so the device has finished.
        data[0].item()
        seconds.append(time.perf_counter() - start)
    return moved / min(seconds[1:])


def clock_offset(world: World, group: dist.ProcessGroup) -> float:
    """Return this rank's clock minus the first rank's, in seconds, measured as NTP does.

    The exchange with the shortest way there and back is the one to believe.

    Args:
        world: all ranks; each in turn talks to the first.
        group: gloo, as host clocks travel.
    """
    best = (float("inf"), 0.0)
    for peer in range(1, world.size):
        for _ in range(_PINGS if world.rank in (0, peer) else 0):
            if world.rank == 0:
                dist.recv(torch.zeros(1, dtype=torch.float64), src=peer, group=group)
                mine = torch.tensor([time.time()], dtype=torch.float64)
                dist.send(mine, dst=peer, group=group)
                continue
            sent = time.time()
            dist.send(torch.tensor([sent], dtype=torch.float64), dst=0, group=group)
            theirs = torch.zeros(1, dtype=torch.float64)
            dist.recv(theirs, src=0, group=group)
            back = time.time()
            best = min(best, (back - sent, (sent + back) / 2 - float(theirs)))
    return best[1]


def main() -> int:
    """Measure and print."""
    world = init_distributed()
    report: dict[str, Any] = {
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu",
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "offset_s": 0.0,
    }
    rate = None
    if world.size > 1:
        report["offset_s"] = clock_offset(world, dist.new_group(backend="gloo"))
        rate = all_reduce_rate(world)
    ranks = gather_json(report)
    if world.rank == 0:
        backend = dist.get_backend() if world.size > 1 else ""
        print(json.dumps({"ranks": ranks, "bytes_per_s": rate, "backend": backend}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
