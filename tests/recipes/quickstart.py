"""What a user of an export does, in a process of its own; prints what came out as JSON.

    python -m tests.recipes.quickstart DIRECTORY VOICE

Text, a picture and a sound go through the processor and `generate`; the same prompt goes through
our own encoding and decoding.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image
from transformers import Qwen2_5OmniForConditionalGeneration

from data_pipelines.shards import Sample, write_shards
from omni_train.data.encode import encode
from omni_train.data.fetch import fetch
from omni_train.data.source import ShardSet
from omni_train.data.tokenizer import load_tokenizer
from omni_train.data.types import ProcessingConfig
from omni_train.engine.deepspeed import Precision
from omni_train.evaluation.generate import greedy
from omni_train.export.probe import logits_hash, probe_logits
from omni_train.export.processor import load_processor
from omni_train.models.build import build_replica
from omni_train.models.config import ModelConfig

NEW_TOKENS = 6
QUESTION = "which word was said and what is on the picture"


def main(folder: str, voice: str) -> None:
    """Ask the export in both ways."""
    torch.set_num_threads(1)
    model = Qwen2_5OmniForConditionalGeneration.from_pretrained(
        folder, dtype="auto", local_files_only=True, attn_implementation="sdpa"
    ).eval()
    processor = load_processor(folder)
    picture = Image.effect_mandelbrot((84, 56), (-2, -1, 1, 1), 50).convert("RGB")
    wave = np.sin(np.arange(16_000) * 0.05).astype(np.float32) / 2
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "0.png"},
                {"type": "audio", "audio": "1.wav"},
                {"type": "text", "text": QUESTION},
            ],
        }
    ]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=text, images=[picture], audio=[wave], return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    dtype = model.thinker.lm_head.weight.dtype
    for name in ("pixel_values", "input_features"):
        inputs[name] = inputs[name].to(dtype)
    limits = {"do_sample": False, "use_audio_in_video": False}
    thinker = model.thinker.generate(**inputs, max_new_tokens=NEW_TOKENS, **limits)
    # Random weights soon end a reply; without its end there is more to compare.
    end = processor.tokenizer.eos_token_id
    endless = model.thinker.generate(
        **inputs, max_new_tokens=NEW_TOKENS, suppress_tokens=[end], **limits
    )
    whole = model.generate(
        **inputs,
        speaker=voice,
        generation_mode="text",
        thinker_max_new_tokens=NEW_TOKENS,
        thinker_do_sample=False,
    )
    ids, ours = _ours(folder, messages, picture, wave)
    found = {
        "logits": logits_hash(probe_logits(model.thinker)),
        "thinker": thinker[0, length:].tolist(),
        "whole": whole[0, length:].tolist(),
        "ids": [inputs["input_ids"][0].tolist(), endless[0, length:].tolist()],
        "ours": [ids, ours],
        "text": processor.batch_decode(whole[:, length:], skip_special_tokens=True)[0],
    }
    print(json.dumps(found))


def _ours(
    folder: str, messages: list[dict[str, object]], picture: Image.Image, wave: np.ndarray
) -> tuple[list[int], list[int]]:
    """Prompt and reply through the data path and the decoding loop of training's own code."""
    png, wav = io.BytesIO(), io.BytesIO()
    picture.save(png, format="PNG")
    soundfile.write(wav, wave, 16_000, format="WAV", subtype="FLOAT")
    tokenizer = load_tokenizer(folder)
    shards = Path(folder).parent / "asked"
    media = {"0.png": png.getvalue(), "1.wav": wav.getvalue()}
    write_shards(
        iter([Sample("q", {"messages": messages}, media)]),
        shards,
        tokenizer=tokenizer,
        samples_per_shard=1,
    )
    source = ShardSet("asked", str(shards))
    config = ModelConfig(tokenizer=folder, init_from=folder)
    replica = build_replica(config, tokenizer, Precision.bf16, torch.device("cpu"))
    raw = fetch(source.path_of(0), source.row(0, 0))
    prompt = encode(raw, tokenizer, ProcessingConfig(), replica.spec, add_generation_prompt=True)
    # Media ids stay allowed, as transformers has it.
    reply = greedy(
        replica,
        [prompt],
        replica.spec,
        max_new_tokens=NEW_TOKENS,
        stop_ids=(),
        suppress_ids=[tokenizer.eos_token_id],
    )[0]
    return prompt.input_ids.tolist(), reply


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
