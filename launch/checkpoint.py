"""`omni-train checkpoint`: what a run saved, whether every byte is right, and foreign weights."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from launch.failures import guarded
from omni_train.engine.exit_codes import ExitCode


def add_checkpoint(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    command = add(
        "checkpoint",
        "List and check the checkpoints of a run; convert DeepSpeed's own.",
        "omni-train checkpoint ls runs/audio",
        "omni-train checkpoint verify runs/audio",
        "omni-train checkpoint convert old/deepspeed_run weights/converted",
    )
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add_action(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        return actions.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"examples:\n  omni-train checkpoint {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    for name, summary in (
        ("ls", "list the checkpoints of a run, newest first"),
        ("verify", "read every byte of a run's checkpoints and compare it with the manifest"),
    ):
        action = add_action(name, summary, "runs/audio --json")
        action.add_argument("run", help="directory of the run")
        action.add_argument("--json", action="store_true", help="print JSON")
    summary = "write the weights of a DeepSpeed ZeRO-3 directory as safetensors"
    convert = add_action("convert", summary, "old/deepspeed_run weights/converted")
    convert.add_argument("directory", help="what DeepSpeed's save_checkpoint was given")
    convert.add_argument("target", help="directory to make; model.init_from reads it")


@guarded
def run_checkpoint(args: argparse.Namespace) -> int:
    """Run one `checkpoint` command and return its exit code."""
    if args.action == "convert":
        return _convert(Path(args.directory), Path(args.target))
    return _list(Path(args.run), verify=args.action == "verify", as_json=args.json)


def _convert(source: Path, target: Path) -> int:
    from omni_train.engine.convert import convert_zero3  # late: help must be quick

    done = convert_zero3(source, target)
    print(
        f"{target}: {done.tensors} tensors, {done.parameters:,} parameters of {done.ranks} ranks, "
        f"in {', '.join(done.files)}; no moments, so a run starts from it, not goes on"
    )
    return 0


def _list(run: Path, *, verify: bool, as_json: bool) -> int:
    """Print a row for each checkpoint; 65 where one of them is not what was written."""
    from omni_train.engine import checkpoint_files as files

    root = run / "checkpoints"
    if not root.is_dir():
        raise FileNotFoundError(f"{run} has no checkpoints; give the directory of a run")
    rows = []
    for folder in files.step_folders(root):
        row: dict[str, object] = {"step": int(folder.name.removeprefix("step-"))}
        try:
            manifest = files.Manifest.read(folder)
            records = [*manifest.files.values(), *manifest.frozen_files.values()]
            row |= {"ranks": manifest.world_size, "bytes": sum(r.size for r in records)}
            found = files.verify_checkpoint(folder) if verify else []
            row["problems"] = [f"{p.file}: {p.reason} ({p.detail})" for p in found]
        except files.CheckpointError as error:
            row["problems"] = [str(error)]
        rows.append(row)
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        good = "every byte is right" if verify else "complete"
        for row in rows:
            about = f"{row['bytes']:,} bytes, {row['ranks']} ranks, " if "bytes" in row else ""
            print(f"step-{row['step']}: {about}{'; '.join(row['problems']) or good}")  # type: ignore[arg-type]
    return int(ExitCode.bad_data) if any(row["problems"] for row in rows) else 0
