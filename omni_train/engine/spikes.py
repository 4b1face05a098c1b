"""Spikes of the loss and of the gradient norm: a rule, an alert, and what a person may do then.

A step is a spike where a figure is further above the median of the last steps than so many robust
standard deviations (1.4826 times the median distance from the median, and at least 1 % of the
median). The rule alerts and changes nothing. To go back, name a step whose checkpoint is still kept
and the steps to leave out:

    omni-train train ... fit.spikes.rewind_to=4000 'fit.spikes.skip_steps=[4123, 4124]'
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field
from statistics import median

from omni_train.config.errors import ConfigError, check_fields
from omni_train.engine import checkpoint_files as files
from omni_train.engine.deepspeed import Engine
from omni_train.engine.distributed import barrier, gather_json
from omni_train.engine.run import Run, log, write_text_atomically
from omni_train.engine.types import StepItem
from omni_train.engine.vote import Verdict
from omni_train.tracking.events import read_steps

# Steps before the rule says anything: a median of fewer means little.
_FEWEST = 16
_ROBUST = 1.4826
_LEAST_SHARE = 0.01
_REWINDS = "rewinds.json"


@dataclass(kw_only=True, slots=True)
class SpikeConfig:
    """When to alert, and what to do by hand about it.

    Args:
        window: steps that a step is compared with.
        deviations: robust standard deviations above their median; 0 switches the rule off.
        skip_steps: global steps, counted from 1, whose samples are passed over without an update.
        rewind_to: step of a kept checkpoint to go back to, once; later ones go to quarantine. The
            same command again goes on, it does not go back again.
    """

    window: int = 128
    deviations: float = 6.0
    skip_steps: list[int] = field(default_factory=list)
    rewind_to: int | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            "fit.spikes",
            ("window", self.window >= _FEWEST, f"must be at least {_FEWEST}"),
            ("deviations", self.deviations >= 0, "must not be negative"),
            ("skip_steps", min(self.skip_steps, default=1) > 0, "count from 1"),
            ("rewind_to", (self.rewind_to or 0) >= 0, "must not be negative"),
            remedy="give a value that does",
        )


class SpikeWatch:
    """Applies the rule on rank 0, from what the run's own events say of the steps before.

    Args:
        config: the rule.
        run: whose events are read and written.
    """

    def __init__(self, config: SpikeConfig, run: Run) -> None:
        self._config, self._run = config, run
        self._recent: dict[str, deque[float]] = {
            what: deque(maxlen=config.window) for what in ("loss", "grad_norm")
        }
        before = read_steps(run.dir / "events.jsonl") if run.is_main else []
        for step in [s for s in before if s["applied"] and s["step"] <= run.step][-config.window :]:
            self._add(float(step["loss"]), float(step["grad_norm"]["total"]))

    def see(self, verdict: Verdict, item: StepItem) -> None:
        """Compare a finished step with those before it; write a `spike` event where it is one."""
        if not self._run.is_main or not verdict.finite or not verdict.num_tokens:
            return
        found = {"loss": verdict.loss, "grad_norm": verdict.grad_norm}
        for what, value in found.items():
            limit = self._limit(self._recent[what])
            if limit is not None and value > limit:
                self._run.event(
                    "spike",
                    step=self._run.step,
                    what=what,
                    value=value,
                    limit=limit,
                    median=median(self._recent[what]),
                    keys=verdict.keys,
                    position={"window": item.window, "step": item.step},
                )
                log.warning(
                    "step %d: %s %.4g is a spike, above %.4g", self._run.step, what, value, limit
                )
        self._add(verdict.loss, verdict.grad_norm)

    def _add(self, loss: float, grad_norm: float) -> None:
        self._recent["loss"].append(loss)
        self._recent["grad_norm"].append(grad_norm)

    def _limit(self, recent: deque[float]) -> float | None:
        if not self._config.deviations or len(recent) < _FEWEST:
            return None
        middle = median(recent)
        spread = _ROBUST * median(abs(value - middle) for value in recent)
        return middle + self._config.deviations * max(spread, _LEAST_SHARE * abs(middle))


def skip_step(engine: Engine, item: StepItem, run: Run) -> None:
    """Pass over a global step that the settings name; nothing is computed or updated."""
    engine.step += 1
    run.step = engine.step
    mine = [key for batch in item.micro_batches for key in batch.keys]
    keys = [key for of_rank in gather_json(mine) for key in of_rank]
    position = {"epoch": item.epoch, "window": item.window, "step": item.step}
    run.event("skipped", step=run.step, position=position, keys=keys)
    run.say(f"step {run.step} is passed over, as fit.spikes.skip_steps says")


def rewind(config: SpikeConfig, run: Run) -> None:
    """Put the checkpoints after `rewind_to` aside, once for the same settings; all ranks call.

    Raises:
        ConfigError: there is no checkpoint of that step.
    """
    if config.rewind_to is None:
        return
    wanted = {"to": config.rewind_to, "skip_steps": sorted(config.skip_steps)}
    path = run.dir / _REWINDS
    done = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    folders = files.step_folders(run.checkpoints)
    kept = {int(folder.name.removeprefix("step-")): folder for folder in folders}
    # All ranks have read before rank 0 moves anything.
    barrier()
    if wanted in done:
        return
    if config.rewind_to not in kept:
        raise ConfigError(
            key="fit.spikes.rewind_to",
            value=config.rewind_to,
            rule=f"the run keeps checkpoints of the steps {sorted(kept)}",
            remedy="name one of them, or raise fit.keep_checkpoints next time",
        )
    if run.is_main:
        for step, folder in kept.items():
            if step > config.rewind_to:
                files.quarantine(folder)
        files.point_to(run.checkpoints, f"step-{config.rewind_to}")
        write_text_atomically(path, json.dumps([*done, wanted]) + "\n")
        run.event("rewind", **wanted)
    barrier()
