"""Probe: does the model know what is on screen while it hears? A control, no stage of the recipe.

In:       the two stage-1 towers on their language model; clips with sound and a schedule
Trained:  everything in the Thinker, for a few steps
Loss:     at every audio token, the word of the colour on screen at that moment
Out:      `heldout` events: token_accuracy is the share of audio tokens read out right

Run once for each arm with the same seed; only the order of a clip's tokens and their positions
differ (section 2.2 of the report, arXiv 2503.20215).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import DictConfig, OmegaConf

from omni_train.config.recipe import recipe_main
from omni_train.config.stage import StageConfig
from omni_train.data.alignment import Arm, ProbeMaker
from omni_train.data.loader import build_loader, source_hashes
from omni_train.data.stores import Store
from omni_train.data.tokenizer import load_tokenizer
from omni_train.engine.deepspeed import build_engine
from omni_train.engine.fit import fit
from omni_train.engine.run import start_run
from omni_train.evaluation.heldout import HeldoutConfig, check_heldout, heldout_every
from omni_train.models.build import build_for_training, needs_weights, report_model
from omni_train.models.groups import THINKER_GROUPS, select_groups
from omni_train.objectives.next_token import next_token


@dataclass(kw_only=True, slots=True)
class AlignmentProbeConfig(StageConfig):
    """Root config of `alignment_probe`.

    Args:
        arm: order of a clip's tokens, and their positions.
        heldout: sets on which it is read out.
    """

    arm: Arm = Arm.tmrope
    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)


def validate(cfg: AlignmentProbeConfig, world_size: int) -> None:
    """Refuse towers that have learned nothing, and held-out sets that are trained on."""
    needs_weights(cfg.model, "the runs of both stage-1 towers")
    check_heldout(cfg.heldout, cfg.data)


@recipe_main(AlignmentProbeConfig, "alignment_probe", validate)
def main(raw: DictConfig) -> None:
    """Train and read out one arm."""
    cfg: AlignmentProbeConfig = OmegaConf.to_object(raw)  # type: ignore[assignment]
    with start_run(
        cfg.run,
        stage=f"alignment_{cfg.arm.name}",
        settings=cfg,
        typed=raw,
        data_hashes=source_hashes(cfg.data),
        tracking=cfg.tracking,
    ) as run:
        tokenizer = load_tokenizer(cfg.model.tokenizer)
        model = build_for_training(cfg.model, tokenizer, cfg.deepspeed, seed=cfg.run.seed)
        groups = select_groups(model, cfg.optim, trained=THINKER_GROUPS)
        report_model(model.report, groups, run)
        make = ProbeMaker(
            tokenizer, cfg.data.processing, model.spec, Store(cfg.data.fetch), arm=cfg.arm
        )
        loader = build_loader(cfg.data, tokenizer, model.spec, run, make=make)
        every = heldout_every(cfg.heldout, cfg.data, tokenizer, model.spec, run, make=make)
        engine = build_engine(
            model, groups, cfg.optim, cfg.deepspeed, pack_tokens=cfg.data.pack_tokens
        )
        fit(engine, loader, next_token, cfg.fit, run, every)


if __name__ == "__main__":
    main()
