"""Stage 1, vision: teach a frozen language model to see.

In:       image-text pairs; the LLM with a vision encoder beside it (phase adapter), or the result
          of phase adapter (phase encoder)
Trained:  phase adapter: the patch merger; phase encoder: vision encoder and merger
Frozen:   the language model, its head, and all of audio
Loss:     next token, on the assistant turns
Out:      checkpoints of the whole Thinker

The two towers are trained apart from each other on the frozen LLM, in each the adapter first
(section 4.1 of the report, arXiv 2503.20215).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import DictConfig, OmegaConf

from omni_train.config.recipe import recipe_main
from omni_train.config.stage import StageConfig
from omni_train.data.loader import build_loader, source_hashes
from omni_train.data.tokenizer import load_tokenizer
from omni_train.engine.deepspeed import build_engine
from omni_train.engine.fit import fit
from omni_train.engine.run import start_run
from omni_train.models.build import build_for_training, report_model
from omni_train.models.groups import select_groups
from omni_train.objectives.next_token import next_token


class Phase(Enum):
    """The adapter comes first, so that a good encoder is not spoilt by a random adapter."""

    adapter = "adapter"
    encoder = "encoder"


TRAINED = {
    Phase.adapter: ("vision_merger",),
    Phase.encoder: ("vision_merger", "vision_encoder"),
}


@dataclass(kw_only=True, slots=True)
class Stage1VisionConfig(StageConfig):
    """Root config of `stage1_vision`."""

    phase: Phase


@recipe_main(Stage1VisionConfig, "stage1_vision")
def main(raw: DictConfig) -> None:
    """Train the patch merger, or the vision encoder with it."""
    cfg: Stage1VisionConfig = OmegaConf.to_object(raw)  # type: ignore[assignment]
    stage = f"stage1_vision_{cfg.phase.name}"
    with start_run(
        cfg.run,
        stage=stage,
        settings=cfg,
        typed=raw,
        data_hashes=source_hashes(cfg.data),
        tracking=cfg.tracking,
    ) as run:
        tokenizer = load_tokenizer(cfg.model.tokenizer)
        model = build_for_training(cfg.model, tokenizer, cfg.deepspeed, seed=cfg.run.seed)
        groups = select_groups(model, cfg.optim, trained=TRAINED[cfg.phase])
        report_model(model.report, groups, run)
        loader = build_loader(cfg.data, tokenizer, model.spec, run)
        engine = build_engine(
            model, groups, cfg.optim, cfg.deepspeed, pack_tokens=cfg.data.pack_tokens
        )
        fit(engine, loader, next_token, cfg.fit, run)


if __name__ == "__main__":
    main()
