"""Composes a recipe's configuration and turns every way in which that fails into a ConfigError.

    overrides --check against the schema--> Hydra --> raw config --no code, no environment--> object

The checks come before Hydra where they can, because its own answer to a mistyped key is the advice
to append it. Nothing is ever instantiated from a configuration, and what a configuration says does
not depend on the environment.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from omni_train.config.errors import ConfigError, MissingError, UnsafeError
from omni_train.config.keys import allows_key, dotted_keys, field_types, nearest_key, strip_optional
from omni_train.config.register import Root
from omni_train.config.safe_yaml import EXECUTABLE_KEYS, TARGET_KEY, check_yaml_files

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"
# What of Hydra itself may be set: where its own files go. Its plugins and logging are built from
# their configuration, so they are not for the command line.
_HYDRA_KEYS = frozenset({"hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.verbose"})
_RESOLVER = re.compile(r"\$\{[^}]*:")


def compose_config(
    root: Root,
    overrides: Sequence[str] = (),
    *,
    conf_dir: Path = CONF_DIR,
    extra_dir: Path | None = None,
) -> Any:
    """Return the root dataclass of a recipe, composed, checked and typed.

    Args:
        root: what the recipe registered.
        overrides: `key=value` and `group=option`, as on the command line.
        conf_dir: directory of YAML files.
        extra_dir: a second one whose files go before it (Hydra's `--config-dir`).

    Raises:
        ConfigError: always with the key, its value, the rule and the remedy.
    """
    folders = [folder for folder in (extra_dir, conf_dir) if folder is not None]
    check_yaml_files(folders)
    check_overrides(root, overrides, folders)
    raw = _compose_raw(root, overrides, conf_dir, extra_dir)
    return to_typed(root, raw)


def to_typed(root: Root, raw: DictConfig) -> Any:
    """Return the dataclass that a composed configuration stands for.

    Raises:
        ConfigError: a value is missing or of another type, a key is unknown or would name code,
            an interpolation reads the environment, or the schema's own rule refuses it.
    """
    if OmegaConf.get_type(raw) is not root.schema:
        raise ConfigError(
            key=root.name,
            value="(root)",
            rule=f"the composed configuration is not a {root.schema.__name__}",
            remedy=f"start the defaults list of the root YAML with {root.name}_schema",
        )
    _refuse_code(OmegaConf.to_container(raw, resolve=False), "")
    if missing := sorted(OmegaConf.missing_keys(raw)):
        raise MissingError(
            key=missing[0],
            value="???",
            rule="required, and has no default",
            remedy=f"add {' '.join(f'{key}=VALUE' for key in missing)}",
        )
    try:
        typed = OmegaConf.to_object(raw)
    except OmegaConfBaseException as error:
        raise _translate(root, error) from None
    except AttributeError as error:
        # Slots refuse the field: this is how OmegaConf reports a key that was appended.
        key = str(getattr(error, "name", "") or error)
        raise unknown_key(root, key, "") from None
    _check_types(typed, root.schema, "")
    return typed


def check_overrides(root: Root, overrides: Sequence[str], folders: Sequence[Path]) -> None:
    """Raise ConfigError on the first override that names no real key, group or option."""
    parser = OverridesParser.create()
    for text in overrides:
        word = next((word for word in sorted(EXECUTABLE_KEYS) if word in text), None)
        if word is not None:
            raise _executable(text.lstrip("+~").partition("=")[0], text.partition("=")[2])
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise ConfigError(
                key=text.partition("=")[0] or text,
                value=text.partition("=")[2],
                rule=f"not an override ({str(error).splitlines()[0]})",
                remedy="write key=value; quote spaces and commas, as in 'key=\"a b\"'",
            ) from None
        _check_override(root, override, folders)


def _check_override(root: Root, override: Override, folders: Sequence[Path]) -> None:
    key, value = override.key_or_group, (override.input_line or "").partition("=")[2]
    if key.split("/")[0].split(".")[0] == "hydra":
        if key not in _HYDRA_KEYS:
            allowed = ", ".join(sorted(_HYDRA_KEYS))
            raise UnsafeError(
                key=key,
                value=value,
                rule="Hydra's plugins and logging cannot be set",
                remedy=f"leave it out; these can be set: {allowed}",
            )
        return
    if override.is_delete():
        raise ConfigError(
            key=key,
            value="~",
            rule="keys cannot be deleted",
            remedy=f"give the value instead, as in {key}=VALUE",
        )
    if override.package is not None:
        raise unknown_key(root, (override.input_line or "").lstrip("+~").partition("=")[0], value)
    groups = _groups(folders)
    is_scalar_option = isinstance(override.value(), str | int | float) or override.value() is None
    if key in groups and (is_scalar_option or override.is_sweep_override()):
        _check_option(override, groups[key])
        return
    if not allows_key(root.schema, key):
        raise unknown_key(root, key, value)
    known = dotted_keys(root.schema)
    if key in known and override.is_add() and get_origin(known[key]) is not dict:
        raise ConfigError(
            key=f"+{key}",
            value=value,
            rule="the key exists, so there is nothing to append",
            remedy=f"write {key}={value}",
        )


def _groups(folders: Sequence[Path]) -> dict[str, set[str]]:
    """Return the options of every group: `model` -> {tiny, ...}; nested ones with a slash."""
    groups: dict[str, set[str]] = {}
    for folder in folders:
        for path in folder.rglob("*.yaml"):
            parts = path.relative_to(folder).with_suffix("").parts
            for cut in range(1, len(parts)):
                groups.setdefault("/".join(parts[:cut]), set()).add("/".join(parts[cut:]))
    return groups


def _check_option(override: Override, options: set[str]) -> None:
    if override.is_sweep_override():
        names = [str(item) for item in override.sweep_string_iterator()]
    else:
        names = [str(override.value())] if override.value() is not None else []
    for name in names:
        if name not in options:
            near = nearest_key(name, options)
            listed = ", ".join(sorted(options))
            raise ConfigError(
                key=override.key_or_group,
                value=name,
                rule="no such option",
                remedy=f"did you mean {near}? One of: {listed}"
                if near
                else f"use one of: {listed}",
            )


def unknown_key(root: Root, key: str, value: object) -> ConfigError:
    """Return the error for a key that the schema lacks, with the nearest real one."""
    if key.rpartition(".")[2] in EXECUTABLE_KEYS:
        return _executable(key, value)
    near = nearest_key(key, dotted_keys(root.schema))
    hint = f"did you mean {near}?" if near else "remove it"
    return ConfigError(
        key=key,
        value=value,
        rule=f"no such key in {root.name}",
        remedy=f"{hint} (`omni-train config {root.name}` shows every key)",
    )


def _executable(key: str, value: object) -> UnsafeError:
    return UnsafeError(
        key=key,
        value=value,
        rule="code is never chosen by a configuration",
        remedy="choose a member of an enum field instead",
    )


def _compose_raw(
    root: Root, overrides: Sequence[str], conf_dir: Path, extra_dir: Path | None
) -> DictConfig:
    search = [f"hydra.searchpath=[file://{extra_dir.resolve()}]"] if extra_dir else []
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir.resolve()), version_base="1.3"):
            raw = compose(root.name, overrides=[*overrides, *search], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise _translate(root, error) from None
    _check_hydra(raw.hydra)
    with flag_override(raw, ["struct", "readonly"], False):
        del raw["hydra"]
    return raw


def _check_hydra(section: DictConfig) -> None:
    """Refuse configuration files that change how Hydra itself runs: it builds what they name."""
    rules = {
        "callbacks": not section.callbacks,
        "launcher": str(section.launcher.get(TARGET_KEY)).startswith("hydra._internal."),
        "sweeper": str(section.sweeper.get(TARGET_KEY)).startswith("hydra._internal."),
        "job_logging": _is_plain_logging(section.job_logging),
        "hydra_logging": _is_plain_logging(section.hydra_logging),
    }
    for name, fine in rules.items():
        if not fine:
            raise UnsafeError(
                key=f"hydra.{name}",
                value="(changed)",
                rule="Hydra's plugins and logging cannot be set",
                remedy="remove it from the YAML files",
            )


def _is_plain_logging(section: DictConfig) -> bool:
    classes = {handler.get("class") for handler in (section.get("handlers") or {}).values()}
    return classes <= {"logging.StreamHandler", "logging.FileHandler"}


def _refuse_code(node: Any, prefix: str) -> None:
    """Walk unresolved values: no key that names code, no interpolation but plain references."""
    items: Iterator[tuple[Any, Any]]
    if isinstance(node, dict):
        items = iter(node.items())
    elif isinstance(node, list):
        items = iter(enumerate(node))
    else:
        if isinstance(node, str) and _RESOLVER.search(node):
            raise UnsafeError(
                key=prefix,
                value=node,
                rule="a value may refer to another key, but not to the environment or a function",
                remedy="write the value itself",
            )
        return
    for key, value in items:
        dotted = f"{prefix}.{key}" if prefix else str(key)
        if key in EXECUTABLE_KEYS:
            raise _executable(dotted, value)
        _refuse_code(value, dotted)


def _check_types(value: Any, hint: Any, key: str) -> None:
    """Refuse a container where a scalar belongs: OmegaConf lets a mapping into `list[str]`."""
    hint = strip_optional(hint)
    if value is None or hint is Any:
        return
    if dataclasses.is_dataclass(hint) and not isinstance(value, dict | list):
        for name, inner in field_types(type(value)).items():
            _check_types(getattr(value, name), inner, f"{key}.{name}" if key else name)
    elif get_origin(hint) is list and isinstance(value, list):
        for number, item in enumerate(value):
            _check_types(item, get_args(hint)[0], f"{key}.{number}")
    elif get_origin(hint) is dict and isinstance(value, dict):
        for name, item in value.items():
            _check_types(item, get_args(hint)[1], f"{key}.{name}")
    elif isinstance(value, dict | list):
        raise ConfigError(
            key=key,
            value=value,
            rule=f"must be of type {getattr(hint, '__name__', hint)}",
            remedy="give a single value",
        )


def _translate(root: Root, error: Exception) -> ConfigError:
    """Return the ConfigError for what Hydra or OmegaConf found."""
    text = str(error)
    if isinstance(error, MissingConfigException):
        return ConfigError(
            key=root.name,
            value=error.missing_cfg_file or "",
            rule="no such configuration file",
            remedy="the defaults list must name files below conf/",
        )
    source = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = str(getattr(source, "full_key", "") or "")
    found = re.search(r"full_key: (\S+)", text)
    if not key and found:
        key = found[1]
    message = " ".join(str(getattr(source, "msg", "") or source).split("\n    full_key")[0].split())
    if isinstance(error, MissingMandatoryValue) or "missing mandatory value" in text:
        return ConfigError(
            key=key, value="???", rule="required, and has no default", remedy=f"add {key}=VALUE"
        )
    if "missing" in text and "required keyword-only" in text:
        key = "/".join(re.findall(r"'(\w+)'", text.partition("argument")[2])) or key
        return ConfigError(
            key=key,
            value="(absent)",
            rule="required, and has no default",
            remedy=f"add {key}=VALUE",
        )
    override = re.search(r"override '?\+*([^\s'=]+)'?=?(.*)", text)
    if override and ("append" in text or "is not a subclass" in message):
        new_name = _new_name(root, override[1], override[2])
        if new_name is not None:
            return new_name
    if key and not allows_key(root.schema, key):
        return unknown_key(root, key, "(given)")
    return ConfigError(
        key=key or root.name,
        value=override[2] if override else "(given)",
        rule=message.rstrip("."),
        remedy=_remedy(dotted_keys(root.schema).get(key))
        if key
        else "mend the override or the file",
    )


def _new_name(root: Root, key: str, value: str) -> ConfigError | None:
    """Return the error for a name that a mapping lacks so far; None outside of mappings."""
    for parent, hint in dotted_keys(root.schema).items():
        if get_origin(hint) is dict and key.startswith(f"{parent}."):
            name, _, rest = key.removeprefix(f"{parent}.").partition(".")
            new = f"+{parent}.{name}={value or 'VALUE'}"
            if dataclasses.is_dataclass(get_args(hint)[1]):
                new = f"'+{parent}={{{name}: {{{rest or '...'}: {value or 'VALUE'}}}}}'"
            return ConfigError(
                key=key,
                value=value,
                rule="no such name in this mapping so far",
                remedy=f"write {new} to add it",
            )
    return None


def _remedy(hint: Any) -> str:
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return f"use one of: {', '.join(hint.__members__)}"
    if isinstance(hint, type):
        return f"give a value of type {hint.__name__}"
    return "give a value of the type that the schema states"
