"""Ends a run that hangs: names rank and phase, leaves every rank's stacks, code 79.

A thread on each rank tells the others over a gloo group of their own, every few seconds, where its
training thread is. All reach the same verdict from the same reports: a hang is a rank that nobody
is behind and that has been in one phase for longer than the limit; who only waits for it is ahead.
A rank that does not even report (stopped, or in a C call that holds the interpreter's lock) leaves
the exchange unfinished; who lives then says so in the launcher's store, and the others are named.

Nothing the training thread does can hold this up: the process is ended under it, and should this
thread get stuck too, a timer of the C library writes the stacks and ends the process.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType
from typing import IO, Self

import torch
import torch.distributed as dist

from omni_train.config.errors import check_fields
from omni_train.engine.distributed import COLLECTIVE_TIMEOUT, new_group, shared_store
from omni_train.engine.exit_codes import ExitCode, RunError
from omni_train.engine.phases import Phases, waits
from omni_train.engine.run import Run, log, record_failure

BEAT_S = 2.0
# For ranks whose exchange broke off to say that they live, and to leave their stacks.
_ALIVE_S = 4.0
_STACKS_S = 5.0
# After which the C library ends a process whose watchdog does not; later than the others' verdict.
_STUCK_S = _ALIVE_S + 2 * BEAT_S
_REPORT_BYTES = 512
# Phases that have no usual length.
_LONG = ("start", "checkpoint", "every")
_numbers = itertools.count()


@dataclass(kw_only=True, slots=True)
class WatchConfig:
    """How long a rank may stay in one phase of a step, and how slow it may be.

    Args:
        first_s: seconds until the first step of a start is done, and at any time for saving and
            for what runs every so many steps: caches fill, kernels are compiled, a disk is slow.
        step_s: seconds in a phase of any later step: data, forward, backward, vote, update.
        slow_ratio: a rank whose own work takes so many times the ranks' median is reported; 0 for
            no such report.
    """

    first_s: float = 1500.0
    step_s: float = 600.0
    slow_ratio: float = 1.5

    def __post_init__(self) -> None:
        longest = COLLECTIVE_TIMEOUT.total_seconds()
        rules = [
            ("step_s", self.step_s >= 1, "must be at least 1"),
            ("first_s", self.step_s <= self.first_s, f"is less than step_s={self.step_s:g}"),
            ("first_s", self.first_s < longest, f"collectives give up after {longest:g} s"),
            ("slow_ratio", self.slow_ratio == 0 or self.slow_ratio > 1, "must be above 1, or 0"),
        ]
        check_fields(self, "fit.watch", *rules, remedy="give another number")


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank says of itself.

    Args:
        entered, begun: phases entered, and collectives waited for, since the start.
        step, phase: where it is.
        seconds, limit_s: since when, and how long it may be there.
        at: line of code that its training thread is in.
        leaving: whether it has left training.
    """

    entered: int
    begun: int
    step: int
    phase: str
    seconds: float
    limit_s: float
    at: str
    leaving: bool


def hung_ranks(beats: Sequence[Beat]) -> list[int]:
    """Return the ranks that hang: those furthest behind, where one of them is over its limit."""
    place = min((beat.entered, beat.begun) for beat in beats)
    last = [rank for rank, beat in enumerate(beats) if (beat.entered, beat.begun) == place]
    late = any(beats[rank].seconds > beats[rank].limit_s for rank in last)
    return last if late else []


class Watchdog:
    """Watches the training of all ranks for the length of a `with` block; all ranks must enter.

    Args:
        config: the limits.
        run: where the end is recorded.
        phases: of this rank's training thread, which is the one that enters.
    """

    def __init__(self, config: WatchConfig, run: Run, phases: Phases) -> None:
        self._config, self._run, self._phases = config, run, phases
        self._group = new_group()
        self._store = shared_store(f"watchdog-{next(_numbers)}")
        self._main = threading.get_ident()
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        folder = run.dir / "stacks"
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"rank-{run.world.rank:05d}.txt"
        self._stacks: IO[str] = self._path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Stop watching; after an error of this rank alone the others are not waited for."""
        self._leaving.set()
        if error is None or isinstance(error, RunError):
            self._thread.join(_ALIVE_S)

    def _watch(self) -> None:
        beats = [self._beat()] * self._run.world.size
        try:
            leaving = False
            while not leaving:
                limit = max(beat.limit_s for beat in beats)
                faulthandler.dump_traceback_later(limit + _STUCK_S, exit=True, file=self._stacks)
                begun = time.monotonic()
                try:
                    beats = self._exchange(limit)
                except RuntimeError:
                    if time.monotonic() - begun < limit:
                        # A rank is gone, which is no hang: torchrun ends the others.
                        return
                    silent, living = self._silent()
                    texts = [f"rank {rank} does not answer any more" for rank in silent]
                    self._end(silent, living, beats, texts)
                    return
                leaving = all(beat.leaving for beat in beats)
                hung = [] if any(beat.leaving for beat in beats) else hung_ranks(beats)
                if hung:
                    texts = [_said(rank, beats[rank]) for rank in hung]
                    self._end(hung, list(range(len(beats))), beats, texts)
                    return
                self._leaving.wait(BEAT_S)
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._stacks.close()
            if not self._path.stat().st_size:
                self._path.unlink()

    def _beat(self) -> Beat:
        place = self._phases.place
        first = self._phases.first_step in (0, place.step) or place.phase in _LONG
        return Beat(
            entered=place.entered,
            begun=waits.begun,
            step=place.step,
            phase=place.phase,
            seconds=round(time.monotonic() - place.since, 1),
            limit_s=self._config.first_s if first else self._config.step_s,
            at=self._line(),
            leaving=self._leaving.is_set(),
        )

    def _line(self) -> str:
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return ""
        text = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
        return text.encode("ascii", "replace").decode()[-100:]

    def _exchange(self, limit_s: float) -> list[Beat]:
        """Return all ranks' beats, in rank order; RuntimeError where that takes too long."""
        mine = json.dumps(asdict(self._beat())).encode()
        if self._group is None:
            return [Beat(**json.loads(mine))]
        sent = torch.zeros(_REPORT_BYTES, dtype=torch.uint8)
        sent[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        received = [torch.empty_like(sent) for _ in range(self._run.world.size)]
        work = dist.all_gather(received, sent, group=self._group, async_op=True)
        work.wait(timedelta(seconds=limit_s))
        return [Beat(**json.loads(bytes(row.tolist()).rstrip(b"\0"))) for row in received]

    def _silent(self) -> tuple[list[int], list[int]]:
        """Return the ranks that do not report any more, and those that do."""
        ranks = range(self._run.world.size)
        assert self._store is not None
        self._store.set(f"alive/{self._run.world.rank}", "1")
        time.sleep(_ALIVE_S)
        living = [rank for rank in ranks if self._store.check([f"alive/{rank}"])]
        return [rank for rank in ranks if rank not in living], living

    def _end(self, hung: list[int], living: list[int], beats: list[Beat], texts: list[str]) -> None:
        """Leave the stacks and end the process; the first living rank records why."""
        if not hung or not self._run.claim_end():
            return
        # Should writing block as well, the process ends all the same.
        faulthandler.dump_traceback_later(3 * _STACKS_S, exit=True, file=self._stacks)
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        self._stacks.flush()
        rank, first = self._run.world.rank, living[0]
        self._mark(f"stacks/{rank}")
        if rank == first:
            self._await([f"stacks/{other}" for other in living])
            self._record(hung, beats, texts)
            self._mark("recorded")
        else:
            self._await(["recorded"])
        os._exit(int(ExitCode.hang))

    def _mark(self, key: str) -> None:
        if self._store is not None:
            self._store.set(key, "1")

    def _await(self, keys: list[str]) -> None:
        if self._store is not None:
            try:
                self._store.wait(keys, timedelta(seconds=_STACKS_S))
            except (dist.DistStoreError, dist.DistNetworkError):
                log.warning("not all ranks answered while the run was ended")

    def _record(self, hung: list[int], beats: list[Beat], texts: list[str]) -> None:
        run = self._run
        run.speak_for_rank_0()
        run.event("hang", ranks=hung, places=[asdict(beat) for beat in beats], stacks="stacks")
        text = f"{'; '.join(texts)}; all ranks' stacks are in stacks/"
        record_failure(run, RunError(ExitCode.hang, text))


def _said(rank: int, beat: Beat) -> str:
    place = f"{beat.phase} of step {beat.step} for {beat.seconds:g} s"
    return f"rank {rank} hangs in {place}, limit {beat.limit_s:g} s, at {beat.at}"
