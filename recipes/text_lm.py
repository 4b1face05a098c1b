"""Stage -1, for machines without weights: a small text LM that stands for Qwen2.5.

In:       plain text and text dialogues; fresh weights from a seed
Trained:  the language model and its head
Frozen:   both towers and their adapters, still at their random initialisation
Loss:     next token, on the assistant turns
Out:      checkpoints of the whole Thinker; stage 1 starts from them

A released model starts from Qwen2.5 instead (section 4.1 of the report, arXiv 2503.20215).
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from omni_train.config.recipe import recipe_main
from omni_train.config.stage import StageConfig
from omni_train.data.loader import build_loader, source_hashes
from omni_train.data.tokenizer import load_tokenizer
from omni_train.engine.deepspeed import build_engine
from omni_train.engine.fit import fit
from omni_train.engine.run import start_run
from omni_train.models.build import build_for_training, format_build_report
from omni_train.models.groups import format_group_table, select_groups
from omni_train.objectives.next_token import next_token

TRAINED = ("llm", "lm_head")


@dataclass(kw_only=True, slots=True)
class TextLmConfig(StageConfig):
    """Root config of `text_lm`: a stage with nothing of its own."""


@recipe_main(TextLmConfig, "text_lm")
def main(raw: DictConfig) -> None:
    """Train the text LM."""
    cfg: TextLmConfig = OmegaConf.to_object(raw)  # type: ignore[assignment]
    with start_run(
        cfg.run,
        stage="text_lm",
        settings=cfg,
        typed=raw,
        data_hashes=source_hashes(cfg.data),
        tracking=cfg.tracking,
    ) as run:
        tokenizer = load_tokenizer(cfg.model.tokenizer)
        model = build_for_training(cfg.model, tokenizer, cfg.deepspeed, seed=cfg.run.seed)
        groups = select_groups(model, cfg.optim, trained=TRAINED)
        run.say(format_build_report(model.report), format_group_table(groups))
        loader = build_loader(cfg.data, tokenizer, model.spec, run)
        engine = build_engine(
            model, groups, cfg.optim, cfg.deepspeed, pack_tokens=cfg.data.pack_tokens
        )
        fit(engine, loader, next_token, cfg.fit, run)


if __name__ == "__main__":
    main()
