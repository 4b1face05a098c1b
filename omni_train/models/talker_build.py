"""Which models a Talker stage has in memory: both under one engine, or the Talker alone.

Only the choice is here; build.py makes the models and weights.py reads the files.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

import torch
from transformers import PreTrainedTokenizerFast

from omni_train.engine.deepspeed import DTYPES, DeepSpeedConfig, zero_init_json
from omni_train.models.build import (
    FRESH_TALKER,
    build_omni_for_training,
    build_replica,
    build_talker,
    by_model,
)
from omni_train.models.config import ModelConfig
from omni_train.models.presets import model_spec, resolve_speech_config
from omni_train.models.sequence_parallel import refuse_sequence_parallel
from omni_train.models.talker import OmniForTraining, TalkerForTraining
from omni_train.models.thinker import ThinkerForTraining
from omni_train.models.weights import SPEAKER_ROWS, open_source


class ThinkerUse(Enum):
    """Where the Talker's inputs come from.

    frozen: a pass of the frozen Thinker in each step. cached: the same states, made once before
    training and kept on disk; the Talker is alone in memory. joint: a pass in each step that
    gradients go back through, so the Thinker is trained along.
    """

    frozen = "frozen"
    cached = "cached"
    joint = "joint"


def with_talker_from(config: ModelConfig, path: str) -> ModelConfig:
    """Return settings that take the Talker from another place than the Thinker.

    The rows of the Thinker's table stay those of the Thinker; rows of new speakers, which no
    Thinker has, come along with the Talker.

    Args:
        config: of the model; groups that it names itself stay as they are.
        path: run or checkpoint that holds a Talker; empty for a fresh one.
    """
    if not path:
        return config
    groups = set(FRESH_TALKER)
    if config.new_speakers and SPEAKER_ROWS in open_source(path).names():
        groups.add("speaker_rows")
    taken = dict.fromkeys(sorted(groups), path)
    return replace(config, init_groups=taken | config.init_groups)


def build_speech_model(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    deepspeed: DeepSpeedConfig,
    *,
    seed: int,
    use: ThinkerUse,
) -> OmniForTraining | TalkerForTraining:
    """Build what a Talker stage trains, partitioned from the start under ZeRO-3.

    Args:
        config: of the model; a Talker group without a directory of its own starts afresh.
        tokenizer, seed: as in `build_talker`.
        deepspeed: precision and ZeRO stage.
        use: of the Thinker.
    """
    refuse_sequence_parallel(deepspeed.sequence_parallel, stage="a Talker stage")
    if use is ThinkerUse.cached:
        model = build_talker(
            by_model(config)[1],
            tokenizer,
            seed=seed,
            dtype=DTYPES[deepspeed.precision],
            fresh=True,
            zero3_config=zero_init_json(deepspeed),
        )
        whole = resolve_speech_config(config, tokenizer)
        model.spec = model_spec(whole.thinker_config, tokenizer)
        return model
    joint = use is ThinkerUse.joint
    return build_omni_for_training(
        config, tokenizer, deepspeed, seed=seed, joint=joint, fresh_talker=True
    )


def build_thinker_replica(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    deepspeed: DeepSpeedConfig,
    device: torch.device,
) -> ThinkerForTraining:
    """Build a plain Thinker in the run's precision, whose states are to be kept."""
    return build_replica(by_model(config)[0], tokenizer, deepspeed.precision, device)
