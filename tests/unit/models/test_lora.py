"""Adapters: which parameters they are, that they start as nothing, and that merging is exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from omni_train.config.errors import ConfigError
from omni_train.data.collate import collate
from omni_train.data.types import Batch
from omni_train.engine.optim import OptimConfig
from omni_train.models.build import build_thinker
from omni_train.models.groups import group_of, select_groups
from omni_train.models.lora import LoraConfig, adapter_groups, is_adapter, plain_name
from omni_train.models.thinker import ThinkerForTraining
from tests.numerics.samples import make_sample, small_config, small_tokenizer

ALL = LoraConfig(rank=4, alpha=8.0, groups=["llm", "audio_encoder", "vision_encoder"])


def build(lora: LoraConfig | None) -> ThinkerForTraining:
    tokenizer = small_tokenizer()
    config, _ = small_config(tokenizer)
    return build_thinker(config, tokenizer, seed=1, dtype=torch.float32, lora=lora)


def batch_for(model: ThinkerForTraining) -> Batch:
    kinds: list[list[str]] = [["image", "audio"], ["video"]]
    made = [make_sample(model.thinker, model.spec, k, seed=9 + len(k)) for k in kinds]
    return collate([sample.encoded for sample in made], model.spec)


def test_fresh_adapters_change_nothing_and_leave_the_weights_alone() -> None:
    plain, adapted = build(None), build(ALL)
    base = dict(plain.named_parameters())
    for name, param in adapted.named_parameters():
        assert param.device.type == "cpu"
        if not is_adapter(name):
            assert torch.equal(param, base[plain_name(name)]), name
    batch = batch_for(plain)
    with torch.no_grad():
        assert torch.equal(plain(batch), adapted(batch))


def test_groups_of_adapters_are_trained_and_all_else_is_frozen() -> None:
    model = build(LoraConfig(rank=2, groups=["llm"]))
    groups = select_groups(model, OptimConfig(), trained=adapter_groups(LoraConfig(rank=2)))
    assert [group.name for group in groups if group.trainable] == ["llm_lora"]
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if is_adapter(name)}
    assert {group_of(name) for name in trained} == {"llm_lora"}
    layers = model.thinker.config.text_config.num_hidden_layers
    # q, k, v, o, gate, up, down; A and B of each.
    assert len(trained) == layers * 7 * 2


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: LoraConfig(rank=-1),
        lambda: LoraConfig(rank=2, alpha=0.0),
        lambda: LoraConfig(rank=2, groups=["lm_head"]),
        lambda: LoraConfig(rank=2, groups=["llm", "llm"]),
        lambda: LoraConfig(rank=2, groups=[]),
        lambda: LoraConfig(alpha=32.0),
    ],
)
def test_settings_that_could_only_be_a_mistake(wrong: Callable[[], LoraConfig]) -> None:
    with pytest.raises(ConfigError, match=r"lora\."):
        wrong()
