"""SIGKILL inside forward, backward, update and save of five recipes; what is resumed is Equal.

One run of each recipe is killed four times and goes on each time; another one is left alone. Data
and models are those of the recipes' own tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from omni_train.tracking.events import read_jsonl, read_steps
from tests.recipes import (
    test_stage1,
    test_stage2_3,
    test_talker_dpo,
    test_talker_icl,
    test_thinker_sft,
)
from tests.recipes.launching import finish, start

STEPS = 6
PHASES = ("forward", "backward", "update", "save")
RECIPES = ("stage1_audio", "stage2_multimodal", "thinker_sft", "talker_icl", "talker_dpo")
Overrides = Callable[..., list[str]]

# Under names of their own: two of the modules call theirs `given`.
towers = test_stage2_3.towers
sft_root = test_thinker_sft.root
spoken = test_talker_icl.given
given, sampled, pairs = test_talker_dpo.given, test_talker_dpo.sampled, test_talker_dpo.pairs


@pytest.fixture(scope="module")
def overrides(request: pytest.FixtureRequest) -> Callable[[str], Overrides]:
    """Return what makes a recipe's overrides for a run directory; data is made when first asked."""

    def of(recipe: str) -> Overrides:
        get = request.getfixturevalue
        if recipe == "stage1_audio":
            return partial(test_stage1.overrides, get("corpus"))
        if recipe == "stage2_multimodal":
            return partial(test_stage2_3.stage2, get("corpus"), get("towers"))
        if recipe == "thinker_sft":
            return partial(test_thinker_sft.overrides, get("sft_root"))
        if recipe == "talker_icl":
            return partial(test_talker_icl.overrides, get("spoken"))
        return partial(test_talker_dpo.dpo_overrides, get("given"), get("pairs"))

    return of


def launch(recipe: str, overrides: Overrides, run_dir: Path, *extra: str) -> tuple[int, str]:
    settings = [f"fit.max_steps={STEPS}", "fit.save_steps=1", *extra]
    return finish(start(recipe, overrides(run_dir, *settings), ranks=2))


def trace(run_dir: Path) -> list[tuple[Any, ...]]:
    return [
        (e["step"], e["loss"], e["keys"], e["grad_norm"], e["lr"])
        for e in read_steps(run_dir / "events.jsonl")
    ]


def last_files(run_dir: Path) -> dict[str, Any]:
    """Hashes of the last checkpoint's files: weights, moments, RNG, position in the data."""
    manifest = json.loads((run_dir / "checkpoints" / f"step-{STEPS}" / "manifest.json").read_text())
    files: dict[str, Any] = manifest["files"]
    assert {"rank-00000.safetensors", "rank-00001.safetensors", "rank-00001.json"} <= set(files)
    return files


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_in_every_phase_and_resumed_each_time_is_equal(
    recipe: str, overrides: Callable[[str], Overrides], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, output = launch(recipe, overrides(recipe), whole)
    assert code == 0, output
    # Step 2 in forward, 3 in backward, 4 in update, 5 while it is saved; each rank twice.
    for step, phase in enumerate(PHASES, start=2):
        place = (f"fit.fault.step={step}", f"fit.fault.rank={step % 2}", f"fit.fault.phase={phase}")
        code, output = launch(recipe, overrides(recipe), killed, "fit.fault.kind=kill", *place)
        assert code != 0, output
        assert "SIGKILL" in output, output
        done = read_steps(killed / "events.jsonl")[-1]["step"]
        # While a checkpoint is written, training goes on.
        assert done in ((step, step + 1) if phase == "save" else (step - 1,))
    code, output = launch(recipe, overrides(recipe), killed)
    assert code == 0, output
    resumes = [e["step"] for e in read_jsonl(killed / "events.jsonl") if e["kind"] == "resume"]
    # A checkpoint is written behind the step that follows; it is sure where the next one has begun.
    assert resumes[-1] == 4
    assert resumes == sorted(resumes)
    assert len(resumes) >= 3
    assert trace(killed) == trace(whole)
    assert last_files(killed) == last_files(whole)
