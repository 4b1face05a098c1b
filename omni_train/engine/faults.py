"""Faults on purpose: a rank dies, hangs, lags, computes nonsense or finds no room at a known step.

What `omni-train chaos` and the tests use to see a run's protections at work. Without a fault in the
settings nothing here does anything.

    fit.fault.kind=kill fit.fault.step=3 fit.fault.rank=1 fit.fault.phase=backward
"""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto

from torch import Tensor

from omni_train.config.errors import ConfigError, check_at_least
from omni_train.engine.distributed import World

# Into the work of a phase, not to its first instruction; a phase that is shorter waits for the end.
_INSIDE_S = 0.02
# Of a file, while the disk is full: less than any checkpoint has.
_FULL_BYTES = 4096


class FaultKind(Enum):
    """What happens."""

    none = auto()
    kill = auto()
    hang = auto()
    slow = auto()
    poison = auto()
    stop = auto()
    disk = auto()


class FaultPhase(Enum):
    """In which part of a step; `save` is where a checkpoint's files are written."""

    data = auto()
    forward = auto()
    backward = auto()
    update = auto()
    save = auto()


@dataclass(kw_only=True, slots=True)
class FaultConfig:
    """A fault of one rank.

    Args:
        kind: `kill` is SIGKILL, `stop` SIGTERM, `hang` never goes on, `slow` sleeps in that step
            and all that follow, `poison` a loss that is no number, `disk` a limit on file sizes.
        step: global step, counted from 1.
        rank: that it happens to.
        phase: for kill, hang, slow and stop.
        seconds: that `slow` sleeps.
    """

    kind: FaultKind = FaultKind.none
    step: int = 1
    rank: int = 0
    phase: FaultPhase = FaultPhase.forward
    seconds: float = 1.0

    def __post_init__(self) -> None:
        check_at_least(self, "fit.fault", step=1, rank=0, seconds=0)


class Faults:
    """Lets the fault of the settings happen where the engine passes by; inert without one.

    Args:
        config: the fault; None for none.
        world: this process among the ranks.

    Raises:
        ConfigError: there is no such rank.
    """

    def __init__(self, config: FaultConfig | None = None, world: World | None = None) -> None:
        self._config = FaultConfig()
        if config is None or world is None or config.kind is FaultKind.none:
            return
        if config.rank >= world.size:
            raise ConfigError(
                key="fit.fault.rank",
                value=config.rank,
                rule=f"there are {world.size} ranks, counted from 0",
                remedy="name one of them",
            )
        if config.rank == world.rank:
            self._config = config

    @contextmanager
    def during(self, phase: str, step: int) -> Iterator[None]:
        """Let a fault of this phase and step happen inside the block."""
        kind = self._due(phase, step)
        if kind is FaultKind.kill:
            threading.Timer(_INSIDE_S, os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif kind is FaultKind.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        elif kind is FaultKind.hang:
            threading.Event().wait()
        elif kind is FaultKind.slow:
            time.sleep(self._config.seconds)
        if kind is not FaultKind.disk:
            yield
        else:
            with _full_disk():
                yield
        if kind is FaultKind.kill:
            threading.Event().wait()

    def poisoned(self, loss: Tensor, step: int) -> Tensor:
        """Return the loss, or one that is no number where that is the fault of this step."""
        due = self._config.kind is FaultKind.poison and self._config.step == step
        return loss * float("nan") if due else loss

    def _due(self, phase: str, step: int) -> FaultKind:
        config = self._config
        if config.kind is FaultKind.disk:
            there = phase == FaultPhase.save.name and step >= config.step
        else:
            reached = step >= config.step if config.kind is FaultKind.slow else step == config.step
            there = reached and phase == config.phase.name
        return config.kind if there else FaultKind.none


@contextmanager
def _full_disk() -> Iterator[None]:
    """Let this process write no more than a few bytes to a file, as a quota would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FULL_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
