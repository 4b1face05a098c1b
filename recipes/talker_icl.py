"""Stage 5: teach the Talker to speak what the Thinker says.

In:       dialogues with spoken replies; a trained Thinker, and a Talker that starts afresh (or the
          one of `talker_from`: re-alignment to a changed Thinker)
Trained:  the Talker, its projection and its head; rows of new speakers; thinker=joint: the Thinker
Frozen:   the Thinker (thinker=frozen, or cached: its states are made once and kept on disk)
Loss:     next codec token on the reply's codes; never on a reference's
Out:      checkpoints of both models; of the Talker alone with thinker=cached

Three kinds of data, each a switch (section 4.3 of the report, arXiv 2503.20215): dialogues as they
are; speech continuation (data.reference); timbre disentanglement (data.balance,
data.reference_noise).
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from omni_train.config.errors import ConfigError
from omni_train.config.recipe import recipe_main
from omni_train.config.stage import StageConfig
from omni_train.data.loader import source_hashes
from omni_train.data.speech_config import ReferenceChoice, SpeechDataConfig
from omni_train.data.speech_loader import build_speech_loader
from omni_train.data.state_cache import keep_states
from omni_train.data.tokenizer import load_tokenizer
from omni_train.engine.deepspeed import build_engine
from omni_train.engine.fit import fit
from omni_train.engine.run import start_run
from omni_train.models.build import format_build_report
from omni_train.models.groups import THINKER_GROUPS, format_group_table, select_groups
from omni_train.models.talker_build import ThinkerUse, build_speech_model, with_talker_from
from omni_train.objectives.codec_next_token import codec_next_token

TRAINED = ("talker", "talker_projection", "codec_head")
# The head makes text, which this loss does not read.
TRAINED_JOINTLY = tuple(sorted(THINKER_GROUPS - {"lm_head"}))


@dataclass(kw_only=True, slots=True)
class TalkerIclConfig(StageConfig):
    """Root config of `talker_icl`.

    Args:
        data: sources with spoken replies, budgets of both models, references, balance.
        talker_from: run or checkpoint whose Talker is trained on; empty starts afresh.
        thinker: whether it runs along, and whether it learns.
        states_dir: with thinker=cached, where the states are kept; all ranks must see it. Empty
            means in the run.
    """

    data: SpeechDataConfig
    talker_from: str = ""
    thinker: ThinkerUse = ThinkerUse.frozen
    states_dir: str = ""


def validate(cfg: TalkerIclConfig, world_size: int) -> None:
    """Refuse a Thinker that says nothing, and settings without effect."""
    if not cfg.model.init_from:
        raise ConfigError(
            key="model.init_from",
            value="",
            rule="the Talker learns from what a trained Thinker says",
            remedy="give the run of a Thinker stage, or a directory of safetensors",
        )
    if cfg.thinker is ThinkerUse.cached and cfg.data.reference is not ReferenceChoice.none:
        raise ConfigError(
            key="thinker",
            value="cached",
            rule="with references the Thinker reads another text each time",
            remedy="use thinker=frozen, or data.reference=none",
        )
    if cfg.states_dir and cfg.thinker is not ThinkerUse.cached:
        raise ConfigError(
            key="states_dir",
            value=cfg.states_dir,
            rule="states are kept with thinker=cached alone",
            remedy="set thinker=cached, or leave it out",
        )


@recipe_main(TalkerIclConfig, "talker_icl", validate)
def main(raw: DictConfig) -> None:
    """Train the Talker."""
    cfg: TalkerIclConfig = OmegaConf.to_object(raw)  # type: ignore[assignment]
    with start_run(
        cfg.run,
        stage="talker_icl",
        settings=cfg,
        typed=raw,
        data_hashes=source_hashes(cfg.data),
        tracking=cfg.tracking,
    ) as run:
        tokenizer = load_tokenizer(cfg.model.tokenizer)
        model_config = with_talker_from(cfg.model, cfg.talker_from)
        states = None
        if cfg.thinker is ThinkerUse.cached:
            folder = cfg.states_dir or run.dir / "states"
            states = keep_states(cfg.data, model_config, tokenizer, cfg.deepspeed, folder, run)
        model = build_speech_model(
            model_config, tokenizer, cfg.deepspeed, seed=cfg.run.seed, use=cfg.thinker
        )
        trained = [*TRAINED, *(["speaker_rows"] if cfg.model.new_speakers else [])]
        trained += TRAINED_JOINTLY if cfg.thinker is ThinkerUse.joint else ()
        groups = select_groups(model, cfg.optim, trained=trained)
        run.say(format_build_report(model.report), format_group_table(groups))
        loader = build_speech_loader(
            cfg.data, tokenizer, model.spec, model.talker.spec, run, states=states
        )
        engine = build_engine(model, groups, cfg.optim, cfg.deepspeed)
        fit(engine, loader, codec_next_token, cfg.fit, run)


if __name__ == "__main__":
    main()
