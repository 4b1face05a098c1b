"""What data workers must know of a Talker, from its configuration and the tokenizer.

The configurations themselves are those of presets.py; no weights are read.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniConfig

from omni_train.config.errors import ConfigError
from omni_train.data.tokenizer import SPEAKER_TOKENS
from omni_train.models.config import ModelConfig
from omni_train.models.presets import RELEASED_SPEAKERS
from omni_train.models.talker_layout import TalkerSpec


def talker_spec(
    config: Qwen2_5OmniConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerFast
) -> TalkerSpec:
    """Return what the data workers need of the Talker.

    Raises:
        ConfigError: a speaker's token is not in the tokenizer, or the Talker does not read states
            of the Thinker's width.
    """
    talker, width = config.talker_config, config.thinker_config.text_config.hidden_size
    if talker.embedding_size != width:
        raise ConfigError(
            key="model.init_from",
            value=model.init_from,
            rule=f"the Talker reads states of {talker.embedding_size}, the Thinker has {width}",
            remedy="use Thinker and Talker of one release, or of one preset",
        )
    vocab = tokenizer.get_vocab()
    if all(token in vocab for token in SPEAKER_TOKENS):
        known = {token: vocab[token] for token in SPEAKER_TOKENS}
    else:
        known = dict(RELEASED_SPEAKERS)
    for name, token in model.speakers.items():
        if token not in vocab:
            raise ConfigError(
                key=f"model.speakers.{name}",
                value=token,
                rule="the tokenizer has no such token",
                remedy="use one of its tokens that nothing else uses",
            )
    speakers = {name: vocab[token] for name, token in model.speakers.items()} or known
    # The order must not depend on the config: a checkpoint holds the rows by their place.
    fixed = sorted({*known.values(), *speakers.values()} - _new_ids(model, vocab, known))
    return _spec_of(
        config,
        (*fixed, *(speakers[name] for name in model.new_speakers)),
        speakers,
        num_new_speakers=len(model.new_speakers),
    )


def released_talker_spec(config: Qwen2_5OmniConfig) -> TalkerSpec:
    """Return the spec of a Talker with the released speakers; no tokenizer is asked."""
    return _spec_of(config, tuple(RELEASED_SPEAKERS.values()), dict(RELEASED_SPEAKERS))


def _spec_of(
    config: Qwen2_5OmniConfig,
    speaker_rows: tuple[int, ...],
    speakers: dict[str, int],
    *,
    num_new_speakers: int = 0,
) -> TalkerSpec:
    talker = config.talker_config
    return TalkerSpec(
        codec_pad=talker.tts_codec_pad_token_id,
        codec_bos=talker.tts_codec_start_token_id,
        codec_eos=talker.tts_codec_end_token_id,
        codec_mask=talker.tts_codec_mask_token_id,
        # Token2Wav's table has one row that is no code; a smaller Talker's codes end at its pad.
        num_codes=min(
            config.token2wav_config.dit_config.num_embeds - 1, talker.tts_codec_pad_token_id
        ),
        vocab_size=talker.vocab_size,
        row_ids=(talker.tts_text_end_token_id, talker.tts_text_pad_token_id, *speaker_rows),
        num_new_speakers=num_new_speakers,
        speakers=speakers,
    )


def _new_ids(model: ModelConfig, vocab: dict[str, int], known: dict[str, int]) -> set[int]:
    """Ids that only new speakers use; a known row that gets a new one stays where it is."""
    return {vocab[model.speakers[name]] for name in model.new_speakers} - set(known.values())
