"""`omni-train export`: a checkpoint becomes a complete Hugging Face directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.failures import guarded


def add_export(command: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    command.add_argument("run", type=Path, help="run directory, or a checkpoint in one")
    command.add_argument("out", type=Path, help="directory to make")
    command.add_argument(
        "--base",
        default="",
        help="has the parts that the run has not (Talker, Token2Wav, voices); the default is the "
        "directory of safetensors that the first run began from",
    )
    command.add_argument("--tokenizer", default="", help="directory; the default is the run's")
    command.add_argument(
        "--codec", default="", help="run of speech_codec, for a Talker that speaks in its codes"
    )
    command.add_argument(
        "--layout",
        choices=["released", "current"],
        default="released",
        help="names of the towers: as published, or as transformers >= 5.23 has them",
    )
    command.add_argument("--licence", default="other", help="identifier for the model card")
    command.add_argument(
        "--scores",
        action="append",
        type=Path,
        default=[],
        metavar="RUN",
        help="run of `evaluate` for the model card; may be given more than once",
    )
    command.add_argument(
        "--no-verify", action="store_true", help="do not reload the result and compare its logits"
    )


@guarded
def run_export(args: argparse.Namespace) -> int:
    """Export, and return the exit code."""
    from omni_train.export.tensors import Layout
    from omni_train.export.write import ExportOptions, export

    options = ExportOptions(
        run=args.run,
        out=args.out,
        base=args.base,
        tokenizer=args.tokenizer,
        codec=args.codec,
        layout=Layout[args.layout],
        licence=args.licence,
        scores=tuple(args.scores),
        verify=not args.no_verify,
    )
    export(options, print)
    print(f"exported to {args.out}")
    return 0
