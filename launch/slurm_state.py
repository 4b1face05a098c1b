"""What SLURM says of the jobs that `omni-train launch` sent: asked now, kept nowhere.

squeue knows what waits and runs, and for some minutes what has ended; sacct, where the cluster
keeps accounts, the rest. Where neither is there, nothing is known of any job.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.slurm import RECORD_NAME

_TIMEOUT_S = 15
# States of SLURM in which a job's processes may be there.
_ALIVE = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}


@dataclass(frozen=True, slots=True)
class JobState:
    """A job of SLURM.

    Args:
        number: of the job.
        states: of its tasks, such as RUNNING; one, but for an array. Empty where nothing is known.
        reason: why it waits or has ended, in SLURM's word; empty where there is none.
    """

    number: str
    states: tuple[str, ...] = ()
    reason: str = ""

    @property
    def over(self) -> bool:
        """Whether SLURM says that no process of it is there; False where nothing is known."""
        return bool(self.states) and not _ALIVE & set(self.states)

    def __str__(self) -> str:
        counts = Counter(self.states)
        words = [f"{n} {state}" if len(self.states) > 1 else state for state, n in counts.items()]
        reason = f" ({self.reason})" if self.reason else ""
        return f"{self.number} {', '.join(words)}{reason}".rstrip()


def job_states(runs: Sequence[Path]) -> dict[Path, JobState]:
    """Return the job of each run that was sent to SLURM.

    Args:
        runs: run directories; those without a job of SLURM are passed over.
    """
    numbers = {run: number for run in runs if (number := job_number(run))}
    if not numbers:
        return {}
    jobs = f"--jobs={','.join(sorted(set(numbers.values())))}"
    said = _ask("squeue", "--noheader", "--array", "--states=all", "--format=%F|%T|%r|%Z", jobs)
    found = {(run, number): _own(said, number, run) for run, number in numbers.items()}
    if not all(rows for rows in found.values()):
        columns = "--format=JobID,State,Reason,WorkDir"
        said = _ask("sacct", "--noheader", "--allocations", "--parsable2", columns, jobs)
        found = {key: rows or _own(said, key[1], key[0]) for key, rows in found.items()}
    return {
        run: JobState(
            number,
            tuple(state for state, _ in rows),
            next((why for _, why in rows if why not in ("None", "")), ""),
        )
        for (run, number), rows in found.items()
    }


def job_number(run: Path) -> str:
    """Return the number of the job that a run was sent as; empty where it was not sent."""
    try:
        record = json.loads((run / RECORD_NAME).read_text(encoding="utf-8"))
        return str(record["job"]) if record["target"] == "slurm" else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _ask(*command: str) -> list[list[str]]:
    """Lines of a command of SLURM, in four parts; none where it is not here or refuses."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    lines = [line.split("|", 3) for line in done.stdout.splitlines()]
    return [line for line in lines if len(line) == 4]


def _own(lines: list[list[str]], number: str, run: Path) -> list[tuple[str, str]]:
    """States and reasons of a run's job; another cluster may have given the number to another."""
    return [
        (state.split()[0], why)
        for job, state, why, folder in lines
        if job.partition("_")[0] == number and Path(folder).resolve() == run.resolve()
    ]
