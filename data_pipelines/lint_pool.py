"""Processes that check samples, and outlive the one that a sample kills.

A decoder that crashes takes its process along, and an ordinary pool then loses everything that was
under way. Here the tasks that were under way are done again one sample at a time, so that the one
at fault is named and all others are still checked.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, Self, TypeVar

import torch


class Splittable(Protocol):
    """Work that can be taken apart into its single samples."""

    def split(self) -> list[Self]:
        """At least one piece."""


TaskT = TypeVar("TaskT", bound=Splittable)
Found = TypeVar("Found")
Check = Callable[[TaskT, Any], list[Found]]

# The tasks each process has waiting, so that none is idle and few are done again after a crash.
_QUEUED_PER_WORKER = 2

_shared: Any = None


def check_all(
    tasks: Iterator[TaskT],
    check: Check[TaskT, Found],
    died: Callable[[TaskT], list[Found]],
    shared: Any,
    *,
    num_workers: int,
) -> Iterator[tuple[TaskT, list[Found]]]:
    """Check tasks in processes and give each with its findings, in no fixed order.

    Args:
        tasks: read as the work goes on.
        check: (task, shared) -> findings; a function of a module.
        died: findings for a single sample whose process ended.
        shared: sent to each process once.
        num_workers: processes; 0 works in this one, where a crash is not survived.
    """
    if num_workers == 0:
        for task in tasks:
            yield task, check(task, shared)
        return
    unfinished = True
    while unfinished:
        running: dict[Future[list[Found]], TaskT] = {}
        try:
            with _pool(num_workers, shared) as pool:
                yield from _feed(pool, tasks, check, running, limit=num_workers)
            unfinished = False
        except BrokenProcessPool:
            for task in running.values():
                yield task, _check_alone(task, check, died, shared)


def _feed(
    pool: ProcessPoolExecutor,
    tasks: Iterator[TaskT],
    check: Check[TaskT, Found],
    running: dict[Future[list[Found]], TaskT],
    *,
    limit: int,
) -> Iterator[tuple[TaskT, list[Found]]]:
    """Keep the pool busy; `running` holds what is not done, also after an error."""
    exhausted = False
    while running or not exhausted:
        while not exhausted and len(running) < limit * _QUEUED_PER_WORKER:
            task = next(tasks, None)
            if task is None:
                exhausted = True
                break
            running[_submit(pool, check, task)] = task
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            found = future.result()
            yield running.pop(future), found


def _submit(
    pool: ProcessPoolExecutor, check: Check[TaskT, Found], task: TaskT
) -> Future[list[Found]]:
    try:
        return pool.submit(_call, check, task)
    except BrokenProcessPool as error:
        # The task was taken from the iterator already: it must be found among the running ones.
        broken: Future[list[Found]] = Future()
        broken.set_exception(error)
        return broken


def _check_alone(
    task: TaskT,
    check: Check[TaskT, Found],
    died: Callable[[TaskT], list[Found]],
    shared: Any,
) -> list[Found]:
    """Check sample after sample, with a new process after each that ended its own."""
    pieces = task.split()
    found: list[Found] = []
    while pieces:
        try:
            with _pool(1, shared) as pool:
                while pieces:
                    found += pool.submit(_call, check, pieces[0]).result()
                    pieces.pop(0)
        except BrokenProcessPool:
            found += died(pieces.pop(0))
    return found


def _pool(num_workers: int, shared: Any) -> ProcessPoolExecutor:
    # Imports are done once, in the server; a plain fork would copy this process's threads' locks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["omni_train.data.encode"])
    return ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_set_up, initargs=(shared,)
    )


def _set_up(shared: Any) -> None:
    global _shared
    _shared = shared
    torch.set_num_threads(1)


def _call(check: Check[TaskT, Found], task: TaskT) -> list[Found]:
    return check(task, _shared)
