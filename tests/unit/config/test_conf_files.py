"""Every YAML file below conf/ composes with its recipe, and every experiment is complete."""

from __future__ import annotations

import importlib
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import yaml

from omni_train.config.keys import field_types
from omni_train.config.load import CONF_DIR, compose_config
from omni_train.config.register import Root, find_root

RECIPES = sorted(path.stem for path in CONF_DIR.glob("*.yaml"))
EXPERIMENTS = sorted(
    path.relative_to(CONF_DIR / "experiment").with_suffix("").as_posix()
    for path in (CONF_DIR / "experiment").rglob("*.yaml")
)
GROUP_FILES = sorted(
    path.relative_to(CONF_DIR).with_suffix("").as_posix()
    for path in CONF_DIR.glob("*/*.yaml")
    # Of the launcher, not of a recipe.
    if path.parent.name not in {"cluster", "pipeline"}
)
# What a person has to say, by key; given here so that a group file can be composed on its own.
REQUIRED = {
    "run": ["run.dir=runs/x"],
    "model": ["model.tokenizer=tok", "model.init_from=run"],
    "data": ["+data.sources={a: {path: x}}"],
    "fit": ["fit.max_steps=1"],
    "phase": ["phase=adapter"],
    "tasks": ["+tasks={a: {path: x, metric: wer}}"],
    "requests": ["requests={path: x, codec: {path: c}, sampling: {max_codes: 9}}"],
}


def load(recipe: str) -> Root:
    importlib.import_module(f"recipes.{recipe}")
    return find_root(recipe)


def recipe_of(experiment: str) -> str:
    """`stage1_audio/debug` and `demo/stage1_audio_adapter` both belong to `stage1_audio`."""
    folder, name = experiment.split("/")
    return folder if folder in RECIPES else next(r for r in RECIPES if name.startswith(r))


def required(root: Root) -> list[str]:
    fields = field_types(root.schema)
    return [text for section, texts in REQUIRED.items() if section in fields for text in texts]


def test_every_recipe_has_a_root_and_a_debug_experiment() -> None:
    recipes = {path.stem for path in (Path(CONF_DIR).parent / "recipes").glob("*.py")}
    assert recipes - {"__init__"} == set(RECIPES)
    assert {f"{recipe}/debug" for recipe in RECIPES} <= set(EXPERIMENTS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_root_composes_when_the_required_keys_are_given(recipe: str) -> None:
    root = load(recipe)
    assert isinstance(compose_config(root, required(root)), root.schema)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_is_complete(experiment: str) -> None:
    root = load(recipe_of(experiment))
    cfg = compose_config(root, [f"experiment={experiment}"])
    assert cfg.run.dir


@pytest.mark.parametrize("name", GROUP_FILES)
def test_group_file_composes_with_every_recipe_that_has_the_section(name: str) -> None:
    group, option = name.split("/")
    used = 0
    for root in map(load, RECIPES):
        if is_dataclass(field_types(root.schema).get(group)):
            # A group that the root's defaults do not name is added.
            named = [next(iter(d)) for d in _defaults(root.name) if isinstance(d, dict)]
            prefix = "" if group in named else "+"
            cfg = compose_config(root, [f"{prefix}{group}={option}", *required(root)])
            assert isinstance(cfg, root.schema)
            used += 1
    assert used, f"no recipe has a section {group}"


def _defaults(recipe: str) -> list[object]:
    text = (CONF_DIR / f"{recipe}.yaml").read_text(encoding="utf-8")
    defaults = yaml.safe_load(text)["defaults"]
    assert isinstance(defaults, list)
    return defaults
