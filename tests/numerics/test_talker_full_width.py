"""The released Talker's widths really train: two layers of it, one AdamW step on a CPU."""

from __future__ import annotations

import pytest
import torch

from omni_train.engine.optim import OptimConfig
from omni_train.models.build import materialise
from omni_train.models.config import ModelPreset
from omni_train.models.groups import select_groups
from omni_train.models.presets import RELEASED_SPEAKERS, build_config
from omni_train.models.talker import Talker, TalkerForTraining
from omni_train.models.talker_layout import (
    SpeechBatch,
    SpokenReply,
    lay_out,
    pack_speech,
)
from omni_train.models.talker_spec import released_talker_spec
from omni_train.objectives.codec_next_token import codec_next_token


@pytest.mark.slow
def test_one_step_of_two_layers_of_the_7b_talker() -> None:
    whole = build_config(ModelPreset.qwen2_5_omni_7b)
    config, spec = whole.talker_config, released_talker_spec(whole)
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
    with torch.device("meta"):
        model = TalkerForTraining(Talker(config, spec))
    materialise(model, sources={}, seed=0, dtype=torch.float32)
    names = [name for name, _ in model.named_parameters() if "rows" not in name]
    assert sum(p.numel() for n, p in model.named_parameters() if n in names) > 140e6
    select_groups(model, OptimConfig(), trained=("talker", "talker_projection", "codec_head"))
    rng = torch.Generator().manual_seed(0)
    replies = [
        SpokenReply(
            position_ids=torch.arange(20).expand(3, -1),
            prompt_length=12,
            reply_start=12,
            reply_length=8,
            speaker=speaker,
            codes=torch.randint(0, 8192, (30,), generator=rng),
        )
        for speaker in RELEASED_SPEAKERS
    ]
    batch = SpeechBatch(
        talker=pack_speech([lay_out(reply, spec) for reply in replies], [20, 20], spec),
        states=torch.randn(40, config.embedding_size, generator=rng),
    )
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4)
    before = codec_next_token(model, batch)
    (before.loss / before.num_tokens).backward()
    assert sorted(trained) == sorted(names)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    assert all(p.grad.any() for n, p in trained.items() if not n.endswith("k_proj.bias"))
    optimizer.step()
    with torch.no_grad():
        after = codec_next_token(model, batch).loss / before.num_tokens
    first = float(before.loss.detach()) / before.num_tokens
    # A fresh model knows nothing: ln(8448) = 9.04.
    assert abs(first - 9.04) < 0.5
    assert float(after) < first - 0.1
