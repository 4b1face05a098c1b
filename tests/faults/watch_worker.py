"""Trains the engine tests' toy with a fault on purpose; started by test_watchdog.py on two ranks.

    python -m tests.faults.watch_worker RUN_DIR [FAULT]...

Each fault but the last gets a run of its own, RUN_DIR-FAULT.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from omni_train.engine.deepspeed import Engine, Precision
from omni_train.engine.distributed import get_world
from omni_train.engine.exit_codes import leave
from omni_train.engine.faults import FaultConfig, FaultKind, FaultPhase
from omni_train.engine.fit import fit
from omni_train.engine.fit_config import FitConfig
from omni_train.engine.run import RunConfig, start_run
from omni_train.engine.watchdog import WatchConfig
from omni_train.tracking.config import TrackingConfig
from tests.numerics.engine_worker import ToyLoader, build, toy_step

STEPS = 12
# No rank of the toy is in one phase for as long, whatever else the machine does.
STEP_S, FIRST_S = 10.0, 60.0
FAULT = FaultConfig(step=3, rank=1, phase=FaultPhase.forward)
RUNS = {
    "tracked": FaultConfig(),
    "slow": replace(FAULT, kind=FaultKind.slow, seconds=0.5),
    "hang": replace(FAULT, kind=FaultKind.hang),
    "hang_at_once": replace(FAULT, kind=FaultKind.hang, step=1),
    "hang_0": replace(FAULT, kind=FaultKind.hang, rank=0, phase=FaultPhase.data),
}


def holds_the_lock() -> None:
    """Wait in C without giving up the interpreter's lock: no thread of Python goes on.

    For a mutex that this thread has already, which no signal ends either.
    """
    library, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def is_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


# Of rank 1, or of rank 0 where the name ends so.
SILENCES = {"lock": holds_the_lock, "lock_0": holds_the_lock, "stopped": is_stopped}


def main() -> None:
    torch.set_num_threads(1)
    last = sys.argv[-1]
    for name in sys.argv[2:]:
        run_dir = sys.argv[1] if name == last else f"{sys.argv[1]}-{name}"
        train(run_dir, name)
    leave(0)


def train(run_dir: str, name: str) -> None:
    """Run the toy with one fault."""
    cfg = FitConfig(
        max_steps=STEPS,
        save_steps=100,
        watch=WatchConfig(first_s=STEP_S if name.endswith("at_once") else FIRST_S, step_s=STEP_S),
        fault=RUNS.get(name, FaultConfig()),
    )

    def silence(_engine: Engine, step: int) -> None:
        if step == FAULT.step and name in SILENCES and get_world().rank == (name != "lock_0"):
            SILENCES[name]()

    tracking = TrackingConfig(wandb=name == "tracked")
    with start_run(RunConfig(dir=run_dir), stage="toy", settings=cfg, tracking=tracking) as run:
        loader = Silent(silence) if name in SILENCES else ToyLoader(1, poison=None, empty=-1)
        fit(build(3, Precision.fp32), loader, toy_step, cfg, run)


class Silent(ToyLoader):
    """Falls silent while it fetches a step."""

    def __init__(self, fall: Any) -> None:
        super().__init__(1, poison=None, empty=-1)
        self._fall = fall

    def steps(self) -> Iterator[Any]:
        for item in super().steps():
            self._fall(None, item.step + 1)
            yield item


if __name__ == "__main__":
    main()
