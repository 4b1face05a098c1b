"""What the loop tells of a step: the `step` event, the progress line, the report of bad numbers.

Reports only; what is done about a step is decided in fit.py.
"""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch

from omni_train.engine.distributed import gather_json
from omni_train.engine.run import Run, log
from omni_train.engine.types import MicroBatch, StepItem
from omni_train.engine.vote import Verdict
from omni_train.planning.constants import known_hardware, load_hardware


@dataclass(slots=True)
class Clock:
    """Host seconds by part of a step; on a GPU the vote waits for the device.

    Args:
        seconds: by name of the part.
        cpu_begun_s: processor time of this process, threads included, when the step began.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_begun_s: float = field(default_factory=time.process_time)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@cache
def device_peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of a device that constants.yaml describes; None of any other.

    MFU is `thinker_flops` (PERF.md's definition, nothing recomputed counted) over seconds, devices
    and this.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = next((key for key in known_hardware() if key.upper() in name.upper()), None)
    return load_hardware(known).peak_flops if known else None


def report_non_finite(
    verdict: Verdict, batches: Sequence[MicroBatch], run: Run, *, step: int
) -> None:
    """Record which ranks and samples made a step non-finite; all ranks must call."""
    keys = gather_json([batch.keys for batch in batches])
    for rank, micro_steps in verdict.offenders.items():
        # Of ranks that share a pack the first one has its keys.
        named = next((keys[r] for r in range(rank, -1, -1) if any(keys[r])), keys[rank])
        suspects = [named[number] for number in micro_steps] or named
        what = "loss" if micro_steps else "gradient"
        run.event("non_finite", step=step, rank=rank, what=what, keys=suspects)
        if run.is_main:
            log.warning("step %d skipped: %s of rank %d, samples %s", step, what, rank, suspects)


def log_step(
    run: Run,
    item: StepItem,
    verdict: Verdict,
    lrs: dict[str, float],
    clock: Clock,
    *,
    log_steps: int,
) -> dict[str, float]:
    """Write the `step` event and, every `log_steps`, a progress line; return the figures."""
    seconds = sum(clock.seconds.values())
    rate = verdict.all_tokens / seconds
    peak = device_peak_flops(run.world.device)
    used = {"mfu": round(verdict.flops / seconds / run.world.size / peak, 4)} if peak else {}
    if run.world.device.type == "cuda":
        # What the allocator holds, so that a plan can learn what lies beyond its formulas.
        used["peak_device_mib"] = torch.cuda.max_memory_reserved(run.world.device) // 2**20
    run.event(
        "step",
        step=run.step,
        loss=verdict.loss,
        tokens=verdict.all_tokens,
        target_tokens=verdict.num_tokens,
        tokens_per_s=round(rate, 1),
        grad_norm={"total": verdict.grad_norm, **verdict.group_norms},
        lr=lrs,
        applied=verdict.finite and verdict.num_tokens > 0,
        metrics=verdict.metrics,
        seconds={name: round(value, 6) for name, value in clock.seconds.items()},
        peak_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        cpu_cores=round((time.process_time() - clock.cpu_begun_s) / seconds, 2),
        load=round(os.getloadavg()[0], 2),
        disk_free_gib=round(shutil.disk_usage(run.dir).free / 2**30, 1),
        model_flops=verdict.flops,
        **used,
        tokens_by_source=item.tokens_by_source,
        position={"epoch": item.epoch, "window": item.window, "step": item.step},
        num_samples=verdict.num_samples,
        keys=verdict.keys,
    )
    if run.is_main and run.step % log_steps == 0:
        norm = verdict.grad_norm
        log.info("step %d loss %.4f norm %.3g %.0f tok/s", run.step, verdict.loss, norm, rate)
    return {"loss": verdict.loss, **verdict.metrics}
