"""Stage 2: train the whole Thinker on five kinds of data at once.

In:       the results of both stage-1 towers (model.init_from with the audio tower and the LLM,
          model.init_groups with the vision groups); text, image, video, audio, video with sound
Trained:  everything in the Thinker
Frozen:   nothing, unless optim.groups.NAME.trainable=false
Loss:     next token on the replies
Out:      checkpoints of the whole Thinker; `heldout` events of held-out sets on the way

Second phase of section 3 of the report (arXiv 2503.20215): up to 8,192 tokens, rotary base as in
Qwen2.5.
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
class Stage2MultimodalConfig(StageConfig):
    """Root config of `stage2_multimodal`.

    Args:
        heldout: sets that are scored during training.
    """

    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)


def validate(cfg: Stage2MultimodalConfig, world_size: int) -> None:
    """Refuse a Thinker of random weights, and held-out sets that are trained on."""
    needs_weights(cfg.model, "the runs of both stage-1 towers")
    check_heldout(cfg.heldout, cfg.data)


@recipe_main(Stage2MultimodalConfig, "stage2_multimodal", validate)
def main(raw: DictConfig) -> None:
    """Train the Thinker."""
    cfg: Stage2MultimodalConfig = OmegaConf.to_object(raw)  # type: ignore[assignment]
    with start_run(
        cfg.run,
        stage="stage2_multimodal",
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
