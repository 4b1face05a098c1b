"""Whose the files of a folder are: the first run writes it down, later ones are held to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omni_train.config.errors import ConfigError
from omni_train.data.index import write_atomically
from omni_train.engine.distributed import barrier
from omni_train.engine.run import Run


def claim(
    path: Path, identity: dict[str, Any], run: Run, *, key: str, rule: str, remedy: str
) -> None:
    """Write `identity` down in a folder, or refuse to mix other files into it; all ranks call.

    Args:
        path: file in that folder; all ranks must see it.
        identity: what the folder's files depend on.
        run: this rank's.
        key: of the setting that names the folder.
        rule: what the folder holds where something differs.
        remedy: what to do then.

    Raises:
        ConfigError: another identity is written there.
    """
    if run.is_main and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(identity, indent=1) + "\n").encode())
    barrier()
    before = json.loads(path.read_bytes())
    if changed := sorted(name for name in identity if before.get(name) != identity[name]):
        raise ConfigError(
            key=key,
            value=str(path.parent),
            rule=f"{rule}; these differ: {', '.join(changed)}",
            remedy=remedy,
        )
