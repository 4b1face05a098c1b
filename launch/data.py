"""`omni-train data`: the demo corpus, and indexes for shards that have none."""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

from launch.local import child_environment
from launch.stages import REPO
from omni_train.config.errors import ConfigError, DataError
from omni_train.engine.exit_codes import exit_code_of


def run_data(args: argparse.Namespace) -> int:
    """Run one `data` command and return its exit code."""
    try:
        if args.action == "corpus":
            return make_corpus(Path(args.path), seed=args.seed, quick=args.quick)
        return index_folder(Path(args.path), tokenizer_dir=args.tokenizer)
    except (ConfigError, DataError, OSError) as error:
        print(f"omni-train: {error}", file=sys.stderr)
        return int(exit_code_of(error))


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


def index_folder(folder: Path, *, tokenizer_dir: str) -> int:
    """Write an index beside each `*.tar` of a folder, and the manifest last."""
    from omni_train.data.chatml import count_text_tokens
    from omni_train.data.index import (
        Manifest,
        describe_shard,
        index_path,
        write_index,
        write_manifest,
    )
    from omni_train.data.scan import index_shard
    from omni_train.data.tokenizer import load_tokenizer, tokenizer_hash

    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise FileNotFoundError(f"no *.tar in {folder}")
    tokenizer = load_tokenizer(tokenizer_dir)
    shards = []
    for number, tar in enumerate(tars, 1):
        rows = index_shard(
            tar, count_text_tokens=lambda record: count_text_tokens(record["messages"], tokenizer)
        )
        write_index(index_path(tar), rows)
        shards.append(describe_shard(tar, num_samples=len(rows)))
        print(f"[{number}/{len(tars)}] {tar.name}: {len(rows)} samples", flush=True)
    write_manifest(folder, Manifest(tokenizer_hash=tokenizer_hash(tokenizer), shards=tuple(shards)))
    return 0
