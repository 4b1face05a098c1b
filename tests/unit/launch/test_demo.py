"""What the demo hands to its stages."""

from __future__ import annotations

from launch.demo import STAGES, overrides_of
from launch.stages import REPO


def test_a_seed_reaches_every_stage() -> None:
    root = REPO / "runs" / "demo-seed3"
    for stage in STAGES:
        given = overrides_of(stage, root, quick=False, seed=3)
        assert "run.seed=3" in given
        assert "run.experiment=demo-seed3" in given
        assert not any(
            o.startswith("run.seed") for o in overrides_of(stage, root, quick=False, seed=None)
        )
