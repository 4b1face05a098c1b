"""Stage 4: teach the Thinker to answer in dialogues.

In:       ChatML dialogues of text, pictures, speech and clips, one turn or many; a pretrained
          Thinker; plain text of pretraining as one more source (replay)
Trained:  the whole Thinker, or with lora.rank adapters on the linear layers of lora.groups;
          optim.groups.NAME.trainable=false leaves a group out
Frozen:   with adapters, the groups that have them, and every group that lora.groups leaves out
Loss:     next token on every assistant turn with its <|im_end|>, times the turn's weight
Out:      checkpoints of the whole Thinker (with adapters beside the untouched weights; `omni-train
          export` merges them, or writes them in peft's format)

Whether the sound of a clip is heard is each clip's own fact (section 4.2 of the report,
arXiv 2503.20215).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import DictConfig, OmegaConf

from omni_train.config.errors import ConfigError
from omni_train.config.recipe import recipe_main
from omni_train.config.stage import StageConfig
from omni_train.data.loader import build_loader, source_hashes
from omni_train.data.tokenizer import load_tokenizer
from omni_train.engine.deepspeed import build_engine
from omni_train.engine.fit import fit
from omni_train.engine.run import start_run
from omni_train.models.build import build_for_training, format_build_report
from omni_train.models.groups import THINKER_GROUPS, format_group_table, select_groups
from omni_train.models.lora import LoraConfig, adapter_groups, notes_of
from omni_train.objectives.next_token import next_token


@dataclass(kw_only=True, slots=True)
class ThinkerSftConfig(StageConfig):
    """Root config of `thinker_sft`.

    Args:
        lora: adapters instead of the weights themselves; its rank 0 trains the weights.
    """

    lora: LoraConfig = field(default_factory=LoraConfig)


def validate(cfg: ThinkerSftConfig, world_size: int) -> None:
    """Refuse a Thinker that has learnt nothing."""
    if not cfg.model.init_from:
        raise ConfigError(
            key="model.init_from",
            value="",
            rule="dialogues are taught to a pretrained Thinker",
            remedy="give the run of a pretraining stage, or a directory of safetensors",
        )


@recipe_main(ThinkerSftConfig, "thinker_sft", validate)
def main(raw: DictConfig) -> None:
    """Train the Thinker on dialogues."""
    cfg: ThinkerSftConfig = OmegaConf.to_object(raw)  # type: ignore[assignment]
    with start_run(
        cfg.run,
        stage="thinker_sft",
        settings=cfg,
        typed=raw,
        data_hashes=source_hashes(cfg.data),
        tracking=cfg.tracking,
    ) as run:
        tokenizer = load_tokenizer(cfg.model.tokenizer)
        model = build_for_training(
            cfg.model, tokenizer, cfg.deepspeed, seed=cfg.run.seed, lora=cfg.lora
        )
        trained = adapter_groups(cfg.lora) if cfg.lora.rank else sorted(THINKER_GROUPS)
        groups = select_groups(model, cfg.optim, trained=trained)
        run.say(format_build_report(model.report), format_group_table(groups))
        loader = build_loader(cfg.data, tokenizer, model.spec, run)
        notes = notes_of(cfg.lora)
        engine = build_engine(
            model,
            groups,
            cfg.optim,
            cfg.deepspeed,
            notes=notes,
            pack_tokens=cfg.data.pack_tokens,
        )
        fit(engine, loader, next_token, cfg.fit, run)


if __name__ == "__main__":
    main()
