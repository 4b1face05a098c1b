"""Which of several given replies a model finds most probable; no token is sampled.

Every reply is teacher-forced behind the prompt with its `<|im_end|>`, the way of training (encode,
collate, fused log-probabilities), so no logits are built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerFast

from omni_train.data.collate import collate
from omni_train.data.encode import encode
from omni_train.data.types import IGNORE_INDEX, ProcessingConfig, RawSample
from omni_train.models.thinker import ThinkerForTraining


@torch.no_grad()
def reply_logprobs(
    model: ThinkerForTraining,
    raw: RawSample,
    replies: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    processing: ProcessingConfig,
) -> list[float]:
    """Return the summed log-probability of each reply to one prompt.

    Args:
        model: a plain replica on one device.
        raw: the prompt; its record's messages end before the reply.
        replies: texts of the assistant.
        processing: how media become tokens.
    """
    # Turns of the prompt are context: only the reply may be counted.
    prompt = [
        {**turn, "weight": 0} if turn["role"] == "assistant" else turn
        for turn in raw.record["messages"]
    ]
    sums = []
    for reply in replies:
        messages = [*prompt, {"role": "assistant", "content": reply}]
        sample = replace(raw, record={**raw.record, "messages": messages})
        encoded = encode(sample, tokenizer, processing, model.spec)
        assert bool((encoded.labels != IGNORE_INDEX).any()), f"{raw.row.key}: nothing to score"
        batch = collate([encoded], model.spec).to(next(model.parameters()).device)
        sums.append(float(model(batch).double().sum()))
    return sums
