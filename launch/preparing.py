"""`omni-train data prepare` and `data merge`: sources to shards."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from omni_train.config.errors import ConfigError
from omni_train.engine.exit_codes import ExitCode

if TYPE_CHECKING:
    from data_pipelines.prepare import ChunkDone, Job, Part

Add = Callable[..., argparse.ArgumentParser]

ACTIONS = ("prepare", "merge")
FORMATS = ("jsonl", "llamafactory", "ms_swift", "hf_datasets", "folder")
_NAME = re.compile(r"[A-Za-z0-9_-]+")


def add_preparing(add: Add) -> None:
    """Add the two commands."""
    prepare = add(
        "prepare",
        "Turn a source of media and texts into shards; the same command again goes on.",
        "omni-train data prepare talks.jsonl shards/talks --format jsonl --tokenizer TOKENIZER",
        "omni-train data prepare sounds shards/sounds --format folder --task caption \\",
        "    --tokenizer TOKENIZER",
        "omni-train data prepare voices shards/voices --format hf_datasets --split train \\",
        "    --task asr --columns text=sentence speaker=client_id --tokenizer TOKENIZER",
        "several machines, here 16 jobs of a SLURM array, then the manifest:",
        "  sbatch --array=0-15 --wrap 'omni-train data prepare all.jsonl shards/all \\",
        "    --format jsonl --tokenizer TOKENIZER --part $SLURM_ARRAY_TASK_ID/16'",
        "  omni-train data merge shards/all",
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
    merge = add(
        "merge",
        "Join the parts of prepare: write rejected.jsonl and the manifest.",
        "omni-train data merge shards/all",
    )
    merge.add_argument("path", metavar="OUT", help="directory of the shards")


def run_preparing(args: argparse.Namespace) -> int:
    """Run one of the two commands and return its exit code."""
    from data_pipelines.merge import merge
    from data_pipelines.prepare import Part, prepare

    if args.action == "prepare":
        part = Part() if args.part is None else _part(args.part)
        workers = (os.cpu_count() or 1) if args.workers is None else args.workers
        with _Progress() as progress:
            done = prepare(_job(args), part=part, num_workers=workers, report=progress)
        num_rejected = sum(chunk.num_rejected for chunk in done)
        if args.part is not None:
            print(
                f"part {args.part}: {len(done)} chunks, "
                f"{sum(chunk.num_samples for chunk in done)} samples, {num_rejected} rejected"
            )
            return int(ExitCode.bad_data) if args.strict and num_rejected else 0
    merged = merge(Path(args.out if args.action == "prepare" else args.path))
    reasons = ", ".join(f"{reason} {number}" for reason, number in merged.rejected.items())
    print(
        f"{merged.num_samples} samples in {merged.num_shards} shards; "
        f"{sum(merged.rejected.values())} rejected{': ' + reasons if reasons else ''}"
    )
    strict = args.action == "prepare" and args.strict
    return int(ExitCode.bad_data) if strict and merged.rejected else 0


def _job(args: argparse.Namespace) -> Job:
    from data_pipelines.prepare import Job
    from data_pipelines.sources.base import SourceFormat, SourceOptions

    if not Path(args.path).exists():
        raise FileNotFoundError(f"no source at {args.path}")
    name = args.name or re.sub(r"[^A-Za-z0-9_-]+", "_", Path(args.path).resolve().stem)
    if not _NAME.fullmatch(name):
        raise ConfigError(
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
