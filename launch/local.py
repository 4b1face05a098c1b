"""Starts a recipe's ranks on this machine through torchrun and reports how they ended.

    launcher --check in a child--> torchrun --> launch.rank x N --> recipes.STAGE x N

The launcher never imports a recipe. Every rank's output goes to `logs/rank-*.out` of the run
directory and torchrun's own to `logs/torchrun.out`; rank 0's is copied to the screen. torchrun
turns every failure into status 1, so the run's `state.json` decides what the launcher ends with.

SIGTERM or SIGUSR1 at the launcher goes on to the ranks once: they save and end with 75. How long
torchrun waits for that before it kills them follows from how long saving took before.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import yaml

from launch.rank import output_name
from launch.stages import REPO
from omni_train.engine.exit_codes import ExitCode
from omni_train.engine.stop import SIGNALS
from omni_train.tracking.events import read_jsonl

_POLL_S = 0.1
# Time to stop in where nothing was measured yet, and the least that is given.
_UNMEASURED_STOP_S = 60
_LEAST_STOP_S = 30
# How a run ends that the same command may well bring to its end: a rank died, or hung.
_WORTH_RESTARTING = (ExitCode.bug, ExitCode.hang)


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


@dataclass(frozen=True, slots=True)
class Place:
    """This machine among several that run one job together.

    Args:
        nodes: machines in all.
        node: number of this one; 0 hosts the rendezvous.
        endpoint: HOST:PORT of node 0.
        address: by which the others reach this machine; empty takes its host name.
        job: name of the job, the same on all of them and when it is started again.
    """

    nodes: int
    node: int
    endpoint: str
    address: str
    job: str

    def torchrun_options(self) -> list[str]:
        """Return what torchrun is told about the machines."""
        return [
            *(f"--nnodes={self.nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={self.endpoint}"),
            *(f"--rdzv-id={self.job}", f"--rdzv-conf=is_host={int(self.node == 0)}"),
            *([f"--local-addr={self.address}"] if self.address else []),
        ]


_ALONE = [
    *("--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"),
    "--local-addr=127.0.0.1",
]


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


def check(
    recipe: str, overrides: Sequence[str], *, ranks: int = 1, partial: bool = False
) -> Checked:
    """Compose and validate a recipe's configuration in a process of its own; start nothing.

    Args:
        recipe: name under `recipes/`.
        overrides: as on the command line.
        ranks: that would run it.
        partial: whether settings may be missing; they are `???`, and references stay as they are.
    """
    resolve = [] if partial else ["--resolve"]
    done = subprocess.run(
        [sys.executable, "-m", f"recipes.{recipe}", "--cfg", "job", *resolve, *overrides],
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
    restarts: int = 0,
    stop_s: int | None = None,
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
        restarts: times that ranks which died or hung are started again, from the newest
            checkpoint; an error that would come again is not tried again.
        stop_s: seconds in which ranks that are asked to stop must have saved; the default is what
            saving took before, twice.
    """
    if run_dir is None:
        checked = check(recipe, overrides, ranks=ranks)
        if checked.code != 0:
            sys.stderr.write(checked.text)
            return checked.code
        run_dir = REPO / checked.values()["run"]["dir"]
    else:
        overrides = [*overrides, f"run.dir={json.dumps(str(run_dir))}"]
    asked: list[int] = []
    for left in range(restarts, -1, -1):
        code = run_module(
            f"recipes.{recipe}",
            overrides,
            ranks=ranks,
            run_dir=run_dir,
            follow=follow,
            stop_s=stop_s,
            asked=asked,
        )
        # Ctrl-C ends the ranks with the code of a bug.
        if asked or code not in _WORTH_RESTARTING or not left:
            break
        print(f"starting again from the newest checkpoint; {left - 1} more times", file=sys.stderr)
    return code


def measured_stop_s(run_dir: Path) -> float | None:
    """Return the seconds that a stop takes at most, by the run's events; None before a save.

    A request can come just after a vote, so it is two steps and a save.
    """
    steps = saves = 0.0
    for event in read_jsonl(run_dir / "events.jsonl"):
        if event.get("kind") == "step":
            steps = max(steps, sum(map(float, event.get("seconds", {}).values())))
        elif event.get("kind") == "save":
            saves = max(saves, float(event["seconds"]))
    return 2 * steps + saves if saves else None


def stop_seconds(run_dir: Path, given: int | None) -> int:
    """Return how long ranks may take to stop; says so where less is given than is needed."""
    measured = measured_stop_s(run_dir)
    if given is None:
        wanted = _UNMEASURED_STOP_S if measured is None else math.ceil(2 * measured)
        return max(_LEAST_STOP_S, wanted)
    if measured is not None and given < 2 * measured:
        print(
            f"a request to stop gives the ranks {given} s, but two steps and a save took "
            f"{measured:.1f} s before; with less than twice that, what follows the last checkpoint "
            "may be lost",
            file=sys.stderr,
        )
    return given


def run_module(
    module: str,
    arguments: Sequence[str],
    *,
    ranks: int,
    run_dir: Path,
    follow: Callable[[], None] | None = None,
    stop_s: int | None = None,
    place: Place | None = None,
    asked: list[int] | None = None,
) -> int:
    """Run `python -m MODULE ARGUMENTS` on every rank; return the status that says how it went.

    Args:
        module: to run.
        arguments: of the module.
        ranks: processes on this machine.
        run_dir: the run's directory; on several machines it is a shared one.
        follow: as for `run_recipe`.
        stop_s: as for `run_recipe`.
        place: this machine among several; None is alone.
        asked: gets the signals that somebody sends this process meanwhile; the code alone does not
            tell them from those that a rank gets.
    """
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    before = _read_state(run_dir)
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *(f"--nproc-per-node={ranks}", "--max-restarts=0"),
        *(_ALONE if place is None else place.torchrun_options()),
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        f"--shutdown-timeout={stop_seconds(run_dir, stop_s)}",
        *("-m", "launch.rank", str(logs), module, *arguments),
    ]
    number = "" if place is None else f"-{place.node}"
    output = logs / f"torchrun{number}.out"
    with output.open("ab") as own:
        start = own.tell()
        rank = 0 if place is None else place.node * ranks
        shown = _Screen(logs / output_name(rank)) if follow is None else follow
        received: list[int] = [] if asked is None else asked
        status = _watch(command, shown, own, child_environment(ranks=ranks), received)
    if status == 0:
        return int(ExitCode.done)
    code = _code_of(_read_state(run_dir), before, output.read_bytes()[start:])
    if code is ExitCode.bug and _read_state(run_dir) != before:
        _correct(run_dir)
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
    command: list[str],
    show: Callable[[], None],
    own: BinaryIO,
    environment: dict[str, str],
    asked: list[int],
) -> int:
    """Run torchrun, show its progress, pass signals on and note them; return its status."""
    process = subprocess.Popen(
        command,
        cwd=REPO,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=own,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )

    def pass_on(received: int, _frame: FrameType | None) -> None:
        # A second request would end torchrun while it waits for the ranks to save.
        if received == signal.SIGINT or not asked:
            process.send_signal(received)
        asked.append(received)

    signals = (signal.SIGINT, *SIGNALS)
    previous = {number: signal.signal(number, pass_on) for number in signals}
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
    # The last one that torchrun reports is that of the rank that ended first.
    first = [int(found) for found in re.findall(rb"exitcode\s*: (-?\d+)", torchrun_output)[-1:]]
    codes: list[Any] = []
    if state and state != before:
        codes.append(json.loads(state).get("exit_code"))
    if codes == [ExitCode.preempted] and any(code < 0 and -code not in SIGNALS for code in first):
        # torchrun stops the others for it, and these take that for a preemption.
        return ExitCode.bug
    known = {int(code) for code in ExitCode} - {0}
    return next((ExitCode(code) for code in codes + first if code in known), ExitCode.bug)


def _correct(run_dir: Path) -> None:
    """Have a state that tells of a preemption tell of the killed rank that looked like one."""
    state = json.loads(_read_state(run_dir))
    if state.get("exit_code") == ExitCode.preempted:
        state |= {"status": "failed", "exit_code": int(ExitCode.bug)}
        state["reason"] = f"a rank was killed; of the others: {state['reason']}"
        temporary = run_dir / f"state.json.{os.getpid()}"
        temporary.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        temporary.replace(run_dir / "state.json")
