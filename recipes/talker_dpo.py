"""Stage 7: the Talker learns to prefer its better replies (DPO, section 4.3 of arXiv 2503.20215).

In:       a trained Thinker and Talker; pairs of `omni-train talker pairs`
Trained:  the Talker, its projection and its head
Frozen:   the Thinker; the reference is the Talker that training starts from
Loss:     -log sigmoid(beta * difference of log-ratios), and what `preference` adds;
          preference.loss=sft is the control that sees the chosen replies alone
Out:      checkpoints of both models

The reference runs once over every pair, before training, and is then gone: its log-probabilities
lie in `reference/`, with its hash. In a step the Thinker runs once a pair, and the Talker once over
the prompt that both answers share. Watch `logps/chosen` and the sampled WER of `spoken`, not the
pair accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from omni_train.config.errors import ConfigError
from omni_train.config.recipe import recipe_main
from omni_train.config.stage import StageConfig
from omni_train.data.loader import source_hashes
from omni_train.data.pair_reference import keep_reference
from omni_train.data.pairs import build_pair_loader
from omni_train.data.speech_config import Balance, ReferenceChoice, SpeechDataConfig
from omni_train.data.tokenizer import load_tokenizer
from omni_train.engine.deepspeed import build_engine
from omni_train.engine.fit import fit
from omni_train.engine.run import start_run
from omni_train.evaluation.spoken_every import SpokenConfig, SpokenEvaluation
from omni_train.models.build import build_omni_for_training, format_build_report
from omni_train.models.groups import format_group_table, select_groups
from omni_train.objectives.preference import PreferenceConfig, preference
from omni_train.speech.speaking import load_replicas

TRAINED = ("talker", "talker_projection", "codec_head")


@dataclass(kw_only=True, slots=True)
class TalkerDpoConfig(StageConfig):
    """Root config of `talker_dpo`.

    Args:
        data: pair sets and the budgets of both models.
        preference: the loss.
        reference_dir: where the reference's log-probabilities are kept; all ranks must see it.
            Empty means in the run.
        spoken: speech sampled while training.
    """

    data: SpeechDataConfig
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    reference_dir: str = ""
    spoken: SpokenConfig = field(default_factory=SpokenConfig)


def validate(cfg: TalkerDpoConfig, world_size: int) -> None:
    """Refuse a Talker that learnt nothing yet, and settings that pairs do not have."""
    if not cfg.model.init_from:
        raise ConfigError(
            key="model.init_from",
            value="",
            rule="preferences are learnt by a Talker that speaks",
            remedy="give a run of talker_icl, a checkpoint, or a released directory",
        )
    if cfg.data.reference is not ReferenceChoice.none or cfg.data.balance is not Balance.none:
        raise ConfigError(
            key="data.reference",
            value=(cfg.data.reference.name, cfg.data.balance.name),
            rule="a pair set has its references in it, and is not balanced",
            remedy="leave data.reference and data.balance out",
        )


@recipe_main(TalkerDpoConfig, "talker_dpo", validate)
def main(raw: DictConfig) -> None:
    """Train the Talker on pairs."""
    cfg: TalkerDpoConfig = OmegaConf.to_object(raw)  # type: ignore[assignment]
    with start_run(
        cfg.run,
        stage="talker_dpo",
        settings=cfg,
        typed=raw,
        data_hashes=source_hashes(cfg.data),
        tracking=cfg.tracking,
    ) as run:
        tokenizer = load_tokenizer(cfg.model.tokenizer)
        replicas = load_replicas(cfg.model, tokenizer, cfg.deepspeed.precision, run.world.device)
        folder = Path(cfg.reference_dir or run.dir / "reference")
        table = keep_reference(cfg.data, replicas, tokenizer, folder, run)
        model = build_omni_for_training(
            cfg.model, tokenizer, cfg.deepspeed, seed=cfg.run.seed, joint=False, fresh_talker=False
        )
        groups = select_groups(model, cfg.optim, trained=TRAINED)
        run.say(format_build_report(model.report), format_group_table(groups))
        loader = build_pair_loader(cfg.data, tokenizer, model.spec, model.talker.spec, run, table)
        engine = build_engine(model, groups, cfg.optim, cfg.deepspeed)
        step = partial(preference, config=cfg.preference)
        if not cfg.spoken.tasks:
            del replicas
            fit(engine, loader, step, cfg.fit, run)
            return
        spoken = SpokenEvaluation(cfg.spoken, replicas, tokenizer, cfg.data.processing, run)
        every = [(cfg.spoken.every_steps, spoken)]
        fit(engine, loader, step, spoken.limit(cfg.fit), run, every=every)


if __name__ == "__main__":
    main()
