"""Which parameter belongs to which named group, and which groups a stage trains.

Groups are the words of a stage's config: `llm`, `audio_projection` and so on. Learning rates and
optimisers live in the engine; nothing here changes a value of a weight.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from torch import nn

from omni_train.config.errors import ConfigError
from omni_train.engine.groups import ParamGroup
from omni_train.engine.optim import GroupConfig, OptimConfig, curve_of

# First match wins; the more particular prefix stands first.
_PREFIXES = (
    # Never read by the forward pass (RECIPE.md section 4): always frozen.
    ("thinker.model.audio_tower.audio_bos_eos_token.", "unused"),
    ("thinker.model.audio_tower.proj.", "audio_projection"),
    ("thinker.model.audio_tower.", "audio_encoder"),
    ("thinker.model.visual.merger.", "vision_merger"),
    ("thinker.model.visual.", "vision_encoder"),
    ("thinker.model.language_model.", "llm"),
    ("thinker.lm_head.", "lm_head"),
    ("talker.thinker_to_talker_proj.", "talker_projection"),
    ("talker.codec_head.", "codec_head"),
    # Rows of the Thinker's table: the known ones, and those of new speakers.
    ("talker.text_rows.", "text_rows"),
    ("talker.speaker_rows.", "speaker_rows"),
    ("talker.", "talker"),
    ("token2wav.", "token2wav"),
)
UNUSED = "unused"
# In the name of every parameter of an adapter (lora.py); those of a group are a group of their own.
ADAPTED = ".lora_"
GROUP_NAMES = tuple(dict.fromkeys(group for _, group in _PREFIXES if group != UNUSED))
THINKER_GROUPS = frozenset(
    group for prefix, group in _PREFIXES if prefix.startswith("thinker.") and group != UNUSED
)

_LAYER = re.compile(r"\.(?:layers|blocks)\.(\d+)\.")
# What stands before the first layer of a tower or of a language model.
_BEFORE_LAYERS = re.compile(r"\.(embed_tokens|patch_embed|conv1|conv2)\.")


def group_of(name: str) -> str:
    """Return the group of the parameter called `name`.

    Raises:
        KeyError: no group claims it, which is a bug of the table above.
    """
    for prefix, group in _PREFIXES:
        if name.startswith(prefix):
            return adapter_group(group) if ADAPTED in name else group
    raise KeyError(f"parameter {name} belongs to no group")


def adapter_group(group: str) -> str:
    """Return the name of the group of a group's adapters: `llm_lora`."""
    return f"{group}_lora"


def select_groups(
    model: nn.Module, optim: OptimConfig, *, trained: Collection[str]
) -> list[ParamGroup]:
    """Set `requires_grad` of every parameter and return the groups in the model's order.

    Args:
        model: with the parameter names that `group_of` knows.
        optim: by group name, what differs from the stage and from the optimiser's own values.
        trained: groups that the stage trains; the others are frozen.

    Raises:
        ConfigError: a named group is unknown or matches nothing, or nothing is trained.
    """
    members: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, param in model.named_parameters():
        members.setdefault(group_of(name), []).append((name, param))
    known = [name for name in members if name != UNUSED]
    for name in [*optim.groups, *trained]:
        if name not in known:
            raise ConfigError(
                key=f"optim.groups.{name}",
                value=name,
                rule="no parameter of this model is in the group",
                remedy=f"use one of {', '.join(known)}",
            )
    selected = [
        _configured(name, params, optim, in_stage=name in trained)
        for name, params in members.items()
    ]
    if not any(group.trainable for group in selected):
        raise ConfigError(
            key="optim.groups",
            value=sorted(optim.groups),
            rule="at least one group must be trained",
            remedy="set trainable=true for one of them",
        )
    return selected


def _configured(
    name: str, params: list[tuple[str, nn.Parameter]], optim: OptimConfig, *, in_stage: bool
) -> ParamGroup:
    config = optim.groups.get(name, GroupConfig())
    chosen = in_stage if config.trainable is None else config.trainable
    trainable = chosen and name != UNUSED
    for _, param in params:
        param.requires_grad_(trainable)
    lr = optim.lr if config.lr is None else config.lr
    decay = optim.weight_decay if config.weight_decay is None else config.weight_decay
    scales = {} if config.layer_decay is None else _scales(name, params, config.layer_decay)
    return ParamGroup(
        name=name,
        params=params,
        trainable=trainable,
        lr=lr if trainable else 0.0,
        weight_decay=decay if trainable else 0.0,
        curve=curve_of(optim, name),
        scales=scales,
    )


def _scales(
    group: str, params: Sequence[tuple[str, nn.Parameter]], layer_decay: float
) -> dict[str, float]:
    """Layer-wise decay: 1 for the last layer and what follows it, the factor once more per layer.

    What stands before the first layer is one further than it.
    """
    layers = {name: int(match[1]) for name, _ in params if (match := _LAYER.search(name))}
    if not layers:
        raise ConfigError(
            key=f"optim.groups.{group}.layer_decay",
            value=layer_decay,
            rule="the group has no layers",
            remedy="leave it out, or set the group's lr",
        )
    last = max(layers.values())
    scales = {}
    for name, _ in params:
        depth = layers.get(name, -1 if _BEFORE_LAYERS.search(name) else last)
        scales[name] = layer_decay ** (last - depth)
    return scales


def format_group_table(groups: list[ParamGroup]) -> str:
    """Return a table of the groups: parameters, state, learning rate, its curve, weight decay.

    With layer-wise decay the learning rate is a range.
    """
    head = f"{'group':<18} {'tensors':>7} {'parameters':>14}  {'state':<8} {'decay':>6}"
    lines = [f"{head} {'warm-up':>7}  {'schedule':<8}  lr"]
    for group in groups:
        state = "trained" if group.trainable else "frozen"
        rates = _rates(group) if group.trainable else ""
        lines.append(
            f"{group.name:<18} {len(group.params):>7} {group.num_parameters:>14,}  {state:<8} "
            f"{rates}".rstrip()
        )
    total = sum(group.num_parameters for group in groups)
    trained = sum(group.num_parameters for group in groups if group.trainable)
    lines.append(f"{trained:,} of {total:,} parameters are trained")
    return "\n".join(lines)


def _rates(group: ParamGroup) -> str:
    curve, lowest = group.curve, min(group.scales.values(), default=1.0)
    lr = f"{group.lr:.2e}" if lowest == 1.0 else f"{group.lr * lowest:.2e} to {group.lr:.2e}"
    shape = f"{curve.warmup_steps:>7}  {curve.schedule.name:<8}" if curve else ""
    return f"{group.weight_decay:>6.3g} {shape}  {lr}"
