"""A tiny Omni checkpoint as transformers saves it, and spoken dialogues for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import (
    Qwen2_5OmniConfig,
    Qwen2_5OmniToken2WavConfig,
)
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniForConditionalGeneration,
)

from omni_train.data.types import IGNORE_INDEX, EncodedSample, ModelSpec
from omni_train.models.build import build_talker, build_thinker
from omni_train.models.config import ModelConfig, ModelPreset, TinySizes
from omni_train.models.presets import build_config
from omni_train.models.talker import Talker
from omni_train.models.talker_layout import Reference, SpokenReply, TalkerSpec
from omni_train.models.thinker import ThinkerForTraining
from tests.numerics.samples import small_tokenizer

SIZES = TinySizes(
    text_width=64,
    text_layers=2,
    audio_width=64,
    audio_layers=1,
    vision_width=64,
    vision_layers=2,
    talker_width=128,
    talker_layers=2,
    num_codes=96,
)
VOICE = "<|speaker_1|>"
TOKEN2WAV = {
    "dit_config": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
        "emb_dim": 16,
        "ff_mult": 1,
        "num_embeds": 97,
        "enc_emb_dim": 16,
        "enc_dim": 16,
        "enc_channels": [16, 16, 16, 16, 48],
        "enc_attention_channels": 8,
        "enc_se_channels": 8,
        "look_ahead_layers": [0],
        "look_backward_layers": [0],
    },
    "bigvgan_config": {"upsample_initial_channel": 64, "upsample_rates": [5, 3, 2, 2, 2, 2]},
}


@dataclass
class Models:
    """transformers' whole model and ours, built from the checkpoint it saved."""

    upstream: Qwen2_5OmniForConditionalGeneration
    thinker: ThinkerForTraining
    talker: Talker
    config: ModelConfig
    tokenizer: PreTrainedTokenizerFast

    @property
    def spec(self) -> ModelSpec:
        return self.thinker.spec


def whole_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5OmniConfig:
    """Tiny in all parts, Token2Wav too."""
    config = build_config(ModelPreset.tiny, tokenizer, SIZES)
    config.token2wav_config = Qwen2_5OmniToken2WavConfig(**TOKEN2WAV)
    return config


def make_models(folder: Path, *, dtype: torch.dtype = torch.float32) -> Models:
    """Save a random model of transformers and build ours from the files."""
    tokenizer = small_tokenizer()
    torch.manual_seed(3)
    upstream = Qwen2_5OmniForConditionalGeneration(whole_config(tokenizer)).eval()
    with torch.no_grad():
        for name, param in upstream.named_parameters():
            # Plain initialisation gives nearly flat distributions, which hide differences.
            if param.ndim == 2 and name.startswith(("talker.", "thinker.")):
                param.mul_(4.0)
    upstream.save_pretrained(folder)
    config = ModelConfig(tokenizer="in memory", init_from=str(folder))
    thinker = build_thinker(config, tokenizer, seed=0, dtype=dtype)
    talker = build_talker(config, tokenizer, seed=0, dtype=dtype, fresh=False).talker
    upstream.speaker_map = {
        VOICE: {
            "bos_token": tokenizer.get_vocab()[VOICE],
            "cond": torch.zeros(1, 16),
            "ref_mel": torch.zeros(1, 30, 80),
        }
    }
    return Models(upstream, thinker.eval(), talker.eval(), config, tokenizer)


def with_reply(prompt: EncodedSample, reply: list[int]) -> EncodedSample:
    """The document of a prompt and its reply; text goes on by one id per token."""
    after = int(prompt.position_ids.max()) + 1 + torch.arange(len(reply))
    return EncodedSample(
        key=prompt.key,
        input_ids=torch.cat([prompt.input_ids, torch.tensor(reply, dtype=torch.long)]),
        labels=torch.full((prompt.num_tokens + len(reply),), IGNORE_INDEX),
        position_ids=torch.cat([prompt.position_ids, after.expand(3, -1)], dim=1),
        patches=prompt.patches,
        grid_thw=prompt.grid_thw,
        mel=prompt.mel,
        mel_lengths=prompt.mel_lengths,
    )


def spoken(
    prompt: EncodedSample, document: EncodedSample, codes: Tensor | None, **changes: Any
) -> SpokenReply:
    """The reply that follows `prompt` in `document`, in the voice of these tests."""
    values: dict[str, Any] = {
        "position_ids": document.position_ids,
        "prompt_length": prompt.num_tokens,
        "reply_start": prompt.num_tokens,
        "reply_length": document.num_tokens - prompt.num_tokens,
        "speaker": VOICE,
        "codes": torch.zeros(0, dtype=torch.long) if codes is None else codes,
    }
    return SpokenReply(**(values | changes))


def random_codes(spec: TalkerSpec, count: int, seed: int) -> Tensor:
    """Codes int64 [count]."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, spec.num_codes, (count,), generator=rng)


def continuation(
    prompt: EncodedSample, document: EncodedSample, spec: TalkerSpec, *, text: int, seed: int
) -> SpokenReply:
    """The first `text` tokens of the reply are the reference, the rest is continued."""
    reference = Reference(prompt.num_tokens, text, random_codes(spec, text + 4, seed))
    return spoken(
        prompt,
        document,
        random_codes(spec, 9, seed + 1),
        reply_start=prompt.num_tokens + text,
        reply_length=document.num_tokens - prompt.num_tokens - text,
        reference=reference,
    )
