"""Names that a user gives and that become files, folders and values on a command line."""

from __future__ import annotations

import re

from omni_train.config.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def check_name(name: str, *, key: str) -> None:
    """Refuse a name that could climb out of its folder, hide, or be read as an option.

    Args:
        name: as given.
        key: of the setting that gives it.

    Raises:
        ConfigError: it is no such name.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(
            key=key,
            value=name,
            rule="a name is 1 to 63 letters, digits, . _ and -, and begins with a letter or digit",
            remedy="rename it",
        )
