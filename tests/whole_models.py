"""A tiny Qwen2.5-Omni with Talker, Token2Wav and voices, and dialogues to train and ask it with."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniToken2WavConfig,
)

from data_pipelines.shards import Sample, write_shards
from omni_train.export.tensors import Layout, stored_name
from omni_train.models.config import ModelPreset
from omni_train.models.presets import build_config, quiet
from tests.numerics.samples import SMALL, small_tokenizer
from tests.unit.data.clips import clip, every, tone, wav
from tests.unit.data.samples import png

VOICE = "Chelsie"
# Small enough for a test; codes as many as the tiny Talker's. As released, the layers that look
# beyond their block: two back, one ahead.
DIT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "head_dim": 16,
    "emb_dim": 16,
    "look_ahead_layers": [2],
    "look_backward_layers": [0, 3],
    "num_embeds": SMALL.num_codes + 1,
    "enc_channels": [16, 16, 16, 16, 48],
    "enc_attention_channels": 8,
    "enc_se_channels": 8,
    "enc_dim": 8,
    "dropout": 0.0,
}
VOCODER = {
    "upsample_initial_channel": 32,
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 1, 3]],
    "upsample_rates": [10, 24],
    "upsample_kernel_sizes": [20, 48],
}


def save_base(folder: Path, layout: Layout) -> None:
    """Save the whole model with random weights, as a release would lie on a disk."""
    tokenizer = small_tokenizer()
    with quiet():
        _save(folder, layout, tokenizer)


def _save(folder: Path, layout: Layout, tokenizer: PreTrainedTokenizerFast) -> None:
    config = build_config(ModelPreset.tiny, tokenizer, SMALL)
    config.token2wav_config = Qwen2_5OmniToken2WavConfig(dit_config=DIT, bigvgan_config=VOCODER)
    torch.manual_seed(0)
    model = Qwen2_5OmniForConditionalGeneration(config)
    folder.mkdir(parents=True)
    tensors = {stored_name(n, layout): t.contiguous() for n, t in model.state_dict().items()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    voice = {"bos_token": 3, "cond": torch.randn(1, 192), "ref_mel": torch.randn(1, 40, 80)}
    torch.save({VOICE: voice}, folder / "spk_dict.pt")
    tokenizer.save_pretrained(str(folder / "tokenizer"))


def write_dialogues(folder: Path, count: int = 12) -> None:
    """Write dialogues of text, pictures, speech and clips in turn, with groups and options."""
    samples = []
    kinds = ("text", "image", "audio", "video")
    for number in range(count):
        kind = kinds[number % len(kinds)]
        media, content = {}, []
        if kind == "image":
            media["0.png"] = png(60, 90, number)
        elif kind == "audio":
            media["0.wav"] = wav(tone(0.4 + number / 20, 16_000))
        elif kind == "video":
            sound = tone(2.0, 16_000) if number % 8 == 3 else None
            media["0.mp4"] = clip(every(2.0, 4), sound=sound)
        content += [{"type": kind, kind: name} for name in media]
        content.append({"type": "text", "text": f"which word was said {number}"})
        letter = "ABCD"[number % 4]
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": "what is on the picture", "weight": 0.5},
            {"role": "user", "content": "and which word"},
            {"role": "assistant", "content": letter},
        ]
        meta = {"group": kind, "options": ["a", "b", "c", "d"]}
        record = {"messages": messages, "task": "dialogue", "meta": meta}
        samples.append(Sample(f"d{number:03d}", record, media))
    write_shards(iter(samples), folder, tokenizer=small_tokenizer(), samples_per_shard=count)
