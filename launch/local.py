"""Starts a recipe's ranks on this machine through torchrun and reports how they ended.

    launcher --check in a child--> torchrun --> launch.rank x N --> recipes.STAGE x N

The launcher never imports a recipe. Every rank's output goes to `logs/rank-*.out` of the run
directory and torchrun's own to `logs/torchrun.out`; rank 0's is copied to the screen. torchrun
turns every failure into status 1, so the run's `state.json` decides what the launcher ends with.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from launch.rank import output_name
from launch.stages import REPO
from omni_train.engine.exit_codes import ExitCode

_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Checked:
    """What the check of a command found.

    Args:
        code: 0, or what the recipe ended with.
        text: resolved configuration as YAML; the error message where `code` is not 0.
    """

    code: int
    text: str

    def values(self) -> dict[str, Any]:
        """Return the resolved configuration as plain values."""
        loaded = yaml.safe_load(self.text)
        assert isinstance(loaded, dict), loaded
        return loaded


def count_gpus() -> int:
    """Return the number of NVIDIA devices that a process started now would see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in {"", "-1"}])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def child_environment(*, ranks: int = 1) -> dict[str, str]:
    """Return the environment of a recipe's processes.

    One thread per rank on a CPU, idle ones asleep; no network; output at once. W&B's own
    variables and the GPU selection stay as they are.
    """
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")])),
        "TOKENIZERS_PARALLELISM": "false",
        "WDS_SECURE": "1",
    }
    if count_gpus() == 0:
        environment |= {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1" if ranks > 1 else str(os.cpu_count() or 1),
            "OMP_WAIT_POLICY": "passive",
        }
    # DeepSpeed looks ninja up on PATH when it compiles an op for a GPU.
    environment["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), environment.get("PATH", os.defpath)]
    )
    return environment


def check(recipe: str, overrides: Sequence[str], *, ranks: int = 1) -> Checked:
    """Compose and validate a recipe's configuration in a process of its own; start nothing."""
    done = subprocess.run(
        [sys.executable, "-m", f"recipes.{recipe}", "--cfg", "job", "--resolve", *overrides],
        cwd=REPO,
        env={**child_environment(), "WORLD_SIZE": str(ranks)},
        capture_output=True,
        text=True,
        check=False,
    )
    # Python itself ends with 1 where a recipe cannot even be imported: a bug of ours.
    code = ExitCode.bug if done.returncode == 1 else done.returncode
    return Checked(int(code), done.stdout if code == 0 else done.stderr)


def run_recipe(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    ranks: int = 1,
    run_dir: Path | None = None,
    follow: Callable[[], None] | None = None,
) -> int:
    """Run a recipe to its end and return the status that says how it went.

    Args:
        recipe: name under `recipes/`.
        overrides: as on the command line.
        ranks: processes to start.
        run_dir: the run's directory where the caller knows it; `run.dir` is then set to it and the
            check in a process of its own is left out, as the ranks check too.
        follow: called several times a second, to show progress in its own way; rank 0's output is
            then not copied to the screen.
    """
    if run_dir is None:
        checked = check(recipe, overrides, ranks=ranks)
        if checked.code != 0:
            sys.stderr.write(checked.text)
            return checked.code
        run_dir = REPO / checked.values()["run"]["dir"]
    else:
        overrides = [*overrides, f"run.dir={json.dumps(str(run_dir))}"]
    return run_module(f"recipes.{recipe}", overrides, ranks=ranks, run_dir=run_dir, follow=follow)


def run_module(
    module: str,
    arguments: Sequence[str],
    *,
    ranks: int,
    run_dir: Path,
    follow: Callable[[], None] | None = None,
) -> int:
    """Run `python -m MODULE ARGUMENTS` on every rank; return the status that says how it went."""
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    before = _read_state(run_dir)
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes=1", f"--nproc-per-node={ranks}", "--max-restarts=0"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
        *("-m", "launch.rank", str(logs), module, *arguments),
    ]
    with (logs / "torchrun.out").open("ab") as own:
        start = own.tell()
        shown = _Screen(logs / output_name(0)) if follow is None else follow
        status = _watch(command, shown, own, child_environment(ranks=ranks))
    if status == 0:
        return int(ExitCode.done)
    code = _code_of(_read_state(run_dir), before, (logs / "torchrun.out").read_bytes()[start:])
    print(f"{module} ended with status {int(code)} ({code.name}); see {logs}", file=sys.stderr)
    return int(code)


class _Screen:
    """Copies what is appended to a file to the screen, from the moment it is made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = path.stat().st_size if path.exists() else 0

    def __call__(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            text = file.read()
        self._position += len(text)
        if text:
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()


def _watch(
    command: list[str], show: Callable[[], None], own: BinaryIO, environment: dict[str, str]
) -> int:
    """Run torchrun, show its progress, pass signals on; return its status."""
    process = subprocess.Popen(
        command,
        cwd=REPO,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=own,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {
        number: signal.signal(number, lambda received, _: process.send_signal(received))
        for number in signals
    }
    try:
        while process.poll() is None:
            show()
            time.sleep(_POLL_S)
        show()
        return int(process.returncode)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _read_state(run_dir: Path) -> str:
    path = run_dir / "state.json"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _code_of(state: str, before: str, torchrun_output: bytes) -> ExitCode:
    """Return the code of a failed run: from its state, else from torchrun's report, else a bug."""
    codes: list[Any] = []
    if state and state != before:
        codes.append(json.loads(state).get("exit_code"))
    codes += [int(found) for found in re.findall(rb"exitcode\s*: (-?\d+)", torchrun_output)[-1:]]
    known = {int(code) for code in ExitCode} - {0}
    return next((ExitCode(code) for code in codes if code in known), ExitCode.bug)
