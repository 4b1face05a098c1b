"""Makes a recipe's `main` a plain Hydra application with errors that a person can act on.

    @recipe_main(Stage1AudioConfig, "stage1_audio", validate)
    def main(raw: DictConfig) -> None:
        cfg: Stage1AudioConfig = OmegaConf.to_object(raw)

`--cfg job`, `--multirun` and `--config-dir` are Hydra's. A setting that cannot be used ends the
process with status 2 and one message before anything starts; no traceback. Hydra keeps no output
directory and no log of its own (see the `hydra` section of the root YAML files).
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from omegaconf import DictConfig

from omni_train.config.errors import ConfigError, DataError, MissingError
from omni_train.config.load import CONF_DIR, compose_config, to_typed
from omni_train.config.register import Root, Validate, register_root
from omni_train.engine.exit_codes import ExitCode, RunError, exit_code_of, leave
from omni_train.engine.fingerprint import redact_text

Main = Callable[[DictConfig], None]


def recipe_main(
    schema: type, name: str, validate: Validate | None = None, *, conf_dir: Path = CONF_DIR
) -> Callable[[Main], Callable[[], None]]:
    """Return the decorator that registers a recipe's root and wraps its `main`.

    Args:
        schema: root dataclass; defined in the recipe's file.
        name: of the recipe and of `conf/<name>.yaml`.
        validate: rules across sections, called with (config, world size).
        conf_dir: directory of YAML files.
    """
    root = register_root(name, schema, validate)

    def decorate(main: Main) -> Callable[[], None]:
        """What starts the recipe; `main` itself is called in the job, after its checks."""

        @functools.wraps(main)
        def job(raw: DictConfig) -> None:
            try:
                _check(root, to_typed(root, raw))
                main(raw)
            except Exception as error:  # noqa: BLE001  ends the process
                end_with(error)

        application = hydra.main(config_path=str(conf_dir), config_name=name, version_base="1.3")(
            job
        )

        def start() -> None:
            """Check the arguments before Hydra does, whose advice on a typo is to append it."""
            try:
                check_arguments(root, sys.argv[1:], conf_dir)
            except Exception as error:  # noqa: BLE001  ends the process
                end_with(error)
            if "TORCHELASTIC_RUN_ID" in os.environ:
                _run_as_rank(application)
            else:
                application()

        return start

    return decorate


def _run_as_rank(application: Callable[[], None]) -> NoReturn:
    """Run a rank to its end; the run directory is closed before `main` returns."""
    code = 0
    try:
        application()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  ends the process
        traceback.print_exc()
        code = int(ExitCode.bug)
    leave(code)


def world_size() -> int:
    """Return the number of ranks that torchrun announced; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_arguments(root: Root, arguments: Sequence[str], conf_dir: Path) -> Any:
    """Return the validated configuration of a command line; None where it cannot be known here.

    A sweep or another root is checked by each job instead, and `--cfg` without `--resolve` only
    shows: what is still required stands there as `???`.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    parser.add_argument("--config-name", "-cn")
    parser.add_argument("--config-path", "-cp")
    parser.add_argument("--cfg", "-c")
    parser.add_argument("--package", "-p")
    parser.add_argument("--info", "-i", nargs="?")
    parser.add_argument("overrides", nargs="*")
    known, flags = parser.parse_known_args(list(arguments))
    if known.config_name or known.config_path or {"-h", "--help", "--hydra-help"} & set(flags):
        return None
    if {"-m", "--multirun"} & set(flags):
        return None
    try:
        cfg = compose_config(root, known.overrides, conf_dir=conf_dir, extra_dir=known.config_dir)
    except MissingError:
        if known.cfg is None or "--resolve" in flags:
            raise
        return None
    _check(root, cfg)
    return cfg


def _check(root: Root, cfg: Any) -> None:
    if root.validate is not None:
        root.validate(cfg, world_size())


def end_with(error: BaseException) -> None:
    """Print what went wrong and end the process with the status that it stands for.

    Errors that a user can mend are one message; anything else keeps its traceback.
    """
    code = exit_code_of(error)
    if isinstance(error, ConfigError):
        text = f"config error: {error}\n"
    elif isinstance(error, DataError | RunError):
        text = f"{code.name}: {error}\n"
    else:
        text = "".join(traceback.format_exception(error))
    # This goes into a file of the run directory too.
    sys.stderr.write(redact_text(text))
    sys.stderr.flush()
    sys.stdout.flush()
    raise SystemExit(int(code if code is not ExitCode.done else ExitCode.bug))
