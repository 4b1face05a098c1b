"""Every parameter has exactly one group, and a stage's choice of groups is what is trained."""

from __future__ import annotations

import pytest
import torch

from omni_train.config.errors import ConfigError
from omni_train.engine.optim import GroupConfig, LrCurve, OptimConfig, Schedule
from omni_train.models.build import build_thinker
from omni_train.models.groups import (
    GROUP_NAMES,
    UNUSED,
    format_group_table,
    group_of,
    select_groups,
)
from omni_train.models.thinker import ThinkerForTraining
from tests.numerics.samples import small_config, small_tokenizer

THINKER = {"llm", "lm_head", "audio_encoder", "audio_projection", "vision_encoder", "vision_merger"}


@pytest.fixture
def model() -> ThinkerForTraining:
    tokenizer = small_tokenizer()
    return build_thinker(small_config(tokenizer)[0], tokenizer, seed=0, dtype=torch.float32)


def test_names() -> None:
    assert group_of("thinker.model.audio_tower.proj.weight") == "audio_projection"
    assert (
        group_of("thinker.model.audio_tower.layers.0.self_attn.out_proj.weight") == "audio_encoder"
    )
    assert group_of("thinker.model.visual.merger.mlp.0.bias") == "vision_merger"
    assert group_of("thinker.model.visual.blocks.1.attn.proj.weight") == "vision_encoder"
    assert group_of("talker.model.embed_tokens.weight") == "talker"
    assert group_of("talker.thinker_to_talker_proj.bias") == "talker_projection"
    assert set(GROUP_NAMES) > THINKER
    assert UNUSED not in GROUP_NAMES
    with pytest.raises(KeyError, match="vocoder"):
        group_of("vocoder.weight")


def test_every_parameter_is_in_one_group(model: ThinkerForTraining) -> None:
    groups = select_groups(model, OptimConfig(lr=1e-3), trained=THINKER)
    names = [name for group in groups for name, _ in group.params]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert {group.name for group in groups} == THINKER | {UNUSED}
    total = sum(p.numel() for p in model.parameters())
    assert sum(group.num_parameters for group in groups) == total


def test_trains_what_is_asked(model: ThinkerForTraining) -> None:
    chosen = {
        "audio_projection": GroupConfig(lr=2e-3, weight_decay=0.0),
        "audio_encoder": GroupConfig(trainable=True),
        "vision_merger": GroupConfig(trainable=False),
    }
    groups = select_groups(
        model,
        OptimConfig(lr=1e-3, weight_decay=0.1, groups=chosen),
        trained=("audio_projection", "vision_merger"),
    )
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        n
        for n, _ in model.named_parameters()
        if ".audio_tower." in n and "audio_bos_eos_token" not in n
    }
    by_name = {group.name: group for group in groups}
    assert by_name["audio_projection"].lr == 2e-3
    assert by_name["audio_projection"].weight_decay == 0.0
    assert by_name["audio_encoder"].lr == 1e-3
    assert by_name["audio_encoder"].weight_decay == 0.1
    assert not by_name[UNUSED].trainable
    table = format_group_table(groups)
    assert "audio_projection" in table
    assert "2.00e-03" in table
    assert sum("frozen" in line for line in table.splitlines()) == 5
    assert f"of {sum(p.numel() for p in model.parameters()):,} parameters" in table


def test_layer_decay_counts_layers_from_the_output(model: ThinkerForTraining) -> None:
    own = GroupConfig(layer_decay=0.5, warmup_steps=7, schedule=Schedule.wsd)
    optim = OptimConfig(lr=1e-3, warmup_steps=3, groups={"llm": own, "vision_encoder": own})
    by_name = {g.name: g for g in select_groups(model, optim, trained=THINKER)}
    text = "thinker.model.language_model."
    scales = by_name["llm"].scales
    last = model.thinker.config.text_config.num_hidden_layers - 1
    assert last >= 1
    assert scales[f"{text}norm.weight"] == 1.0
    assert scales[f"{text}layers.{last}.mlp.up_proj.weight"] == 1.0
    assert scales[f"{text}layers.0.self_attn.q_proj.bias"] == 0.5**last
    assert scales[f"{text}embed_tokens.weight"] == 0.5 ** (last + 1)
    blocks = by_name["vision_encoder"].scales
    depth = model.thinker.config.vision_config.depth
    assert blocks["thinker.model.visual.patch_embed.proj.weight"] == 0.5**depth
    assert not by_name["audio_encoder"].scales
    assert by_name["llm"].curve == LrCurve(7, Schedule.wsd, 0.1, 0.1)
    assert by_name["audio_encoder"].curve == LrCurve(3, Schedule.cosine, 0.1, 0.1)
    table = format_group_table(list(by_name.values()))
    assert f"{1e-3 * 0.5 ** (last + 1):.2e} to 1.00e-03" in table
    assert "      7  wsd" in table
    flat = OptimConfig(groups={"audio_projection": GroupConfig(layer_decay=0.9)})
    with pytest.raises(ConfigError, match=r"audio_projection\.layer_decay"):
        select_groups(model, flat, trained=THINKER)


@pytest.mark.parametrize("name", ["audio_projecton", "talker", UNUSED])
def test_a_group_that_matches_nothing_is_an_error(model: ThinkerForTraining, name: str) -> None:
    with pytest.raises(ConfigError, match=f"optim.groups.{name}"):
        select_groups(model, OptimConfig(groups={name: GroupConfig()}), trained=THINKER)


def test_nothing_to_train_is_an_error(model: ThinkerForTraining) -> None:
    frozen = {name: GroupConfig(trainable=False) for name in THINKER}
    with pytest.raises(ConfigError, match="at least one group must be trained"):
        select_groups(model, OptimConfig(groups=frozen), trained=THINKER)
