"""`omni-train plan`: what a stage needs and how long it takes, before anything is started.

    recipe --composed in a child--> resolved settings --planning.estimate--> Plan --> text or JSON

Settings that a plan does not depend on may be missing (`run.dir`, the tokenizer of a released
size); they are filled in and named. `--refit RUN` predicts what a finished run on the same hardware
measured, and corrects the plan by what was off.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.failures import guarded
from launch.stages import REPO, find_stages
from omni_train.config.errors import ConfigError
from omni_train.engine.exit_codes import ExitCode

if TYPE_CHECKING:
    from omni_train.planning.constants import Constants
    from omni_train.planning.estimate import Options, Plan
    from omni_train.planning.measured import Measured

# What a plan does not need, though a stage requires it.
_FILLED = {
    "run.dir": "run.dir=runs/plan",
    "model.tokenizer": "model.tokenizer=tokenizer",
    "data.sources": "+data.sources={data: {path: shards}}",
    "fit.max_steps": "fit.max_steps=1000",
    "model.init_from": "model.init_from=weights",
}
# Where shares and lengths of a stage's data are known, they stand for data that are not named.
_MIXTURES = {"stage2_multimodal": "+data=mixture_7b", "stage3_long": "+data=mixture_long"}


@dataclass(frozen=True, slots=True)
class Refit:
    """Predicted against measured, of a finished run.

    Args:
        run: its directory.
        stage, steps: what ran, and how many steps were counted.
        step_s, peak_bytes: (predicted, measured).
        slowdown: measured over predicted seconds.
        rest_bytes: memory beyond the formulas.
        save_s: of a checkpoint.
        data_s: waiting for data in a step.
    """

    run: str
    stage: str
    steps: int
    step_s: tuple[float, float]
    peak_bytes: tuple[float, float]
    slowdown: float
    rest_bytes: float
    save_s: float | None
    data_s: float


def add_plan(command: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    command.add_argument("stage", help="name of a stage; see omni-train stages")
    command.add_argument("overrides", nargs="*", help="key=value or group=option")
    command.add_argument("--devices", type=int, default=8, help="GPUs, or CPU ranks; default 8")
    command.add_argument(
        "--hardware",
        default="h100",
        help="h100, h200, a100, a800, cpu or a YAML file; default h100",
    )
    command.add_argument("--price", type=float, help="of one device hour, for the cost")
    command.add_argument("--mtbf", type=float, help="device hours between two failures")
    command.add_argument("--refit", type=Path, metavar="RUN", help="correct by a finished run")
    command.add_argument("--json", action="store_true", help="print JSON")


@guarded
def run_plan(args: argparse.Namespace) -> int:
    """Print the plan of a stage; 2 where it cannot run as it is."""
    from launch.local import check
    from launch.plan_report import launch_command, print_plan
    from omni_train.planning.constants import constant_origins, load_constants

    _check(args)
    filled = missing_settings(args.stage, args.overrides)
    checked = check(args.stage, [*args.overrides, *filled.values()], ranks=args.devices)
    if checked.code != 0:
        sys.stderr.write(checked.text)
        return checked.code
    options = _options(args)
    constants = load_constants(options.hardware)
    refit = None
    if args.refit is not None:
        refit = refit_run(args.refit, options, constants)
        options = replace(options, slowdown=refit.slowdown)
        constants = replace(constants, rest_bytes=refit.rest_bytes)
    plan = _estimate(args.stage, checked.values(), options, constants, refit)
    command = launch_command(plan, args.overrides)
    if args.json:
        values = plan_as_dict(plan, filled=sorted(filled), refit=refit, command=command)
        values["constants"] = {
            name: {"value": value, "origin": constant_origins()[name]}
            for name, value in asdict(constants).items()
        }
        print(json.dumps(values, indent=1))
    else:
        print_plan(plan, filled=sorted(filled), refit=refit, command=command)
    failed = any(finding.status == "fail" for finding in plan.findings)
    return int(ExitCode.usage if failed else ExitCode.done)


def _check(args: argparse.Namespace) -> None:
    for name in ("devices", "price", "mtbf"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ConfigError(
                key=f"--{name}",
                value=value,
                rule="must be above 0",
                remedy="give such a number, or leave it out",
            )


def _options(args: argparse.Namespace) -> Options:
    from omni_train.planning.constants import load_hardware, mtbf_device_hours
    from omni_train.planning.estimate import Options

    return Options(
        devices=args.devices,
        hardware=load_hardware(args.hardware),
        price=args.price,
        mtbf_device_hours=args.mtbf or mtbf_device_hours(),
    )


def _estimate(
    recipe: str,
    values: dict[str, Any],
    options: Options,
    constants: Constants,
    refit: Refit | None,
) -> Plan:
    from omni_train.planning.estimate import plan_stage

    save_s = None if refit is None else refit.save_s
    return plan_stage(recipe, values, options, constants, root=REPO, save_s=save_s)


def missing_settings(recipe: str, overrides: list[str]) -> dict[str, str]:
    """Return overrides for what a plan does not need and nothing gives, by key.

    An experiment is complete by itself, and so is a data file.
    """
    named = [text.lstrip("+").partition("=")[0] for text in overrides]
    if "experiment" in named:
        return {}
    import yaml  # late: help must be quick

    path = REPO / "conf" / f"{recipe}.yaml"
    root = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    defaults = [entry for entry in root.get("defaults", ()) if isinstance(entry, dict)]
    groups = {str(key).split()[-1].lstrip("/") for entry in defaults for key in entry}
    given = [*named, *_dotted(root)]
    if "data" in groups or "data" in named:
        given.append("data.sources")
    if "model.parts" in ".".join(given) or find_stages(recipe)[0].starts_from == "nothing":
        given.append("model.init_from")
    wanted = dict(_FILLED)
    if recipe in _MIXTURES:
        wanted["data.sources"] = _MIXTURES[recipe]
    return {
        key: override
        for key, override in wanted.items()
        if not any(name == key or name.startswith(f"{key}.") for name in given)
    }


def _dotted(values: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        found.append(f"{prefix}{key}")
        if isinstance(value, dict):
            found += _dotted(value, f"{prefix}{key}.")
    return found


def refit_run(folder: Path, options: Options, constants: Constants) -> Refit:
    """Predict what a run has measured, and return both."""
    from omni_train.planning.measured import read_run

    run = read_run(folder)
    here = replace(options, devices=run.ranks, slowdown=1.0)
    own = _estimate(recipe_of(run), run.values, here, constants, None)
    predicted = own.step.total * run.tokens / (own.totals.tokens / own.totals.steps)
    return Refit(
        run=str(folder),
        stage=run.stage,
        steps=run.steps,
        step_s=(predicted, run.compute_s),
        peak_bytes=(own.memory.total, run.peak_bytes),
        slowdown=run.compute_s / predicted,
        rest_bytes=constants.rest_bytes + run.peak_bytes - own.memory.total,
        save_s=run.save_s,
        data_s=run.data_s,
    )


def recipe_of(run: Measured) -> str:
    """Return the recipe behind a run's name, which may end in a phase.

    Raises:
        ConfigError: it is none that can be planned.
    """
    from omni_train.planning.model import PLANNABLE

    for name in PLANNABLE:
        if run.stage == name or run.stage.startswith(f"{name}_"):
            return name
    raise ConfigError(
        key="--refit",
        value=run.stage,
        rule="no stage that trains the model",
        remedy=f"give a run of one of {', '.join(PLANNABLE)}",
    )


def plan_as_dict(
    plan: Plan, *, filled: list[str], refit: Refit | None, command: str
) -> dict[str, Any]:
    """Return a plan as plain values: bytes, seconds, tokens."""
    from omni_train.planning.estimate import MFU_DEFINITION

    values: dict[str, Any] = json.loads(json.dumps(asdict(plan), default=lambda e: e.value))
    values["memory"]["total"] = plan.memory.total
    values["step"]["total"] = plan.step.total
    values["parameters"] = plan.model.parameters
    values["trained_parameters"] = plan.model.trained_parameters
    values["mfu_definition"] = MFU_DEFINITION
    values["filled_in"] = filled
    values["refit"] = None if refit is None else asdict(refit)
    values["launch_command"] = command
    return values
