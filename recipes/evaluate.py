"""Stage 9: score a checkpoint on held-out data.

In:       a checkpoint, and shards that no stage was trained on; for speech, a codec
Trained:  nothing
Decoding: text greedily, repetition penalty 1.0; speech sampled as each task says; on plain
          replicas, one of each model per rank
Out:      `evaluation` events and `predictions-<task>.jsonl` with every reply; for speech, some
          waves in `audio/`; with talker_before, `talker_guard` events
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import DictConfig, OmegaConf

from omni_train.config.errors import ConfigError
from omni_train.config.names import check_name
from omni_train.config.recipe import recipe_main
from omni_train.data.tokenizer import load_tokenizer
from omni_train.data.types import ProcessingConfig
from omni_train.engine.deepspeed import Precision
from omni_train.engine.run import RunConfig, start_run
from omni_train.evaluation.guard import report_change, speak_before
from omni_train.evaluation.scoring import format_scores
from omni_train.evaluation.spoken import SpeechTask, evaluate_speech
from omni_train.evaluation.tasks import EvaluationTask, evaluate_task
from omni_train.models.build import build_replica
from omni_train.models.config import ModelConfig
from omni_train.speech.speaking import load_replicas
from omni_train.tracking.config import TrackingConfig


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Root config of `evaluate`: `tasks` are replies in text, `speech` are spoken ones.

    Args:
        talker_before: run or directory with a Talker, and the Thinker that it was trained with; the
            spoken tasks are then scored with that Thinker and with the one of `model`, both with
            that Talker.
    """

    run: RunConfig
    model: ModelConfig
    tasks: dict[str, EvaluationTask] = field(default_factory=dict)
    speech: dict[str, SpeechTask] = field(default_factory=dict)
    talker_before: str = ""
    processing: ProcessingConfig = field(default_factory=ProcessingConfig)
    precision: Precision = Precision.bf16
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        for key, given in (("tasks", self.tasks), ("speech", self.speech)):
            for name in given:
                check_name(name, key=key)


def validate(cfg: EvaluateConfig, world_size: int) -> None:
    """Refuse what could only be a mistake: random weights, nothing to score, a name for two."""
    if not cfg.model.init_from:
        raise ConfigError(
            key="model.init_from",
            value="",
            rule="random weights have no score worth knowing",
            remedy="give a run, a checkpoint, or a directory of safetensors",
        )
    if not cfg.tasks and not cfg.speech:
        raise ConfigError(
            key="tasks",
            value={},
            rule="there is nothing to score",
            remedy="add tasks.NAME.path=DIRECTORY and tasks.NAME.metric, or speech.NAME.path",
        )
    twice = sorted(cfg.tasks.keys() & cfg.speech.keys())
    if twice:
        raise ConfigError(
            key="speech",
            value=twice,
            rule="in tasks too, and both would write predictions-NAME.jsonl",
            remedy="rename one of them",
        )
    if cfg.talker_before and not cfg.speech:
        raise ConfigError(
            key="talker_before",
            value=cfg.talker_before,
            rule="there is nothing to say before and after",
            remedy="add speech.NAME.path, or leave it out",
        )


@recipe_main(EvaluateConfig, "evaluate", validate)
def main(raw: DictConfig) -> None:
    """Score every task."""
    cfg: EvaluateConfig = OmegaConf.to_object(raw)  # type: ignore[assignment]
    with start_run(
        cfg.run, stage="evaluate", settings=cfg, typed=raw, tracking=cfg.tracking
    ) as run:
        tokenizer = load_tokenizer(cfg.model.tokenizer)
        device, model = run.world.device, cfg.model
        before: dict[str, dict[str, float]] = {}
        if cfg.talker_before:
            model, before = speak_before(
                cfg.speech,
                model,
                cfg.talker_before,
                tokenizer,
                cfg.processing,
                cfg.precision,
                run,
            )
        if cfg.speech:
            replicas = load_replicas(model, tokenizer, cfg.precision, device)
            thinker = replicas.thinker
        else:
            thinker = build_replica(model, tokenizer, cfg.precision, device)
        scores = {
            name: (
                task.metric,
                evaluate_task(name, task, thinker, tokenizer, cfg.processing, run),
            )
            for name, task in cfg.tasks.items()
        }
        if scores:
            run.say(format_scores(scores))
        for name, spoken in cfg.speech.items():
            figures = evaluate_speech(name, spoken, replicas, tokenizer, cfg.processing, run)
            if name in before:
                report_change(name, before[name], figures, run)


if __name__ == "__main__":
    main()
