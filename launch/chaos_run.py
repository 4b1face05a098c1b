"""Lets faults happen to copies of a run and holds what followed against what should have.

    RUN's configuration --fewer steps--> one run without a fault        the measure
                                     +-> one with each fault, started again where it ended

The copies lie in a directory of their own and start from step 0; RUN is only read. The faults are
real: a signal, a file limit, a damaged file, a closed port (see omni_train/engine/faults.py).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launch.chaos import KINDS
from launch.failures import guarded
from launch.local import run_module
from launch.runs import existing_run, read_state
from omni_train.config.errors import ConfigError
from omni_train.engine import checkpoint_files as files
from omni_train.engine.exit_codes import ExitCode, RunError
from omni_train.engine.fingerprint import REDACTED
from omni_train.tracking.events import read_jsonl, read_steps

_STEP = 3
_NAMED_WITHIN_S = 15.0
_DELAY_S = 2.0
# Times the longest phase of the measure: what is surely a hang here.
_LIMIT = 5.0
_LEAST_LIMIT_S = 10.0
# What the copy's root needs besides the run's own settings (see conf/).
_ROOT: dict[str, Any] = {"hydra": {"run": {"dir": "."}, "output_subdir": None}}
_QUIET = [{"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault to let happen: its kind, and the step where it has one."""

    kind: str
    step: int

    @property
    def name(self) -> str:
        """As on the command line."""
        return self.kind if self.kind == "wandb-down" else f"{self.kind}@{self.step}"


@dataclass(slots=True)
class Report:
    """What became of a fault.

    Args:
        fault: as on the command line.
        seconds: that its copies took.
        checks: what should happen and what happened.
    """

    fault: str
    seconds: float = 0.0
    checks: list[dict[str, Any]] = field(default_factory=list)

    def check(self, should: str, happened: object, *, held: bool) -> None:
        """Add one."""
        self.checks.append({"should": should, "happened": str(happened), "held": held})

    @property
    def held(self) -> bool:
        """Whether all happened that should."""
        return all(check["held"] for check in self.checks)


@dataclass(slots=True)
class Setup:
    """A user's run, to be copied.

    Args:
        stage: recipe.
        config: as it was composed.
        ranks: processes.
        out: where the copies go.
        steps: of each copy.
    """

    stage: str
    config: dict[str, Any]
    ranks: int
    out: Path
    steps: int

    def start(self, name: str, *settings: str) -> int:
        """Start the copy `name`, or go on with it; return the exit code.

        Raises:
            RunError: somebody asked for a stop, which is no fault of the plan (exit code 75).
                What a signal at this command asks for counts in any fault; a signal at a rank
                looks like the fault of kind `stop`, and counts in the others.
        """
        folder = self.out / "config"
        folder.mkdir(parents=True, exist_ok=True)
        root = {"defaults": [f"{self.stage}_schema", "_self_", *_QUIET], **_ROOT, **self.config}
        text = yaml.safe_dump(root, sort_keys=False)
        (folder / "chaos.yaml").write_text(text, encoding="utf-8")
        run_dir = self.out / name
        usual = [
            f"run.dir={json.dumps(str(run_dir))}",
            f"fit.max_steps={self.steps}",
            *("fit.save_steps=1", "fit.milestone_steps=0", "fit.keep_checkpoints=2"),
            *("fit.spikes.rewind_to=null", "fit.spikes.skip_steps=[]", "tracking.wandb=false"),
        ]
        asked: list[int] = []
        code = run_module(
            f"recipes.{self.stage}",
            [f"--config-dir={folder}", "--config-name=chaos", *usual, *settings],
            ranks=self.ranks,
            run_dir=run_dir,
            follow=lambda: None,
            asked=asked,
        )
        by = " by " + signal.Signals(asked[0]).name if asked else ""
        if by or (code == ExitCode.preempted and "fit.fault.kind=stop" not in settings):
            raise RunError(ExitCode.preempted, f"asked to stop{by}; the copies are in {self.out}")
        return code

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        """Return the events of a copy."""
        return [e for e in read_jsonl(self.out / name / "events.jsonl") if e["kind"] == kind]

    def trace(self, name: str) -> list[tuple[Any, ...]]:
        """Return what must be bit-equal of each step."""
        steps = read_steps(self.out / name / "events.jsonl")
        return [(e["step"], e["loss"], e["keys"], e["grad_norm"], e["lr"]) for e in steps]

    def last_files(self, name: str) -> dict[str, Any]:
        """Return the hashes of the last checkpoint: weights, moments, RNG, place in the data."""
        folder = self.out / name / "checkpoints" / f"step-{self.steps}"
        try:
            found = files.Manifest.read(folder)
        except files.CheckpointError:
            return {}
        return {name: asdict(record) for name, record in found.files.items()}


def parse_fault(text: str) -> Fault:
    """Return the fault that a word names.

    Raises:
        ConfigError: there is no such fault, or it has no step.
    """
    kind, _, step = text.partition("@")
    rules = {
        f"one of {', '.join(KINDS)}": kind in KINDS,
        "a step is a number from 1 on": "@" not in text or re.fullmatch(r"[1-9]\d{0,5}", step),
        "it has no step": kind != "wandb-down" or "@" not in text,
        "it needs two checkpoints before it": kind != "torn-checkpoint" or int(step or _STEP) > 2,
        "it needs a checkpoint before it": kind != "disk-full" or int(step or _STEP) > 1,
    }
    for rule, holds in rules.items():
        if not holds:
            remedy = f"for example --fault {kind if kind in KINDS else 'kill-rank'}@{_STEP}"
            raise ConfigError(key="--fault", value=text, rule=rule, remedy=remedy.replace(
                f"wandb-down@{_STEP}", "wandb-down"))  # fmt: skip
    return Fault(kind, int(step or _STEP))


def read_setup(run: Path, faults: list[Fault], *, ranks: int | None, out: Path | None) -> Setup:
    """Return what a run was started with.

    Raises:
        FileNotFoundError: there is no run.
        ConfigError: it is no training run, or its settings cannot be repeated.
    """
    existing_run(run)
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    starts = [e for e in read_jsonl(run / "events.jsonl") if e["kind"] == "run_start"]
    stage, place = str(starts[0]["stage"]), out or run.with_name(f"{run.name}-chaos")
    rules = [
        ("RUN", stage, "fit" in config, "it is not a training run", "give the run of a stage"),
        *(
            ("RUN", key, False, "its value was a secret and is not recorded", "start it without")
            for key in _redacted(config)
        ),
        ("--ranks", ranks, ranks is None or ranks > 0, "at least one", "give 1 or more"),
        ("--out", str(place), not place.exists(), "it is there already", "give another directory"),
    ]
    for key, value, holds, rule, remedy in rules:
        if not holds:
            raise ConfigError(key=key, value=value, rule=rule, remedy=remedy)
    steps = max(fault.step for fault in faults) + 2
    return Setup(stage, config, ranks or int(starts[0]["ranks"]), place.absolute(), steps)


def _redacted(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _redacted(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, str) and REDACTED in value:
        yield key


@guarded
def chaos(args: argparse.Namespace) -> int:
    """Let the faults happen, print what followed, and return 0 where all held, else 70."""
    faults = [parse_fault(text) for text in args.fault or KINDS]
    setup = read_setup(args.run, faults, ranks=args.ranks, out=args.out)
    if not args.json:
        about = f"{setup.stage}, {setup.ranks} ranks, {setup.steps} steps, in {setup.out}"
        print(f"{about}: first without a fault", flush=True)
    code = setup.start("whole")
    if code:
        print(f"the copy ends with {code} without any fault; see {setup.out / 'whole' / 'logs'}")
        return code
    reports = []
    for fault in faults:
        report, begun = Report(fault.name), time.monotonic()
        _FAULTS[fault.kind](setup, fault, report)
        report.seconds = round(time.monotonic() - begun, 1)
        reports.append(report)
        if not args.json:
            _print(report)
    held = all(report.held for report in reports)
    if args.json:
        rows = [{**asdict(report), "held": report.held} for report in reports]
        print(json.dumps({"held": held, "out": str(setup.out), "faults": rows}, indent=1))
    if held and not args.keep:
        shutil.rmtree(setup.out)
    elif not args.json:
        print(f"the copies are in {setup.out}")
    return int(ExitCode.done if held else ExitCode.bug)


def _print(report: Report) -> None:
    print(f"\n{report.fault}  ({report.seconds:.0f} s)")
    for check in report.checks:
        print(f"  {'ok  ' if check['held'] else 'FAIL'}  should: {check['should']}")
        print(f"        did:    {check['happened']}", flush=True)


def _ends(report: Report, code: int, expected: ExitCode, setup: Setup, fault: Fault) -> None:
    reason = read_state(setup.out / fault.name).get("reason", "")
    told = f"{code}: {reason}" if reason else str(code)
    report.check(f"end with {int(expected)} ({expected.name})", told, held=code == expected)


def _goes_on(report: Report, setup: Setup, fault: Fault, steps: tuple[int, ...]) -> None:
    """Start the copy again and compare it with the measure."""
    code = setup.start(fault.name)
    report.check("the same command ends with 0", code, held=code == 0)
    resumed = [event["step"] for event in setup.events(fault.name, "resume")][-1:]
    said = " or ".join(map(str, steps))
    found = resumed[0] if resumed else "nowhere"
    report.check(f"go on from step {said}", found, held=bool(resumed) and resumed[0] in steps)
    _equal(report, setup, fault)


def _equal(report: Report, setup: Setup, fault: Fault) -> None:
    mine, whole = setup.trace(fault.name), setup.trace("whole")
    apart = [b[0] for a, b in zip(mine, whole, strict=False) if a != b]
    text = f"{len(whole)} of {len(whole)} steps bit-equal" if mine == whole else f"apart: {apart}"
    report.check("losses, norms, rates and samples of every step as without", text,
                 held=mine == whole)  # fmt: skip
    same = bool(setup.last_files("whole")) and (
        setup.last_files(fault.name) == setup.last_files("whole")
    )
    said = "equal" if same else "they differ"
    report.check("last checkpoint (weights, moments, RNG) as without", said, held=same)


def _settings(setup: Setup, fault: Fault, kind: str, phase: str) -> list[str]:
    values = {"kind": kind, "step": fault.step, "rank": setup.ranks - 1, "phase": phase}
    return [f"fit.fault.{key}={value}" for key, value in values.items()]


def _kill(setup: Setup, fault: Fault, report: Report) -> None:
    code = setup.start(fault.name, *_settings(setup, fault, "kill", "backward"))
    _ends(report, code, ExitCode.bug, setup, fault)
    # The save of the step before is written while the next one runs.
    _goes_on(report, setup, fault, (fault.step - 1, fault.step - 2))


def _hang(setup: Setup, fault: Fault, report: Report) -> None:
    steps = read_steps(setup.out / "whole" / "events.jsonl")
    longest = max(max(step["seconds"].values()) for step in steps)
    limit = round(max(_LEAST_LIMIT_S, _LIMIT * longest), 1)
    first = min(1700.0, 6 * limit) if fault.step > 1 else limit
    watch = (f"fit.watch.step_s={limit}", f"fit.watch.first_s={first}")
    code = setup.start(fault.name, *_settings(setup, fault, "hang", "forward"), *watch)
    _ends(report, code, ExitCode.hang, setup, fault)
    named = [(event["ranks"], event) for event in setup.events(fault.name, "hang")]
    rank = setup.ranks - 1
    report.check(f"name rank {rank}", [ranks for ranks, _ in named],
                 held=[ranks for ranks, _ in named] == [[rank]])  # fmt: skip
    if named:
        place = named[0][1]["places"][rank]
        late = place["seconds"] - place["limit_s"]
        report.check("name the phase: forward", place["phase"], held=place["phase"] == "forward")
        report.check(f"within {_NAMED_WITHIN_S:g} s after the limit of {place['limit_s']:g} s",
                     f"{late:.1f} s", held=late <= _NAMED_WITHIN_S)  # fmt: skip
    stacks = [p.name for p in sorted((setup.out / fault.name / "stacks").glob("*.txt"))]
    report.check(
        "leave the stacks of all ranks", ", ".join(stacks), held=len(stacks) == setup.ranks
    )
    _goes_on(report, setup, fault, (fault.step - 1, fault.step - 2))


def _nan(setup: Setup, fault: Fault, report: Report) -> None:
    allowed = int(setup.config["fit"].get("max_skipped_steps", 1))
    code = setup.start(fault.name, *_settings(setup, fault, "poison", "forward"))
    _ends(report, code, ExitCode.done if allowed else ExitCode.non_finite, setup, fault)
    found = [(e["step"], e["rank"], e["what"]) for e in setup.events(fault.name, "non_finite")]
    expected = [(fault.step, setup.ranks - 1, "loss")]
    report.check(f"name step, rank and what: {expected[0]}", found, held=found == expected)
    steps = read_steps(setup.out / fault.name / "events.jsonl")
    skipped = [step["step"] for step in steps if not step["applied"]]
    report.check("no update in that step, in all others", skipped, held=skipped == [fault.step])
    before = [row for row in setup.trace("whole") if row[0] < fault.step]
    same = [row for row in setup.trace(fault.name) if row[0] < fault.step] == before
    report.check("the steps before as without", "bit-equal" if same else "apart", held=same)


def _disk(setup: Setup, fault: Fault, report: Report) -> None:
    code = setup.start(fault.name, *_settings(setup, fault, "disk", "save"))
    _ends(report, code, ExitCode.disk, setup, fault)
    folders = files.step_folders(setup.out / fault.name / "checkpoints")
    newest = [folder.name for folder in folders][:1]
    bad = [problem for folder in folders[:1] for problem in files.verify_checkpoint(folder)]
    wanted = [f"step-{fault.step - 1}"]
    report.check(f"the older checkpoint {wanted[0]} stays whole", f"{newest}, {len(bad)} bad files",
                 held=newest == wanted and not bad)  # fmt: skip
    _goes_on(report, setup, fault, (fault.step - 1,))


def _torn(setup: Setup, fault: Fault, report: Report) -> None:
    code = setup.start(fault.name, *_settings(setup, fault, "stop", "forward"))
    report.check("stop, to be damaged", code, held=code == ExitCode.preempted)
    folders = files.step_folders(setup.out / fault.name / "checkpoints")
    torn = folders[0] / files.rank_file(setup.ranks - 1, "safetensors")
    os.truncate(torn, torn.stat().st_size // 2)
    _goes_on(report, setup, fault, (fault.step - 1,))
    events = setup.events(fault.name, "checkpoint_bad")
    found = [(e["checkpoint"], e["file"], e["reason"]) for e in events]
    expected = [(folders[0].name, torn.name, "size")]
    report.check(f"name the file and why: {expected[0]}", found, held=found == expected)


def _wandb(setup: Setup, fault: Fault, report: Report) -> None:
    with _closed_port():
        code = setup.start(fault.name, "tracking.wandb=true")
    _ends(report, code, ExitCode.done, setup, fault)
    mine, usual = (_first_step_s(setup, name) for name in (fault.name, "whole"))
    # How long starting takes differs from one start to the next on any machine.
    limit = max(_DELAY_S, usual / 2)
    report.check(f"the first step at most {limit:.1f} s later than after {usual:.1f} s",
                 f"{mine - usual:.1f} s later", held=mine - usual < limit)  # fmt: skip
    views = list((setup.out / fault.name / "wandb").glob("wandb/offline-run-*/*.wandb"))
    report.check("leave an offline run that can be sent later", [view.name for view in views],
                 held=len(views) == 1 and views[0].stat().st_size > 0)  # fmt: skip
    _equal(report, setup, fault)


def _first_step_s(setup: Setup, name: str) -> float:
    return float(setup.events(name, "step")[0]["elapsed_s"])


@contextmanager
def _closed_port() -> Iterator[None]:
    """Send W&B to a port of this machine where nobody listens."""
    before = dict(os.environ)
    os.environ.update(WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="0" * 40)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _preempt(setup: Setup, fault: Fault, report: Report) -> None:
    code = setup.start(fault.name, *_settings(setup, fault, "stop", "forward"))
    _ends(report, code, ExitCode.preempted, setup, fault)
    state = read_state(setup.out / fault.name)
    told = f"{state.get('status')} after step {state.get('step')}"
    report.check(f"preempted after step {fault.step}", told,
                 held=told == f"preempted after step {fault.step}")  # fmt: skip
    _goes_on(report, setup, fault, (fault.step,))
    numbers = [event["step"] for event in setup.events(fault.name, "step")]
    report.check("no step done twice", numbers, held=len(numbers) == len(set(numbers)))


_FAULTS: dict[str, Callable[[Setup, Fault, Report], None]] = {
    "kill-rank": _kill,
    "hang-rank": _hang,
    "nan": _nan,
    "disk-full": _disk,
    "torn-checkpoint": _torn,
    "wandb-down": _wandb,
    "preempt": _preempt,
}
