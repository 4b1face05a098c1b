"""`omni-train data prepare`, `data merge` and `data codes`: sources to shards, codes into them."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.failures import check_writable
from launch.slurm_array import add_slurm, check_alone, run_array
from omni_train.config.errors import ConfigError, UnsafeError
from omni_train.engine.exit_codes import ExitCode, RunError
from omni_train.engine.lock import RunLock

if TYPE_CHECKING:
    from data_pipelines.prepare import ChunkDone, Job, Part

Add = Callable[..., argparse.ArgumentParser]

ACTIONS = ("prepare", "merge", "codes")
FORMATS = ("jsonl", "llamafactory", "ms_swift", "hf_datasets", "folder")
FOLDER_FORMATS = ("hf_datasets", "folder")
_NAME = re.compile(r"[A-Za-z0-9_-]+")


def add_preparing(add: Add) -> None:
    """Add the commands."""
    prepare = add(
        "prepare",
        "Turn a source of media and texts into shards; the same command again goes on.",
        "omni-train data prepare talks.jsonl shards/talks --format jsonl --tokenizer TOKENIZER",
        "omni-train data prepare sounds shards/sounds --format folder --task caption \\",
        "    --tokenizer TOKENIZER",
        "omni-train data prepare voices shards/voices --format hf_datasets --split train \\",
        "    --task asr --columns text=sentence speaker=client_id --tokenizer TOKENIZER",
        "several machines by hand: --part 0/16 to --part 15/16, then omni-train data merge OUT;",
        "on a SLURM cluster, as an array of 16 jobs and the merge:",
        "omni-train data prepare all.jsonl shards/all --format jsonl --tokenizer TOKENIZER \\",
        "    --slurm-array 16 --partition cpu --time 4:00:00 --submit",
    )
    prepare.add_argument("path", metavar="SOURCE", help="file or directory that is read")
    prepare.add_argument("out", metavar="OUT", help="directory of the shards")
    prepare.add_argument("--format", required=True, choices=FORMATS, help="layout of the source")
    prepare.add_argument("--tokenizer", required=True, help="directory of a saved tokenizer")
    prepare.add_argument("--name", help="of the set, in keys; the default is the source's name")
    prepare.add_argument("--task", default="", help="of samples that do not say their own")
    prepare.add_argument("--language", default="", help="of samples that do not say their own")
    prepare.add_argument("--split", default="", help="of a dataset that has several")
    prepare.add_argument("--media-root", default="", help="where relative paths start")
    prepare.add_argument(
        "--columns", nargs="+", default=[], metavar="MEANING=NAME", help="the source's own names"
    )
    prepare.add_argument("--samples-per-shard", type=int, default=256, help="rows of one shard")
    prepare.add_argument("--workers", type=int, help="processes; the default is one per CPU")
    prepare.add_argument("--part", metavar="I/N", help="make only shards I, I+N, ...; then merge")
    prepare.add_argument("--strict", action="store_true", help="exit 65 if any row was rejected")
    add_slurm(prepare)
    merge = add(
        "merge",
        "Join the parts of prepare: write rejected.jsonl and the manifest.",
        "omni-train data merge shards/all",
    )
    merge.add_argument("path", metavar="OUT", help="directory of the shards")
    codes = add(
        "codes",
        "Add speech codes to spoken replies, as a new set; the same command again goes on.",
        "omni-train data codes shards/talks shards/talks-codes --codec runs/speech_codec \\",
        "    --tokenizer TOKENIZER",
        "on several machines: --part 0/16 to --part 15/16, then once without --part",
    )
    codes.add_argument("path", metavar="SET", help="directory of shards with spoken replies")
    codes.add_argument("out", metavar="OUT", help="directory of the new set")
    codes.add_argument("--codec", required=True, help="run of speech_codec, or its codec directory")
    codes.add_argument("--tokenizer", required=True, help="the tokenizer the set was indexed with")
    codes.add_argument("--workers", type=int, help="processes; the default is one per CPU")
    codes.add_argument("--part", metavar="I/N", help="only shards I, I+N, ...; then without")


def run_preparing(args: argparse.Namespace) -> int:
    """Run one of the commands and return its exit code."""
    if args.action == "codes":
        return _codes(args)
    from data_pipelines.merge import merge
    from data_pipelines.prepare import FOLDER, Part, prepare

    if args.action == "prepare":
        check_alone(args)
        part = Part() if args.part is None else _part(args.part)
        job, workers = _job(args), (os.cpu_count() or 1) if args.workers is None else args.workers
        if args.slurm_array is not None:
            return run_array(args, name=job.source.name)
        check_writable(Path(args.out), remedy="choose another directory")
        out = Path(args.out)
        with _held(out, part, out / FOLDER), _Progress() as progress:
            done = prepare(job, part=part, num_workers=workers, report=progress)
        num_rejected = sum(chunk.num_rejected for chunk in done)
        if args.part is not None:
            print(
                f"part {args.part}: {len(done)} chunks, "
                f"{sum(chunk.num_samples for chunk in done)} samples, {num_rejected} rejected"
            )
            return int(ExitCode.bad_data) if args.strict and num_rejected else 0
    out = Path(args.out if args.action == "prepare" else args.path)
    if not out.is_dir():
        raise FileNotFoundError(f"there is no directory {out}; give the OUT of data prepare")
    check_writable(out, remedy="make it writable")
    merged = merge(out)
    reasons = ", ".join(f"{reason} {number}" for reason, number in merged.rejected.items())
    print(
        f"{merged.num_samples} samples in {merged.num_shards} shards; "
        f"{sum(merged.rejected.values())} rejected{': ' + reasons if reasons else ''}"
    )
    strict = args.action == "prepare" and args.strict
    return int(ExitCode.bad_data) if strict and merged.rejected else 0


def _codes(args: argparse.Namespace) -> int:
    from data_pipelines.codes import FOLDER, add_codes
    from data_pipelines.prepare import Part
    from omni_train.speech.codec import CodecConfig

    part = None if args.part is None else _part(args.part)
    workers = (os.cpu_count() or 1) if args.workers is None else args.workers
    if not Path(args.path).is_dir():
        raise FileNotFoundError(f"there is no directory {args.path}; give a set of shards")
    out = Path(args.out)
    check_writable(out, remedy="choose another directory")
    with _held(out, part or Part(), out / FOLDER):
        made = add_codes(
            args.path,
            out,
            CodecConfig(path=args.codec),
            tokenizer_dir=args.tokenizer,
            part=part,
            num_workers=workers,
            report=lambda line: print(line, file=sys.stderr, flush=True),
        )
    if made is None:
        print(f"part {args.part} is done; run without --part when all are")
    else:
        print(f"{sum(shard.num_samples for shard in made.shards)} samples in {out}")
    return 0


def _job(args: argparse.Namespace) -> Job:
    from data_pipelines.prepare import Job
    from data_pipelines.sources.base import SourceFormat, SourceOptions

    for key, value in (("SOURCE", args.path), ("OUT", args.out)):
        if "://" in value:
            raise ConfigError(
                key=key,
                value=value,
                rule="data prepare works from one local directory to another",
                remedy="copy the source here, and the finished set to the store",
            )
    if not Path(args.path).exists():
        raise FileNotFoundError(f"there is no source at {args.path}; give a file or a directory")
    wants_folder = args.format in FOLDER_FORMATS
    if Path(args.path).is_dir() != wants_folder:
        kinds = ("a file", "a directory") if wants_folder else ("a directory", "a file")
        rule = f"--format {args.format} reads {kinds[1]}"
        raise FileNotFoundError(f"{args.path} is {kinds[0]}, and {rule}; give that")
    name = args.name or re.sub(r"[^A-Za-z0-9_-]+", "_", Path(args.path).resolve().stem)
    if not _NAME.fullmatch(name):
        raise UnsafeError(
            key="--name",
            value=name,
            rule="keys hold letters, digits, _ and - only",
            remedy="choose another name",
        )
    if args.samples_per_shard < 1:
        raise ConfigError(
            key="--samples-per-shard",
            value=args.samples_per_shard,
            rule="a shard holds at least one sample",
            remedy="use 1 or more",
        )
    pairs = [text.partition("=") for text in args.columns]
    for meaning, _, own in pairs:
        if not meaning or not own:
            raise ConfigError(
                key="--columns",
                value=args.columns,
                rule="each is MEANING=NAME",
                remedy="write, say, text=sentence",
            )
    source = SourceOptions(
        path=args.path,
        format=SourceFormat[args.format],
        name=name,
        rows_per_chunk=args.samples_per_shard,
        task=args.task,
        language=args.language,
        columns=tuple(sorted((meaning, own) for meaning, _, own in pairs)),
        split=args.split,
        media_root=args.media_root,
    )
    return Job(source=source, out_dir=args.out, tokenizer_dir=args.tokenizer)


def _part(text: str) -> Part:
    from data_pipelines.prepare import Part

    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise ConfigError(
            key="--part", value=text, rule="a part is I/N", remedy="use 0/4 to 3/4, say"
        )
    return Part(int(match[1]), int(match[2]))


@contextmanager
def _held(out: Path, part: Part, folder: Path) -> Iterator[None]:
    """Keep every other process from making the same part of `out`; locks lie in `folder`.

    SIGTERM gives it back (exit 75).

    Raises:
        RunError: one does so now, or shares the work out differently (exit code 73).
    """
    lock = folder / Path(part.file_name).with_suffix(".lock").name
    # Parts of another count have shards in common with this one.
    others = [
        path for path in folder.glob("part-*-of-*.lock") if not path.match(f"*-of-{part.of}.*")
    ]
    for path in others:
        _acquire(path, out).release()
    before = _owner(lock)
    held = _acquire(lock, out)
    if before:
        print(
            f"omni-train: {lock} was left by process {before.get('pid')} of "
            f"{_time(before)}, which is gone; going on",
            file=sys.stderr,
        )

    def leave(*_: object) -> None:
        # A job that is ended here may go on on another machine, which cannot see that this is gone.
        held.release()
        os.write(2, b"omni-train: stopped; the same command goes on\n")
        os._exit(ExitCode.preempted)

    answer = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, answer)
        held.release()


def _acquire(path: Path, out: Path) -> RunLock:
    lock = RunLock(path)
    try:
        lock.acquire("data prepare")
    except RunError as error:
        owner = _owner(path)
        raise RunError(
            ExitCode.locked,
            f"{path.stem} of {out} is being prepared by process {owner.get('pid')} on "
            f"{owner.get('host')} since {_time(owner)}; wait for it or end it. If it is surely "
            f"gone, remove {path}",
        ) from error
    return lock


def _owner(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _time(owner: Mapping[str, Any]) -> str:
    since = owner.get("since")
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since)) if since else "?"


class _Progress:
    """A bar on a terminal; elsewhere a line per shard on the error stream."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console) if console.is_terminal else None
        self._task = self._bar.add_task("shards", total=None) if self._bar else None
        self._count = 0

    def __enter__(self) -> _Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, chunk: ChunkDone, total: int) -> None:
        self._count += 1
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self._count, total=total)
            return
        note = " (was there)" if chunk.reused else ""
        print(
            f"[{self._count}/{total}] shard-{chunk.number:06d}: {chunk.num_samples} samples, "
            f"{chunk.num_rejected} rejected{note}",
            file=sys.stderr,
            flush=True,
        )
