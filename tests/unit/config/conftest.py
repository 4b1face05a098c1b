"""A small recipe root with every kind of field, and a directory of YAML files for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest

from omni_train.config.errors import ConfigError
from omni_train.config.register import Root, register_root


class Precision(Enum):
    bf16 = "bf16"
    fp32 = "fp32"


@dataclass(kw_only=True, slots=True)
class SourceSection:
    path: str
    weight: float = 1.0


@dataclass(kw_only=True, slots=True)
class ModelSection:
    hidden_size: int = 4
    num_layers: int = 2
    precision: Precision = Precision.fp32
    names: list[str] = field(default_factory=list)
    max_audio_s: float | None = None

    def __post_init__(self) -> None:
        if self.hidden_size < 1:
            raise ConfigError(
                key="model.hidden_size",
                value=self.hidden_size,
                rule="must be at least 1",
                remedy="raise it",
            )


@dataclass(kw_only=True, slots=True)
class DataSection:
    sources: dict[str, SourceSection] = field(default_factory=dict)
    pack_tokens: int = 8192
    num_workers: int = 2


@dataclass(kw_only=True, slots=True)
class OptimSection:
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup_steps: int = 10
    group_rates: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class RunSection:
    dir: str
    seed: int = 0


@dataclass(kw_only=True, slots=True)
class ToyConfig:
    run: RunSection
    model: ModelSection
    data: DataSection = field(default_factory=DataSection)
    optim: OptimSection = field(default_factory=OptimSection)
    num_steps: int
    note: str = ""


def _validate(cfg: ToyConfig, world_size: int) -> None:
    if cfg.num_steps % world_size:
        raise ConfigError(
            key="num_steps",
            value=cfg.num_steps,
            rule=f"must be a multiple of the {world_size} ranks",
            remedy="raise it",
        )


FILES = {
    "toy.yaml": """defaults:
  - toy_schema
  - model: tiny
  - _self_
  - experiment: null
  - override hydra/job_logging: none
  - override hydra/hydra_logging: none
hydra:
  run: {dir: .}
  output_subdir: null
num_steps: 4
run:
  dir: runs/toy
data:
  sources:
    demo: {path: shards}
""",
    "model/tiny.yaml": "hidden_size: 8\n",
    "model/large.yaml": "hidden_size: 64\nprecision: bf16\n",
    "experiment/toy/debug.yaml": (
        "# @package _global_\ndefaults:\n  - override /model: large\nnum_steps: 2\n"
    ),
}


@pytest.fixture
def conf_dir(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "conf"


@pytest.fixture
def root() -> Root:
    return register_root("toy", ToyConfig, _validate)
