"""`omni-train data`: the demo corpus, public benchmarks, and indexes for shards that have none."""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

from launch.failures import check_writable, guarded
from launch.inspection import ACTIONS as INSPECTIONS
from launch.inspection import run_inspection
from launch.local import child_environment
from launch.preparing import ACTIONS as PREPARING
from launch.preparing import run_preparing
from launch.records import ACTIONS as RECORDS
from launch.records import run_records
from launch.stages import REPO
from omni_train.config.errors import ConfigError


@guarded
def run_data(args: argparse.Namespace) -> int:
    """Run one `data` command and return its exit code."""
    if args.action == "corpus":
        return make_corpus(Path(args.path), seed=args.seed, quick=args.quick)
    if args.action == "benchmark":
        return write_benchmark(args)
    if args.action in PREPARING:
        return run_preparing(args)
    if args.action in INSPECTIONS:
        return run_inspection(args)
    if args.action in RECORDS:
        return run_records(args)
    if "://" in args.path:
        raise ConfigError(
            key="PATH",
            value=args.path,
            rule="an index is written beside the shards, in a local directory",
            remedy="index them where they are made, then copy shards, indexes and manifest",
        )
    return index_folder(Path(args.path), tokenizer_dir=args.tokenizer)


def make_corpus(folder: Path, *, seed: int | None, quick: bool, log: Path | None = None) -> int:
    """Generate the demo corpus in a process of its own, as the speech engine keeps global state.

    Args:
        folder: directory that is made, or found finished.
        seed: of the whole corpus; None takes its default.
        quick: a small one.
        log: file for what the process prints; None prints it here.
    """
    options = ["--out", str(folder), *(["--quick"] if quick else [])]
    if seed is not None:
        options += ["--seed", str(seed)]
    with nullcontext() if log is None else log.open("wb") as output:
        return subprocess.run(
            [sys.executable, "-m", "data_pipelines.demo_corpus", *options],
            cwd=REPO,
            env=child_environment(),
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            check=False,
        ).returncode


def write_benchmark(args: argparse.Namespace) -> int:
    """Turn a public benchmark into shards, and say how `evaluate` is told to score them."""
    from data_pipelines.benchmarks.make import make_benchmark
    from data_pipelines.benchmarks.table import BENCHMARKS
    from omni_train.data.tokenizer import load_tokenizer

    made = make_benchmark(
        args.name,
        Path(args.path),
        Path(args.out),
        tokenizer=load_tokenizer(args.tokenizer),
        root=Path(args.media_root) if args.media_root else None,
        split=args.split,
    )
    task = BENCHMARKS[args.name]
    print(
        f"{made.num_samples} samples; for `evaluate`: '+tasks.{args.name}={{path: {args.out}, "
        f"metric: {task.metric}, normalizer: {task.normalizer}, "
        f"max_new_tokens: {task.max_new_tokens}}}'"
    )
    return 0


def index_folder(folder: Path, *, tokenizer_dir: str) -> int:
    """Write an index beside each `*.tar` of a folder, and the manifest last."""
    from data_pipelines.shards import index_tar
    from omni_train.data.index import Manifest, write_manifest
    from omni_train.data.tokenizer import load_tokenizer, tokenizer_hash

    tars = sorted(folder.glob("*.tar"))
    if not tars:
        what = f"no *.tar in {folder}" if folder.is_dir() else f"there is no directory {folder}"
        raise FileNotFoundError(f"{what}; give the directory of the shards")
    check_writable(folder, remedy="copy the shards to where an index can lie beside them")
    tokenizer = load_tokenizer(tokenizer_dir)
    shards = []
    for number, tar in enumerate(tars, 1):
        shards.append(index_tar(tar, tokenizer))
        print(f"[{number}/{len(tars)}] {tar.name}: {shards[-1].num_samples} samples", flush=True)
    write_manifest(folder, Manifest(tokenizer_hash=tokenizer_hash(tokenizer), shards=tuple(shards)))
    return 0
