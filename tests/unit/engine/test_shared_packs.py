"""A step that is not finite names its samples also where the rank shares another's pack."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from omni_train.engine import progress


@pytest.mark.parametrize(
    ("keys", "offenders", "named"),
    [
        # Ranks 0 and 1 share packs, and so do 2 and 3: the first of each has the keys.
        ([[["a"], ["b"]], [[], []], [["c"], ["d"]], [[], []]], {1: [1], 3: []}, ["b", "c d"]),
        # Each has its own.
        ([[["a"]], [["b"]]], {1: [0]}, ["b"]),
    ],
)
def test_samples_are_named(
    monkeypatch: pytest.MonkeyPatch,
    keys: list[list[list[str]]],
    offenders: dict[int, list[int]],
    named: list[str],
) -> None:
    events: list[dict[str, Any]] = []
    run = SimpleNamespace(
        event=lambda kind, **fields: events.append({"kind": kind, **fields}), is_main=False
    )
    monkeypatch.setattr(progress, "gather_json", lambda value: keys)
    progress.report_non_finite(SimpleNamespace(offenders=offenders), [], run, step=3)  # type: ignore[arg-type]
    found = [[key for pack in event["keys"] for key in pack] for event in events]
    assert found == [names.split() for names in named]
