"""Commands that look and start nothing: doctor, plan, runs, completion.

Declared here, so that cli.py stays short; each is imported when it is asked for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

Add = Callable[..., argparse.ArgumentParser]


def add_tools(add: Add) -> None:
    """Declare the commands."""
    from launch.completion import SHELLS
    from launch.doctor import add_doctor
    from launch.plan import add_plan
    from launch.runs import add_runs

    doctor = add(
        "doctor",
        "Check this machine, or several: software, devices, disk, data, ranks, clocks; remedies.",
        "omni-train doctor",
        "omni-train doctor stage1_audio experiment=stage1_audio/debug --json",
        "srun omni-train doctor --nodes 2 --ranks 8 --rendezvous node1:29500",
    )
    add_doctor(doctor)
    plan = add(
        "plan",
        "Memory, time and cost of a stage before it is started; touches no GPU.",
        "omni-train plan stage2_multimodal model=qwen2_5_omni_7b --devices 64 --price 2.5",
        "omni-train plan stage1_audio phase=adapter model=qwen2_5_omni_3b --hardware a100 --json",
        "omni-train plan stage1_audio experiment=demo/stage1_audio_encoder --hardware cpu \\",
        "    --devices 2 --refit runs/demo/stage1_audio_adapter",
    )
    add_plan(plan)
    runs = add(
        "runs",
        "List runs, show one, tell two apart, follow one live, clean up.",
        "omni-train runs                            all runs below runs/",
        "omni-train runs show runs/audio",
        "omni-train runs diff runs/audio runs/audio-2",
        "omni-train runs tail runs/audio            loss curve, live while it runs",
        "omni-train runs clean runs --keep 1 --yes",
    )
    add_runs(runs)
    completion = add(
        "completion",
        "Print a script that completes commands, options and stages in your shell.",
        "source <(omni-train completion bash)",
        "omni-train completion zsh >> ~/.zshrc",
    )
    completion.add_argument("shell", choices=SHELLS)


def run_tool(args: argparse.Namespace) -> int:
    """Run one of the commands but plan, whose stage cli.py checks; return its exit code."""
    if args.command == "doctor":
        from launch.doctor import run_doctor

        return run_doctor(args)
    if args.command == "runs":
        from launch.runs import run_runs

        return run_runs(args)
    from launch.cli import build_parser
    from launch.completion import script
    from launch.stages import recipe_names

    sys.stdout.write(script(build_parser(), args.shell, recipe_names()))
    return 0
