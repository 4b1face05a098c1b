"""Stage 8: the Talker learns the voices of one or several target speakers.

In:       a trained Thinker and Talker; spoken replies of the target speakers, with codes, and of
          the old ones (replay: without, they are lost)
Trained:  the Talker, its projection and its head; a row for each of model.new_speakers
Frozen:   the Thinker, the rows of known speakers with it
Loss:     next codec token on the reply's codes
Out:      checkpoints of both models; with `decoder`, `spk_dict.pt`: the voices of before and the
          new ones, with what the released decoder needs of each

A new speaker is an unused token named in model.speakers; its row starts as the others' mean.
How it speaks (fast, slowly, as a story) is asked for in the dialogue's text, where the data do so.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import DictConfig, OmegaConf

from omni_train.config.errors import ConfigError
from omni_train.config.recipe import recipe_main
from omni_train.config.stage import StageConfig
from omni_train.data.loader import source_hashes
from omni_train.data.speech_config import SpeechDataConfig
from omni_train.data.speech_loader import build_speech_loader
from omni_train.data.tokenizer import load_tokenizer
from omni_train.engine.deepspeed import build_engine
from omni_train.engine.fit import fit
from omni_train.engine.run import start_run
from omni_train.models.build import build_omni_for_training, format_build_report
from omni_train.models.groups import format_group_table, select_groups
from omni_train.objectives.codec_next_token import codec_next_token
from omni_train.speech.new_voice import DecoderConfig, write_voices

TRAINED = ("talker", "talker_projection", "codec_head", "speaker_rows")


@dataclass(kw_only=True, slots=True)
class TalkerSpeakerSftConfig(StageConfig):
    """Root config of `talker_speaker_sft`.

    Args:
        data: target speakers and replay, each a source with its weight.
        decoder: of a released model, and how the new voices sound there.
    """

    data: SpeechDataConfig
    decoder: DecoderConfig = field(default_factory=DecoderConfig)


def validate(cfg: TalkerSpeakerSftConfig, world_size: int) -> None:
    """Refuse a Talker that learnt nothing yet, and a stage without a speaker."""
    if not cfg.model.init_from:
        raise ConfigError(
            key="model.init_from",
            value="",
            rule="a voice is added to a Talker that speaks",
            remedy="give a run of talker_dpo or talker_icl, or a released directory",
        )
    if not cfg.model.new_speakers:
        raise ConfigError(
            key="model.new_speakers",
            value=[],
            rule="there is no new speaker",
            remedy="name one of model.speakers, as in model.new_speakers=[anna]",
        )
    wanted = set(cfg.model.new_speakers) if cfg.decoder.path else set()
    if set(cfg.decoder.voices) != wanted:
        raise ConfigError(
            key="decoder.voices",
            value=sorted(cfg.decoder.voices),
            rule="with decoder.path it has each of model.new_speakers, and without none",
            remedy=f"give {', '.join(sorted(wanted)) or 'decoder.path, or no voice'}",
        )


@recipe_main(TalkerSpeakerSftConfig, "talker_speaker_sft", validate)
def main(raw: DictConfig) -> None:
    """Train the new voices."""
    cfg: TalkerSpeakerSftConfig = OmegaConf.to_object(raw)  # type: ignore[assignment]
    with start_run(
        cfg.run,
        stage="talker_speaker_sft",
        settings=cfg,
        typed=raw,
        data_hashes=source_hashes(cfg.data),
        tracking=cfg.tracking,
    ) as run:
        tokenizer = load_tokenizer(cfg.model.tokenizer)
        model = build_omni_for_training(
            cfg.model, tokenizer, cfg.deepspeed, seed=cfg.run.seed, joint=False, fresh_talker=False
        )
        if cfg.decoder.path:
            write_voices(cfg.decoder, model.talker.spec, run)
        groups = select_groups(model, cfg.optim, trained=TRAINED)
        run.say(format_build_report(model.report), format_group_table(groups))
        loader = build_speech_loader(cfg.data, tokenizer, model.spec, model.talker.spec, run)
        engine = build_engine(model, groups, cfg.optim, cfg.deepspeed)
        fit(engine, loader, codec_next_token, cfg.fit, run)


if __name__ == "__main__":
    main()
