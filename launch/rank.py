"""What torchrun starts for every rank: its output goes to a file, then it becomes the recipe.

Usage: python -m launch.rank LOG_DIRECTORY MODULE [overrides]
"""

from __future__ import annotations

import os
import signal
import sys


def output_name(rank: int) -> str:
    """Return the file name of everything that a rank prints, libraries and crashes included."""
    return f"rank-{rank:05d}.out"


def main() -> None:
    """Redirect the two output streams and replace this process by the recipe's."""
    folder, module, *overrides = sys.argv[1:]
    path = os.path.join(folder, output_name(int(os.environ["RANK"])))  # noqa: PTH118  start-up time
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # A request to stop waits until the run can note it (omni_train/engine/stop.py); torchrun may
    # have been told to ignore some, and that would be inherited.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
    os.execv(sys.executable, [sys.executable, "-m", module, *overrides])  # noqa: S606


if __name__ == "__main__":
    main()
