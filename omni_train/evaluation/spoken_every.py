"""Speech sampled on held-out requests while training, and an end where it gets worse.

An entry of fit's `every`: weights are gathered once into plain replicas, spoken and scored there as
by `evaluate`; a `spoken` event has the step and the word error rate. Pair accuracy and loss do
not tell: at this kind of training both can improve while every word is lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from omni_train.config.errors import ConfigError
from omni_train.config.names import check_name
from omni_train.data.types import ProcessingConfig
from omni_train.engine.deepspeed import Engine, import_deepspeed
from omni_train.engine.fit_config import FitConfig
from omni_train.engine.run import Run
from omni_train.engine.shards import is_partitioned
from omni_train.evaluation.spoken import SpeechTask, evaluate_speech
from omni_train.speech.speaking import Replicas
from omni_train.tracking.events import read_jsonl

_NAME = "spoken"


@dataclass(kw_only=True, slots=True)
class SpokenConfig:
    """What is spoken while training, how often, and when that ends the run.

    Args:
        tasks: held-out requests by name; none speaks nothing.
        every_steps: global steps between.
        max_rise: training ends where the word error rate, the mean over tasks, is so far above the
            best one so far; None never ends it.
    """

    tasks: dict[str, SpeechTask] = field(default_factory=dict)
    every_steps: int = 100
    max_rise: float | None = 0.05

    def __post_init__(self) -> None:
        for name in self.tasks:
            check_name(name, key="spoken.tasks")
        if self.every_steps < 1 or (self.max_rise is not None and self.max_rise < 0):
            raise ConfigError(
                key="spoken",
                value=(self.every_steps, self.max_rise),
                rule="every_steps is at least 1, and max_rise is not negative",
                remedy="leave them out for the defaults",
            )


class SpokenEvaluation:
    """Speaks and scores; call it as an entry of `every`.

    Args:
        config: requests, and when to end.
        replicas: plain models like the trained ones; their weights are replaced.
        tokenizer, processing: as for `evaluate_speech`.
        run: ranks, events.
    """

    def __init__(
        self,
        config: SpokenConfig,
        replicas: Replicas,
        tokenizer: PreTrainedTokenizerFast,
        processing: ProcessingConfig,
        run: Run,
    ) -> None:
        self._config, self._replicas, self._run = config, replicas, run
        self._tokenizer, self._processing = tokenizer, processing
        log = run.dir / "events.jsonl"
        events = [e for e in read_jsonl(log) if e["kind"] == _NAME] if log.exists() else []
        # A step that was done again after a restart has its last value.
        self._rates: dict[int, float] = {event["step"]: event["wer"] for event in events}
        self._stopped = [event["step"] for event in events if event["stop"]]

    def limit(self, fit: FitConfig) -> FitConfig:
        """Return the settings of a run that does not go past the step at which it was ended."""
        return replace(fit, max_steps=min([*self._stopped, fit.max_steps]))

    def __call__(self, engine: Engine, step: int) -> bool:
        """Return whether training ends; all ranks must call."""
        copy_weights(engine, self._replicas)
        run, most = self._run, self._config.max_rise
        rates = {
            name: evaluate_speech(
                name, task, self._replicas, self._tokenizer, self._processing, run
            )["wer"]
            for name, task in self._config.tasks.items()
        }
        wer = sum(rates.values()) / len(rates)
        earlier = {at: rate for at, rate in self._rates.items() if at < step}
        stop = most is not None and bool(earlier) and wer > min(earlier.values()) + most
        self._rates = {**earlier, step: wer}
        best = min(self._rates, key=lambda at: self._rates[at])
        run.event(_NAME, step=step, wer=wer, tasks=rates, best_step=best, stop=stop)
        if stop:
            run.say(f"step {step}: WER {wer:.3f} against {self._rates[best]:.3f} at {best}; ending")
        return stop


@torch.no_grad()
def copy_weights(engine: Engine, replicas: Replicas) -> None:
    """Copy the trained weights into replicas, gathered one by one; all ranks must call.

    Args:
        engine: whose trained parameters have the names of `OmniForTraining`.
        replicas: plain models of the same sizes.
    """
    places: dict[str, nn.Parameter] = dict(replicas.thinker.named_parameters())
    places |= {f"talker.{name}": p for name, p in replicas.talker.named_parameters()}
    for group in engine.trained:
        for name, param in group.params:
            if not is_partitioned(param):
                places[name].copy_(param)
                continue
            with import_deepspeed().zero.GatheredParameters([param]):
                places[name].copy_(param)
