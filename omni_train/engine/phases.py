"""Where a rank's training thread is, how long each part of a step took, and how much of that was
waiting for other ranks.

The loop enters phases; the watchdog's thread reads where it is. Ranks in lockstep take the same
time for a step, so a rank's own share is what is left without the time in collectives. On a GPU
collectives do not hold up the host, so there the own share is the host's: fetching data, mostly.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.distributed as dist

from omni_train.engine.faults import Faults


class Waits:
    """Counts and times the collectives that one thread of this process waits for."""

    def __init__(self) -> None:
        self.begun = 0
        self.seconds = 0.0
        self._thread = 0
        self._wait: Callable[..., Any] | None = None

    def count_here(self) -> None:
        """Count those of the calling thread from now on."""
        self._thread = threading.get_ident()
        if self._wait is None:
            # Every collective of torch and DeepSpeed ends in this method; there is no hook for it.
            self._wait, waits = dist.Work.wait, self

            def wait(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
                return waits._timed(work, *args, **kwargs)

            dist.Work.wait = wait  # type: ignore[method-assign, assignment]

    def _timed(self, work: dist.Work, *args: Any, **kwargs: Any) -> Any:
        assert self._wait is not None
        if threading.get_ident() != self._thread:
            return self._wait(work, *args, **kwargs)
        self.begun += 1
        start = time.perf_counter()
        try:
            return self._wait(work, *args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start


waits = Waits()


class Place(NamedTuple):
    """Where a rank is.

    Args:
        entered: phases entered and left so far; lockstep ranks pass the same ones.
        step: global step in progress, counted from 1.
        phase: such as `forward`, or `after forward`.
        since: when it was entered, on this process's monotonic clock.
    """

    entered: int
    step: int
    phase: str
    since: float


class Phases:
    """The phases of this rank's steps.

    Args:
        faults: what goes wrong in them on purpose.

    Attributes:
        place: where the training thread is now.
        seconds: by part of the current step.
        own: the same without waiting for other ranks; `update` is of the step before until this
            one's is done.
        cpu_begun_s: processor time of this process, threads included, when the step began.
        first_step: the first one after the start; 0 until it begins.
    """

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self.place = Place(0, 0, "start", time.monotonic())
        self.seconds: dict[str, float] = {}
        self.own: dict[str, float] = {}
        self.cpu_begun_s = time.process_time()
        self.first_step = 0
        waits.count_here()

    def next_step(self, step: int) -> None:
        """Begin global step `step`, counted from 1."""
        self.first_step = self.first_step or step
        self._enter("between steps", step)
        self.seconds, self.cpu_begun_s = {}, time.process_time()
        self.own = {"update": self.own.get("update", 0.0)}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Be in phase `name` for the length of the block, and add its time."""
        if name == "update":
            self.own[name] = 0.0
        self._enter(name, self.place.step)
        start, waited = time.perf_counter(), waits.seconds
        with self._faults.during(name, self.place.step):
            yield
        spent = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        self.own[name] = self.own.get(name, 0.0) + spent - (waits.seconds - waited)
        self._enter(f"after {name}", self.place.step)

    def _enter(self, name: str, step: int) -> None:
        self.place = Place(self.place.entered + 1, step, name, time.monotonic())
