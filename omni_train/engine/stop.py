"""How a run is asked to stop: SIGTERM or SIGUSR1, at any rank, from a person or a scheduler.

While `fit` runs the request is only noted; the ranks agree on it in their vote of the step and save
at the same boundary. Anywhere else there is nothing to save, and the process ends at once. What
happens then is fit.py's and run.py's.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from omni_train.engine.exit_codes import ExitCode, RunError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop, and by what.

    Attributes:
        name: of the first signal; empty where none came.
    """

    def __init__(self) -> None:
        self.name = ""
        self._deferred = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals for the length of the block; needs the main thread."""
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        # launch.rank holds back what arrives while a rank is still importing.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def ends_at_once(self) -> Iterator[None]:
        """Raise where a signal comes inside the block, and not in a `deferred` part of it.

        Raises:
            RunError: code 75.
        """
        self._deferred = False
        try:
            if self.name:
                raise self._error()
            yield
        finally:
            self._deferred = True

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note signals; who enters looks at `name` himself."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        # A second one must not interrupt what the first has begun.
        first, self.name = not self.name, self.name or signal.Signals(number).name
        if first and not self._deferred:
            raise self._error()

    def _error(self) -> RunError:
        return RunError(ExitCode.preempted, f"asked to stop by {self.name}; there was no step yet")
