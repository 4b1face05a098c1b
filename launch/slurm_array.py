"""`data prepare` as a SLURM array: one task for each part, then the merge when all have ended well.

One readable script serves both jobs; sbatch is told on its command line which of them it is:

    sbatch --parsable --array=0-15 ... OUT/prepare.sbatch          the parts
    sbatch --parsable --dependency=afterok:JOB ... OUT/prepare.sbatch   the merge

Every value in the script is quoted or held to a list of harmless characters: a line break in a name
would otherwise be a command of its own.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from launch.failures import check_writable
from launch.stages import REPO
from omni_train.config.errors import ConfigError, UnsafeError

SCRIPT_NAME = "prepare.sbatch"
MAX_PARTS = 10_000
_NAME = re.compile(r"[A-Za-z0-9._-]{1,63}")
_TIME = re.compile(r"(?:\d{1,3}-)?\d{1,4}(?::[0-5]\d){0,2}")
_MEMORY = re.compile(r"\d{1,6}[KMGT]?")
# Options that go to sbatch as they are -> what they may hold.
OPTIONS = {
    "partition": (_NAME, "letters, digits, . _ - and at most 63 of them"),
    "account": (_NAME, "letters, digits, . _ - and at most 63 of them"),
    "time": (_TIME, "minutes, hours:minutes:seconds or days-hours"),
    "mem": (_MEMORY, "a number with K, M, G or T"),
}


@dataclass(frozen=True, slots=True)
class ArrayJob:
    """What is handed to sbatch.

    Args:
        script: its text.
        parts, merge: command lines without the script's path; the merge lacks the job it waits for.
    """

    script: str
    parts: list[str]
    merge: list[str]


def add_slurm(parser: argparse.ArgumentParser) -> None:
    """Add the options to `data prepare`."""
    group = parser.add_argument_group("on a SLURM cluster")
    group.add_argument(
        "--slurm-array", type=int, metavar="N", help="print a job array of N parts, then the merge"
    )
    group.add_argument("--submit", action="store_true", help="hand it to sbatch")
    for name, (_, rule) in OPTIONS.items():
        group.add_argument(f"--{name}", metavar=name[0].upper(), help=f"for sbatch: {rule}")


def run_array(args: argparse.Namespace, *, name: str) -> int:
    """Print the jobs, or submit them.

    Args:
        args: of `data prepare`, already checked.
        name: of the set.

    Raises:
        ConfigError: a value that cannot stand in a job, no sbatch, or one that refuses.
    """
    job = array_job(args, name=name)
    path = Path(args.out).resolve() / SCRIPT_NAME
    if not args.submit:
        print(job.script, end="")
        print(f"# saved as {path} and submitted with --submit:")
        print(f"# {shlex.join([*job.parts, str(path)])}")
        print(f"# {shlex.join([*job.merge, '--dependency=afterok:JOB', str(path)])}")
        return 0
    from launch.slurm import sbatch
    from omni_train.data.index import write_atomically  # late: help must be quick

    check_writable(path.parent, remedy="choose another directory")
    write_atomically(path, job.script.encode())
    parts = sbatch([*job.parts, str(path)])
    merge = sbatch([*job.merge, f"--dependency=afterok:{parts}", str(path)])
    print(f"parts: job {parts}, {args.slurm_array} tasks; merge: job {merge}; logs: {path.parent}")
    return 0


def check_alone(args: argparse.Namespace) -> None:
    """Refuse options that only an array uses where there is none."""
    given = [f"--{name}" for name in ("submit", *OPTIONS) if getattr(args, name)]
    if given and args.slurm_array is None:
        raise ConfigError(
            key=given[0],
            value="",
            rule="it only says how a SLURM array is started",
            remedy="add --slurm-array N, or leave it out",
        )


def array_job(args: argparse.Namespace, *, name: str) -> ArrayJob:
    """Return the script and the command lines.

    Raises:
        ConfigError: a value that cannot stand in them.
    """
    count = args.slurm_array
    if not 1 <= count <= MAX_PARTS or args.part is not None:
        raise ConfigError(
            key="--slurm-array",
            value=count,
            rule=f"it makes all parts, 1 to {MAX_PARTS} of them",
            remedy="give such a number, and no --part",
        )
    for option, (pattern, rule) in OPTIONS.items():
        value = getattr(args, option)
        if value is not None and not pattern.fullmatch(value):
            raise UnsafeError(key=f"--{option}", value=value, rule=rule, remedy="correct it")
    out = Path(args.out).resolve()
    if set("%\\") & set(str(out)):
        raise ConfigError(
            key="OUT",
            value=str(out),
            rule="SLURM puts job numbers where the path of a log has % or a backslash",
            remedy="choose another directory",
        )
    python = [sys.executable, "-m", "launch", "data"]
    prepare, merge = [*python, "prepare", *_arguments(args, name)], [*python, "merge", str(out)]
    if wrong := [word for word in (*prepare, *merge, str(REPO)) if not word.isprintable()]:
        raise UnsafeError(
            key="data prepare",
            value=wrong[0],
            rule="a line break or another control character has no place in a job",
            remedy="rename it",
        )
    chosen = [f"--{o}={value}" for o in OPTIONS if (value := getattr(args, o)) is not None]
    if args.workers:
        chosen.append(f"--cpus-per-task={args.workers}")
    lines = [
        "#!/usr/bin/env bash",
        f"#SBATCH --job-name=prepare-{name[:55]}",
        *(f"#SBATCH {option}" for option in chosen),
        "set -euo pipefail",
        f"cd -- {shlex.quote(str(REPO))}",
        'if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then',
        f'    exec {shlex.join(prepare)} --part "${{SLURM_ARRAY_TASK_ID}}/{count}"',
        "fi",
        f"exec {shlex.join(merge)}",
    ]
    place = ["sbatch", "--parsable", f"--chdir={out}"]
    return ArrayJob(
        script="\n".join(lines) + "\n",
        parts=[*place, f"--array=0-{count - 1}", "--output=slurm-%A_%a.log"],
        merge=[*place, "--kill-on-invalid-dep=yes", "--output=slurm-%j_merge.log"],
    )


def _arguments(args: argparse.Namespace, name: str) -> list[str]:
    """The arguments of one part: those given, with paths that hold on every machine."""
    found = [str(Path(args.path).resolve()), str(Path(args.out).resolve())]
    found += ["--format", args.format, "--tokenizer", str(Path(args.tokenizer).resolve())]
    found += ["--name", name, "--samples-per-shard", str(args.samples_per_shard)]
    found += [f"--{o}={v}" for o in ("task", "language", "split") if (v := getattr(args, o))]
    if args.media_root:
        found.append(f"--media-root={Path(args.media_root).resolve()}")
    if args.workers is not None:
        found += ["--workers", str(args.workers)]
    if args.strict:
        found.append("--strict")
    return [*found, *(["--columns", *args.columns] if args.columns else [])]
