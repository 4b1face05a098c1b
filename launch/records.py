"""`omni-train data keys` and `data tokenizer`: samples of a step; Qwen2.5 tokens renamed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from launch.failures import check_writable
from omni_train.config.errors import ConfigError

Add = Callable[..., argparse.ArgumentParser]
ACTIONS = ("keys", "tokenizer")


def add_records(add: Add) -> None:
    """Add the two commands.

    Args:
        add: (name, summary, *examples) -> parser.
    """
    keys = add(
        "keys",
        "Name the samples of one global step of a run, planned again from its settings.",
        "omni-train data keys runs/demo/stage2_multimodal 120",
    )
    keys.add_argument("path", metavar="RUN", help="directory of a run")
    keys.add_argument("step", metavar="STEP", type=int, help="as its events count, from 1")
    keys.add_argument("--json", action="store_true", help="print JSON")
    tokenizer = add(
        "tokenizer",
        "Write Qwen2.5's tokenizer with Qwen2.5-Omni's names at the same ids.",
        "omni-train data tokenizer models/Qwen2.5-7B runs/omni/tokenizer",
    )
    tokenizer.add_argument("path", metavar="QWEN", help="directory with Qwen2.5's tokenizer.json")
    tokenizer.add_argument("out", metavar="OUT", help="directory that is made")


def run_records(args: argparse.Namespace) -> int:
    """Run one of them and return its exit code; errors are the caller's to report."""
    return {"keys": _keys, "tokenizer": _tokenizer}[args.action](args)


def _keys(args: argparse.Namespace) -> int:
    from omni_train.data.replay import step_samples

    samples = step_samples(Path(args.path), args.step)
    if args.json:
        print(json.dumps([sample._asdict() for sample in samples], indent=1))
    else:
        print("\n".join("\t".join(sample) for sample in samples))
    return 0


def _tokenizer(args: argparse.Namespace) -> int:
    from omni_train.data.tokenizer import load_tokenizer, rename_tokens
    from omni_train.models.presets import RELEASED_TOKENS

    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(
            key="OUT",
            value=args.out,
            rule="the directory has files already",
            remedy="give a new one",
        )
    check_writable(out.parent, remedy="give another directory")
    rename_tokens(load_tokenizer(args.path), RELEASED_TOKENS).save_pretrained(str(out))
    print(f"wrote {out}")
    return 0
