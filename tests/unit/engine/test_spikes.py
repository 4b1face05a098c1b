"""The spike rule on figures that are known, what it reads on a resume, and going back."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from omni_train.config.errors import ConfigError
from omni_train.engine.run import Run, RunConfig, start_run
from omni_train.engine.spikes import SpikeConfig, SpikeWatch, rewind
from omni_train.engine.types import StepItem
from omni_train.engine.vote import Verdict
from omni_train.tracking.events import read_jsonl

ITEM = StepItem(micro_batches=[], epoch=0, window=3, step=5)


def verdict(loss: float, norm: float = 1.0, *, finite: bool = True, tokens: int = 9) -> Verdict:
    return Verdict(
        finite=finite,
        loss=loss,
        num_tokens=tokens,
        grad_norm=norm,
        group_norms={},
        metrics={},
        keys="0" * 16,
        num_samples=1,
        all_tokens=9,
        offenders={},
        bad_samples=[],
        flops=0.0,
        stop="",
        own=[],
    )


def falling(count: int) -> list[float]:
    """A loss that falls from 2.5 and is noisy."""
    rng = random.Random(0)
    return [2.0 + 0.5 * 0.99**step + rng.gauss(0, 0.05) for step in range(count)]


def watched(folder: Path, losses: list[float], **config: Any) -> list[dict[str, Any]]:
    run_config = RunConfig(dir=str(folder))
    with start_run(run_config, stage="toy", settings=run_config) as run:
        watch = SpikeWatch(SpikeConfig(**config), run)
        for loss in losses:
            run.step += 1
            watch.see(verdict(loss), ITEM)
    return [e for e in read_jsonl(folder / "events.jsonl") if e["kind"] == "spike"]


def test_noise_and_a_falling_loss_are_no_spikes(tmp_path: Path) -> None:
    assert watched(tmp_path, falling(400)) == []


def test_a_spike_is_named_with_its_place(tmp_path: Path) -> None:
    losses = falling(200)
    losses[150] += 1.5
    (found,) = watched(tmp_path, losses)
    assert (found["step"], found["what"], found["value"]) == (151, "loss", losses[150])
    assert found["median"] < found["limit"] < found["value"]
    assert found["position"] == {"window": 3, "step": 5}


def test_a_flat_loss_tolerates_a_little_and_few_steps_say_nothing(tmp_path: Path) -> None:
    assert watched(tmp_path / "a", [1.0] * 40 + [1.05] + [1.0] * 5) == []
    assert len(watched(tmp_path / "b", [1.0] * 40 + [1.07])) == 1
    assert watched(tmp_path / "c", [1.0] * 15 + [9.0]) == []
    assert watched(tmp_path / "d", [1.0] * 40 + [9.0], deviations=0.0) == []


def test_gradient_norms_too_and_what_was_not_applied_does_not_count(tmp_path: Path) -> None:
    run_config = RunConfig(dir=str(tmp_path))
    with start_run(run_config, stage="toy", settings=run_config) as run:
        watch = SpikeWatch(SpikeConfig(), run)
        for _ in range(30):
            watch.see(verdict(1.0), ITEM)
        watch.see(verdict(50.0, finite=False), ITEM)
        watch.see(verdict(50.0, tokens=0), ITEM)
        watch.see(verdict(1.0, norm=40.0), ITEM)
    found = [e for e in read_jsonl(tmp_path / "events.jsonl") if e["kind"] == "spike"]
    assert [e["what"] for e in found] == ["grad_norm"]


def test_a_resumed_run_remembers_the_steps_before(tmp_path: Path) -> None:
    run_config = RunConfig(dir=str(tmp_path))
    with start_run(run_config, stage="toy", settings=run_config) as run:
        for step in range(1, 31):
            figures = {"loss": 1.0, "grad_norm": {"total": 1.0}, "applied": step != 7}
            run.event("step", step=step, **figures)
    with start_run(run_config, stage="toy", settings=run_config) as run:
        # Steps after the checkpoint are done again and must not count twice.
        run.step = 20
        watch = SpikeWatch(SpikeConfig(window=64), run)
        assert len(watch._recent["loss"]) == 19
        watch.see(verdict(3.0), ITEM)
    assert any(e["kind"] == "spike" for e in read_jsonl(tmp_path / "events.jsonl"))


def make_run(folder: Path, *steps: int) -> RunConfig:
    for step in steps:
        (folder / "checkpoints" / f"step-{step}").mkdir(parents=True)
    return RunConfig(dir=str(folder))


def kept(run: Run) -> list[str]:
    return sorted(path.name for path in run.checkpoints.glob("step-*"))


def test_later_checkpoints_go_to_quarantine_once(tmp_path: Path) -> None:
    run_config = make_run(tmp_path, 2, 4, 6)
    config = SpikeConfig(rewind_to=4, skip_steps=[5])
    with start_run(run_config, stage="toy", settings=run_config) as run:
        rewind(SpikeConfig(), run)
        assert len(kept(run)) == 3
        rewind(config, run)
        assert kept(run) == ["step-2", "step-4"]
        assert len(list((tmp_path / "quarantine").iterdir())) == 1
        (tmp_path / "checkpoints" / "step-6").mkdir()
        rewind(config, run)
        assert len(kept(run)) == 3, "the same settings do not go back again"
        rewind(SpikeConfig(rewind_to=4, skip_steps=[5, 6]), run)
        assert kept(run) == ["step-2", "step-4"]
        with pytest.raises(ConfigError, match=r"keeps checkpoints of the steps \[2, 4\]"):
            rewind(SpikeConfig(rewind_to=3), run)
    assert len(json.loads((tmp_path / "rewinds.json").read_text())) == 2


@pytest.mark.parametrize(
    "wrong", [{"window": 3}, {"deviations": -1.0}, {"skip_steps": [0]}, {"rewind_to": -1}]
)
def test_bad_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"fit.spikes.{next(iter(wrong))}"):
        SpikeConfig(**wrong)
