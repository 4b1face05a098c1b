"""`omni-train doctor`: whether this machine, or these machines, can train; with remedies.

    checks of one process -> checks over ranks (torchrun) -> table or JSON

On several nodes the same command runs on each (`srun omni-train doctor --nodes 2 --rendezvous
HOST:PORT`); the node of the first rank reports on all of them.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.failures import guarded
from launch.stages import REPO, recipe_names
from omni_train.config.errors import ConfigError
from omni_train.engine.exit_codes import ExitCode

if TYPE_CHECKING:
    from launch.doctor_checks import Check

_ENDPOINT = re.compile(r"[A-Za-z0-9._-]+:\d{1,5}")
_RANKS_TIMEOUT_S = 300


def add_doctor(command: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    command.add_argument("stage", nargs="?", help="check its data and the room it needs too")
    command.add_argument("overrides", nargs="*", help="key=value or group=option of the stage")
    command.add_argument("--dir", type=Path, default=Path("runs"), help="where runs will lie")
    command.add_argument("--ranks", type=int, help="processes per node; the default is one per GPU,"
                         " at least 2; 0 leaves them out")  # fmt: skip
    command.add_argument("--nodes", type=int, default=1, help="run the same command on each")
    command.add_argument("--rendezvous", metavar="HOST:PORT", help="where nodes meet")
    command.add_argument("--json", action="store_true", help="print JSON")


@guarded
def run_doctor(args: argparse.Namespace) -> int:
    """Run all checks; 0 where none failed, else 2."""
    _check_arguments(args)
    from launch import doctor_checks as checks

    values, found = _stage(args.stage, args.overrides)
    named = values.get("data", {}).get("sources", {})
    sources = {name: _located(source["path"]) for name, source in named.items()}
    steps: list[Callable[[], Iterable[Check]]] = [
        checks.check_python,
        checks.check_packages,
        checks.check_gpus,
        lambda: checks.check_disk(args.dir, _checkpoint_bytes(args.stage, values)),
        checks.check_codecs,
        checks.check_recognizers,
        checks.check_wandb,
        lambda: checks.check_sources(sources),
        lambda: _ranks(args),
    ]
    for step in steps:
        found += step()
    if args.json:
        print(json.dumps([asdict(check) for check in found], indent=1))
    else:
        _print(found)
    failed = any(check.status == "fail" for check in found)
    return int(ExitCode.usage if failed else ExitCode.done)


def _check_arguments(args: argparse.Namespace) -> None:
    def refuse(key: str, value: object, rule: str, remedy: str) -> ConfigError:
        return ConfigError(key=key, value=value, rule=rule, remedy=remedy)

    if args.stage is not None and args.stage not in recipe_names():
        known = ", ".join(recipe_names())
        raise refuse("STAGE", args.stage, "there is no such stage", f"use one of {known}")
    if args.ranks is not None and args.ranks < 0:
        raise refuse("--ranks", args.ranks, "must not be negative", "0 leaves them out")
    if args.nodes < 1:
        raise refuse("--nodes", args.nodes, "must be at least 1", "give their number")
    if (args.nodes > 1) != (args.rendezvous is not None):
        rule = "several nodes meet at a rendezvous, and only they"
        raise refuse("--rendezvous", args.rendezvous, rule, "give --nodes N --rendezvous HOST:PORT")
    if args.rendezvous is not None and not _ENDPOINT.fullmatch(args.rendezvous):
        raise refuse("--rendezvous", args.rendezvous, "not HOST:PORT", "for example node1:29500")


def _stage(stage: str | None, overrides: list[str]) -> tuple[dict[str, Any], list[Check]]:
    """Resolved settings of a stage, and what its own checks say."""
    if stage is None:
        return {}, []
    from launch.doctor_checks import Check
    from launch.local import check

    checked = check(stage, overrides)
    if checked.code == 0:
        return checked.values(), [Check("settings", "pass", stage)]
    return {}, [Check("settings", "fail", " ".join(checked.text.split()), "mend the overrides")]


def _located(path: str) -> str:
    return path if "://" in path else str(REPO / path)


def _checkpoint_bytes(stage: str | None, values: dict[str, Any]) -> float | None:
    """Bytes of one checkpoint of a stage, frozen weights included; None where it is not known."""
    from omni_train.planning.model import PLANNABLE

    if stage not in PLANNABLE or not values:
        return None
    from omni_train.planning.estimate import checkpoint_bytes

    return sum(checkpoint_bytes(stage, values, root=REPO))


def _ranks(args: argparse.Namespace) -> list[Check]:
    """Time a collective and compare clocks over real ranks."""
    from launch.doctor_checks import Check, judge_ranks
    from launch.local import child_environment, count_gpus

    ranks = max(2, count_gpus()) if args.ranks is None else args.ranks
    if not ranks:
        return []
    meet = ["--standalone", "--local-addr=127.0.0.1"]
    if args.nodes > 1:
        meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint={args.rendezvous}", "--rdzv-id=doctor"]
    if count_gpus() and ranks > count_gpus():
        text = f"{ranks} ranks for {count_gpus()} GPUs"
        return [Check("ranks", "warn", text, "give --ranks as many as there are GPUs")]
    command = [sys.executable, "-m", "torch.distributed.run", *meet]
    command += [f"--nnodes={args.nodes}", f"--nproc-per-node={ranks}", "-m", "launch.doctor_ranks"]
    remedy = "see the message; on a cluster check the firewall and NCCL_SOCKET_IFNAME"
    try:
        done = subprocess.run(
            command,
            cwd=REPO,
            env=child_environment(ranks=ranks),
            capture_output=True,
            text=True,
            check=False,
            timeout=_RANKS_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        text = f"{ranks} ranks did not meet and finish in {_RANKS_TIMEOUT_S} s"
        return [Check("ranks", "fail", text, remedy)]
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return [Check("ranks", "fail", f"status {done.returncode}: {last}", remedy)]
    reports = [line for line in done.stdout.splitlines() if line.startswith("{")]
    # The first rank may be on another node, which then reports.
    return judge_ranks(json.loads(reports[-1])) if reports else []


def _print(found: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = Console(highlight=False)
    colours = {"pass": "green", "warn": "yellow", "fail": "red"}
    table = Table(show_header=False, show_edge=False, pad_edge=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in found:
        detail = Text(check.detail)
        if check.remedy:
            detail.append(f"\n-> {check.remedy}", style=colours[check.status])
        table.add_row(Text(check.status, style=colours[check.status]), Text(check.name), detail)
    out.print(table)
    counts = Counter(check.status for check in found)
    out.print(", ".join(f"{counts[status]} {status}" for status in ("pass", "warn", "fail")))
