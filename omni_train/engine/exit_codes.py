"""Exit codes of a run and which exception ends in which.

torchrun flattens them to 1, so `state.json` of the run directory carries the code too.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from enum import IntEnum
from typing import NoReturn

from omni_train.config.errors import ConfigError, DamagedError, DataError, UnsafeError


class ExitCode(IntEnum):
    """How a run ended."""

    done = 0
    usage = 2
    bad_data = 65
    missing_input = 66
    bug = 70
    locked = 73
    disk = 74
    preempted = 75
    non_finite = 76
    refused = 77
    hang = 79


class RunError(RuntimeError):
    """An end that has its own exit code. The message says what happened and what to do."""

    def __init__(self, code: ExitCode, message: str) -> None:
        self.code = code
        super().__init__(message)


_DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


def exit_code_of(error: BaseException) -> ExitCode:
    """Return the exit code that an exception stands for."""
    if isinstance(error, RunError):
        return error.code
    if isinstance(error, UnsafeError):
        return ExitCode.refused
    if isinstance(error, DataError | DamagedError):
        return ExitCode.bad_data
    if isinstance(error, ConfigError):
        return ExitCode.usage
    if isinstance(error, FileNotFoundError):
        return ExitCode.missing_input
    if isinstance(error, OSError) and error.errno in _DISK_ERRNOS:
        return ExitCode.disk
    return ExitCode.bug


def leave(code: int) -> NoReturn:
    """End a rank's process without the interpreter's own teardown.

    With DeepSpeed imported, that teardown ended finished ranks in std::terminate (15 of 40 launches
    with torch 2.13 on CPU, none without DeepSpeed), and torchrun then fails a run that was done.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
