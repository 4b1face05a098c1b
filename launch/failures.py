"""How a command fails: an exit code, and one line that says what happened and what to do."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omni_train.config.errors import ConfigError, DataError
from omni_train.engine.exit_codes import ExitCode, RunError, exit_code_of

# What to do about a reason, where the message does not say so itself.
_REMEDIES = {
    "missing_manifest": "finish the set with omni-train data merge, or data index for shards of "
    "another tool",
    "corrupt_manifest": "make it again: omni-train data index",
    "schema_version": "make the index again: omni-train data index",
    "missing_shard": "copy it here, beside its index",
    "missing_index": "make it: omni-train data index",
    "corrupt_index": "make it again: omni-train data index",
    "corrupt_tar": "copy or make this tar again",
    "truncated": "copy or make this file again",
    "unreachable": "check the path, the permissions and the network",
    "unknown_key": "give the key of one that is there",
    "corrupt_skip_list": "mend it, or remove it and run omni-train data fix",
    "corrupt_lint": "run omni-train data lint again",
}
# Not there at all, rather than there and wrong.
_MISSING = ("missing_manifest", "missing_shard", "missing_index", "unreachable")


def check_writable(folder: Path, *, remedy: str) -> None:
    """Make a directory if it is not there, and see that a file can be written in it.

    Raises:
        RunError: it cannot (exit code 74).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.write(file.fileno(), b"x")
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror
        raise RunError(ExitCode.disk, f"cannot write into {folder}: {reason}; {remedy}") from error


def guarded(command: Callable[..., int]) -> Callable[..., int]:
    """Make a command end with an exit code and one line where it raises one of our errors."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> int:
        try:
            return command(*args, **kwargs)
        except (ConfigError, DataError, RunError, OSError) as error:
            code, text = describe(error)
            print(f"omni-train: {text}", file=sys.stderr)
            return int(code)

    return run


def describe(error: ConfigError | DataError | RunError | OSError) -> tuple[ExitCode, str]:
    """Return the exit code of a failed command, and its message in one line."""
    code, text = exit_code_of(error), str(error)
    if isinstance(error, DataError):
        remedy = _REMEDIES.get(error.reason)
        code = ExitCode.missing_input if error.reason in _MISSING else code
        text = f"{text}; {remedy}" if remedy else text
    elif isinstance(error, OSError) and code in (ExitCode.bug, ExitCode.missing_input):
        code = ExitCode.missing_input
        if error.strerror:
            text = f"cannot read {error.filename}: {error.strerror}; check the path and permissions"
    elif isinstance(error, OSError):
        text = f"{error.strerror}: {error.filename or 'writing failed'}; free some space, run again"
    return code, " ".join(text.split())
