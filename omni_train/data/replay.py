"""Which samples a global step of a run was made of, planned again from the run's own settings.

A step's event has its place in the plan, and the plan is a pure function of the settings; so only a
hash of the keys needs to be kept of a step. Not for runs of spoken replies, whose plan is another
(speech_loader.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf

from omni_train.config.errors import ConfigError, DataError
from omni_train.data.config import DataConfig
from omni_train.data.loader import PlannedLoader
from omni_train.data.tokenizer import load_tokenizer
from omni_train.data.types import ModelSpec
from omni_train.data.work import shard_name
from omni_train.engine.fingerprint import Identity
from omni_train.tracking.events import read_jsonl


class StepSample(NamedTuple):
    """One sample of a global step."""

    source: str
    shard: str
    key: str


def step_samples(run_dir: Path, step: int) -> list[StepSample]:
    """Return the samples that were planned for a global step, pack by pack.

    Those that could not be used are among them; `ledger.jsonl` names them.

    Args:
        run_dir: of a run on dialogues.
        step: as its events count, from 1.

    Raises:
        ConfigError: there is no such run or step, or its data have changed since.
        DataError: a set cannot be read.
    """
    events = (e for e in read_jsonl(run_dir / "events.jsonl") if e["kind"] in ("step", "skipped"))
    of_step = [event for event in events if event["step"] == step]
    if not of_step:
        raise ConfigError(
            key="STEP",
            value=step,
            rule=f"{run_dir} has no event of that step",
            remedy="give a run directory and a step that it has done",
        )
    position = of_step[-1]["position"]
    loader = _loader(run_dir)
    packs = loader.plan(position["window"])[position["step"]]
    placed = [loader.sources[ref.source].place(ref) for pack in packs for ref in pack.samples]
    return [StepSample(sample.source, shard_name(sample.shard), sample.key) for sample in placed]


def _loader(run_dir: Path) -> PlannedLoader:
    from omni_train.models.config import ModelConfig
    from omni_train.models.presets import model_spec, resolve_config

    try:
        settings = yaml.safe_load((run_dir / "resolved.yaml").read_text(encoding="utf-8"))
        data = _typed(DataConfig, settings["data"])
        model = _typed(ModelConfig, settings["model"])
        seed = int(settings["run"]["seed"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            key="RUN",
            value=str(run_dir),
            rule=f"no run on dialogues: its resolved.yaml cannot be used ({error!r})",
            remedy="give the directory of a stage that reads data.sources",
        ) from error
    tokenizer = load_tokenizer(model.tokenizer)
    spec: ModelSpec = model_spec(resolve_config(model, tokenizer).thinker_config, tokenizer)
    loader = PlannedLoader(
        data,
        tokenizer=tokenizer,
        spec=spec,
        rank=0,
        world_size=1,
        seed=seed,
        ledger=lambda **fields: None,
    )
    _check_data(run_dir, loader)
    return loader


def _typed(schema: type, values: dict[str, Any]) -> Any:
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))


def _check_data(run_dir: Path, loader: PlannedLoader) -> None:
    """Refuse sets that are no longer what the run read: other samples would be named."""
    recorded = json.loads((run_dir / "fingerprint.json").read_text(encoding="utf-8"))
    before = Identity(**recorded).data
    now = {name: loader.fingerprint.get(f"data.{name}") for name in before}
    if changed := sorted(name for name in before if before[name] != now[name]):
        raise DataError("stale_index", f"the shards of {', '.join(changed)} are not what it read")
