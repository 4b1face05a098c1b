"""Arguments of `omni-train launch` and `omni-train pipeline`; what they do is in starting.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from launch.failures import guarded

Add = Callable[..., argparse.ArgumentParser]


def add_jobs(add: Add) -> None:
    """Add both commands.

    Args:
        add: (name, summary, *examples) -> parser.
    """
    launch = add(
        "launch",
        "Start a stage or a pipeline here, under SLURM or on Kubernetes; shows it unless told.",
        "omni-train launch stage1_audio target=slurm cluster=cpu cluster.nodes=2 "
        "experiment=stage1_audio/debug run.dir=runs/a",
        "omni-train launch sft_only target=slurm cluster=gpu8 --submit",
        "omni-train launch talker_icl target=kubernetes cluster.queue=gpu cluster.volume=claim "
        "cluster.container=image experiment=talker_icl/debug run.dir=runs/t",
    )
    launch.add_argument("what", help="name of a stage or a pipeline")
    launch.add_argument("overrides", nargs="*", help="target=, cluster=, cluster.KEY=, key=value")
    way = launch.add_mutually_exclusive_group()
    way.add_argument("--submit", action="store_true", help="send it")
    way.add_argument("--dry-run", action="store_true", help="show it, which is the default")
    pipeline = add(
        "pipeline",
        "Run a chain of stages, from any node on; show what is done and what is stale.",
        "omni-train pipeline list",
        "omni-train pipeline show full_3b",
        "omni-train pipeline run demo --from stage1_audio_adapter --to evaluate_audio_encoder",
        "omni-train pipeline run demo --dry-run",
    )
    pipeline.add_argument("action", choices=["list", "show", "run"])
    pipeline.add_argument("name", nargs="?", help="file in conf/pipeline, without suffix")
    pipeline.add_argument("--from", dest="first", metavar="NODE", help="that one and what follows")
    pipeline.add_argument("--to", dest="last", metavar="NODE", help="that one and what it needs")
    pipeline.add_argument("--ranks", type=int, help="processes; the default is one per GPU")
    pipeline.add_argument("--dry-run", action="store_true", help="show what would run")
    pipeline.add_argument("--json", action="store_true", help="print JSON")


@guarded
def run_jobs(args: argparse.Namespace) -> int:
    """Run one of the two and return the exit code."""
    from launch import starting

    run = starting.run_launch if args.command == "launch" else starting.run_pipeline
    return run(args)
