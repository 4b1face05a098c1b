"""A folder keeps whose files it holds, and another job does not get in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omni_train.config.errors import ConfigError
from omni_train.data.claim import claim
from omni_train.engine.run import RunConfig, start_run


def test_the_first_identity_stays_and_another_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "made" / "job.json"
    rules = {"key": "out", "rule": "holds others' files", "remedy": "give another"}
    config = RunConfig(dir=str(tmp_path / "run"))
    with start_run(config, stage="toy", settings=config) as run:
        for _ in range(2):
            claim(path, {"model": "a", "seed": 1}, run, **rules)
        with pytest.raises(ConfigError, match="others' files; these differ: model, voice") as found:
            claim(path, {"model": "b", "seed": 1, "voice": "c"}, run, **rules)
    assert (found.value.key, found.value.value) == ("out", str(path.parent))
    assert json.loads(path.read_bytes()) == {"model": "a", "seed": 1}
