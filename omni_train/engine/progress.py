"""What the loop tells of a step: the `step` event, the progress line, the report of bad numbers.

Reports only; what is done about a step is decided in fit.py.
"""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Sequence
from functools import cache

import torch

from omni_train.engine.distributed import gather_json
from omni_train.engine.phases import Phases
from omni_train.engine.run import Run, log
from omni_train.engine.stragglers import spread
from omni_train.engine.types import MicroBatch, StepItem
from omni_train.engine.vote import Verdict
from omni_train.planning.constants import known_hardware, load_hardware


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
    phases: Phases,
    *,
    log_steps: int,
) -> dict[str, float]:
    """Return a step's figures; rank 0 writes them, and every `log_steps` a progress line.

    What is measured of the machine is measured by the rank that writes it alone.
    """
    figures = {"loss": verdict.loss, **verdict.metrics}
    if not run.is_main:
        return figures
    ranks = spread(verdict.own)
    seconds = sum(phases.seconds.values())
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
        seconds={name: round(value, 6) for name, value in phases.seconds.items()},
        rank_seconds=ranks,
        peak_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        cpu_cores=round((time.process_time() - phases.cpu_begun_s) / seconds, 2),
        load=round(os.getloadavg()[0], 2),
        disk_free_gib=round(shutil.disk_usage(run.dir).free / 2**30, 1),
        model_flops=verdict.flops,
        **used,
        tokens_by_source=item.tokens_by_source,
        position={"epoch": item.epoch, "window": item.window, "step": item.step},
        num_samples=verdict.num_samples,
        keys=verdict.keys,
    )
    if run.step % log_steps == 0:
        norm = verdict.grad_norm
        text = f"step {run.step} loss {verdict.loss:.4f} norm {norm:.3g} {rate:.0f} tok/s"
        if len(verdict.own) > 1:
            told = ", ranks {min:.3g} / {median:.3g} / {max:.3g} s, slowest {slowest}"
            text += told.format(**ranks)
        log.info("%s", text)
    return figures
