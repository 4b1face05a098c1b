"""Registers schemas with Hydra's ConfigStore, explicitly and in one place.

A recipe's root types every group file below it, so only roots and variants of a section (a
subclass chosen by `optim: muon`) need an entry. Importing this module imports no model code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from omni_train.config.keys import dotted_keys, field_types

Validate = Callable[[Any, int], None]


@dataclass(frozen=True, slots=True)
class Root:
    """A recipe's configuration.

    Args:
        name: of the recipe and of its YAML file under `conf/`.
        schema: root dataclass.
        validate: rules across sections, called with (config, world size); pure.
    """

    name: str
    schema: type
    validate: Validate | None = None


_ROOTS: dict[str, Root] = {}


def register_root(name: str, schema: type, validate: Validate | None = None) -> Root:
    """Store `schema` as `<name>_schema`, which the first entry of `conf/<name>.yaml` names."""
    check_schema(schema)
    root = Root(name=name, schema=schema, validate=validate)
    _ROOTS[name] = root
    node = OmegaConf.structured(schema)
    _open_sections(node, schema)
    ConfigStore.instance().store(name=f"{name}_schema", node=node, provider="omni_train")
    return root


def _open_sections(node: DictConfig, schema: type) -> None:
    """Put each required section in place with its required keys still missing.

    Otherwise `run.dir=...` fails as long as no file names `run`, and what is reported as missing is
    the section, not the key.
    """
    for name, hint in field_types(schema).items():
        if is_dataclass(hint) and isinstance(hint, type):
            if OmegaConf.is_missing(node, name):
                node[name] = hint
            if node[name] is not None:
                _open_sections(node[name], hint)


def register_variant(group: str, name: str, schema: type) -> None:
    """Store a section's subclass as `<group>/<name>_schema`, for a group file to extend."""
    check_schema(schema)
    ConfigStore.instance().store(
        group=group, name=f"{name}_schema", node=schema, provider="omni_train"
    )


def find_root(name: str) -> Root:
    """Return the root that the recipe registered; KeyError where its module is not imported."""
    return _ROOTS[name]


def check_schema(schema: type) -> None:
    """Refuse a schema that would accept unknown keys: every dataclass in it must have slots."""
    if not is_dataclass(schema):
        raise TypeError(f"{schema!r} is no dataclass")
    if "__slots__" not in vars(schema):
        raise TypeError(f"{schema.__name__} lacks slots=True, so `+key=...` would pass unseen")
    for hint in dotted_keys(schema).values():
        if is_dataclass(hint):
            check_schema(hint)  # type: ignore[arg-type]
