"""What a run directory says of its model: settings, precision, data, and the runs before it.

Reads `resolved.yaml`, `fingerprint.json`, `state.json` and `events.jsonl`; no tensor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from omni_train.config.errors import ConfigError
from omni_train.config.safe_yaml import load_yaml
from omni_train.data.types import ProcessingConfig
from omni_train.engine.deepspeed import Precision
from omni_train.models.config import ModelConfig
from omni_train.tracking.events import read_jsonl

# A chain of runs that is longer than this refers to itself.
_MAX_RUNS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """One run.

    Args:
        path: run directory.
        stage: name of the stage.
        step: global steps of its newest state.
        model: settings of the model.
        precision: that it was trained in.
        processing: how media become tokens.
        data: hash of each source's manifest.
        code: commit of the code, where it was known.
        parents: where its weights come from: runs, or directories of safetensors.
    """

    path: Path
    stage: str
    step: int
    model: ModelConfig
    precision: Precision
    processing: ProcessingConfig
    data: dict[str, str]
    code: str
    parents: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lineage:
    """The runs behind a model, the newest first, and the directories that they began from."""

    runs: tuple[RunFacts, ...]
    roots: tuple[str, ...] = field(default=())


def run_of(path: Path) -> Path:
    """Return the run directory of a run or of one of its checkpoints.

    Raises:
        ConfigError: it is neither.
    """
    candidates = [path, path.parent.parent] if path.parent.name == "checkpoints" else [path]
    for folder in reversed(candidates):
        if (folder / "resolved.yaml").is_file():
            return folder
    raise ConfigError(
        key="export RUN",
        value=str(path),
        rule="a run directory, or a checkpoint in one, is needed (there is no resolved.yaml)",
        remedy="give the run.dir of a training stage",
    )


def read_facts(path: Path) -> RunFacts:
    """Read one run.

    Raises:
        ConfigError: it is no run of a training stage, or of another version.
    """
    folder = run_of(path)
    try:
        settings = load_yaml(folder / "resolved.yaml")
        identity = json.loads((folder / "fingerprint.json").read_bytes())
        state = json.loads((folder / "state.json").read_bytes())
        model = _typed(ModelConfig, settings["model"])
        facts = RunFacts(
            path=folder,
            stage=str(state["stage"]),
            step=int(state.get("step", 0)),
            model=model,
            precision=Precision[settings["deepspeed"]["precision"]],
            processing=_typed(ProcessingConfig, settings["data"]["processing"]),
            data={str(name): str(value) for name, value in identity["data"].items()},
            code=str(identity.get("git", "")),
            parents=_parents(model, settings),
        )
    except (OSError, ValueError, KeyError, TypeError, OmegaConfBaseException) as error:
        raise ConfigError(
            key="export RUN",
            value=str(folder),
            rule=f"this is no run of a training stage that can be read ({error!r})",
            remedy="give the run.dir of a training stage of this version",
        ) from error
    return facts


def read_lineage(path: Path) -> Lineage:
    """Read a run and all that its weights come from; what is gone is a root by its name."""
    runs: list[RunFacts] = []
    roots: list[str] = []
    waiting = [str(path)]
    while waiting and len(runs) < _MAX_RUNS:
        at = waiting.pop(0)
        if any(run.path == Path(at) for run in runs) or at in roots:
            continue
        if runs and not _is_run(Path(at)):
            roots.append(at)
            continue
        runs.append(read_facts(Path(at)))
        waiting += runs[-1].parents
    return Lineage(tuple(runs), tuple(roots))


def scores_of(run: Path) -> list[dict[str, Any]]:
    """Return the last `evaluation` event of each task of an `evaluate` run.

    Raises:
        ConfigError: the run has none.
    """
    log = run / "events.jsonl"
    events = list(read_jsonl(log)) if log.is_file() else []
    found = {event["task"]: event for event in events if event["kind"] == "evaluation"}
    if not found:
        raise ConfigError(
            key="--scores",
            value=str(run),
            rule="there is no evaluation event in it",
            remedy="give the run.dir of `omni-train evaluate`",
        )
    return list(found.values())


def _is_run(path: Path) -> bool:
    try:
        run_of(path)
    except ConfigError:
        return False
    return True


def _parents(model: ModelConfig, settings: dict[str, Any]) -> tuple[str, ...]:
    places = [model.init_from, *model.init_groups.values(), settings.get("talker_from") or ""]
    return tuple(dict.fromkeys(place for place in places if place))


def _typed(schema: Any, values: dict[str, Any]) -> Any:
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
