"""Stage 3: the same Thinker at 32,768 tokens, with long audio and long video.

In:       the Thinker of stage 2 (model.init_from); the same five kinds of data, with long media
Trained:  everything in the Thinker
Frozen:   nothing, unless optim.groups.NAME.trainable=false
Loss:     next token on the replies
Out:      checkpoints of the whole Thinker; `heldout` events of held-out sets on the way

Third phase of section 3 of the report (arXiv 2503.20215). Rotary base: Qwen2.5 has been trained at
32,768 tokens with the base 1,000,000, so it is kept; TMRoPE's ids grow more slowly than the tokens
do, 25 a second of video however many tokens that has. model.rope_theta raises it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import DictConfig, OmegaConf

from omni_train.config.recipe import recipe_main
from omni_train.config.stage import StageConfig
from omni_train.data.loader import build_loader, source_hashes
from omni_train.data.tokenizer import load_tokenizer
from omni_train.engine.deepspeed import build_engine
from omni_train.engine.fit import fit
from omni_train.engine.run import start_run
from omni_train.evaluation.heldout import HeldoutConfig, check_heldout, heldout_every
from omni_train.models.build import build_for_training, needs_weights, report_model
from omni_train.models.groups import THINKER_GROUPS, select_groups
from omni_train.objectives.next_token import next_token


@dataclass(kw_only=True, slots=True)
class Stage3LongConfig(StageConfig):
    """Root config of `stage3_long`.

    Args:
        heldout: sets that are scored during training.
    """

    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)


def validate(cfg: Stage3LongConfig, world_size: int) -> None:
    """Refuse a Thinker of random weights, and held-out sets that are trained on."""
    needs_weights(cfg.model, "the run of stage 2")
    check_heldout(cfg.heldout, cfg.data)


@recipe_main(Stage3LongConfig, "stage3_long", validate)
def main(raw: DictConfig) -> None:
    """Train the Thinker."""
    cfg: Stage3LongConfig = OmegaConf.to_object(raw)  # type: ignore[assignment]
    with start_run(
        cfg.run,
        stage="stage3_long",
        settings=cfg,
        typed=raw,
        data_hashes=source_hashes(cfg.data),
        tracking=cfg.tracking,
    ) as run:
        tokenizer = load_tokenizer(cfg.model.tokenizer)
        model = build_for_training(cfg.model, tokenizer, cfg.deepspeed, seed=cfg.run.seed)
        groups = select_groups(model, cfg.optim, trained=THINKER_GROUPS)
        report_model(model.report, groups, run)
        loader = build_loader(cfg.data, tokenizer, model.spec, run)
        every = heldout_every(cfg.heldout, cfg.data, tokenizer, model.spec, run)
        engine = build_engine(
            model, groups, cfg.optim, cfg.deepspeed, pack_tokens=cfg.data.pack_tokens
        )
        fit(engine, loader, next_token, cfg.fit, run, every)


if __name__ == "__main__":
    main()
