"""DeepSpeed settings, the one function that makes its JSON, and the engine built from them.

DeepSpeed ignores unknown top-level keys silently, so no other place writes such a dict. The
training loop is `fit.py`; where the pieces of a parameter lie is `shards.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType
from typing import Any

import torch
from torch import nn

from omni_train.config.errors import ConfigError, check_at_least
from omni_train.engine import shards
from omni_train.engine.distributed import get_world, prepare_environment
from omni_train.engine.groups import ParamGroup
from omni_train.engine.optim import OptimConfig, curve_of
from omni_train.engine.recompute import (
    Checkpointing,
    agreed_policy,
    checkpoint_layers,
    choose,
    free_memory,
)

REDUCE_BUCKET_ELEMENTS = 200_000_000


class Precision(Enum):
    """Dtype of weights and activations; master weights and moments are always fp32."""

    bf16 = "bf16"
    fp32 = "fp32"


DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32}


@dataclass(kw_only=True, slots=True)
class DeepSpeedConfig:
    """How the model is sharded and in which precision it runs.

    Args:
        zero_stage: 1 shards optimiser state, 2 gradients too, 3 weights too.
        precision: of weights and activations.
        gradient_clipping: largest global gradient norm; 0 switches clipping off.
        param_persistence_threshold: ZeRO-3 keeps parameters with fewer elements gathered.
        sequence_parallel: neighbouring ranks that share each pack (Ulysses); 1 gives each rank
            packs of its own. The heads decide what is possible (models/sequence_parallel.py).
        activation_checkpointing: which layers keep only their input (engine/recompute.py).
        offload_activations: keep these inputs in host memory; on a GPU only.
    """

    zero_stage: int = 3
    precision: Precision = Precision.bf16
    gradient_clipping: float = 1.0
    param_persistence_threshold: int = 100_000
    sequence_parallel: int = 1
    activation_checkpointing: Checkpointing = Checkpointing.none
    offload_activations: bool = False

    def __post_init__(self) -> None:
        if self.zero_stage not in (1, 2, 3):
            raise ConfigError(
                key="deepspeed.zero_stage",
                value=self.zero_stage,
                rule="ZeRO has stages 1, 2 and 3 here",
                remedy="give one of these; 3 needs the least memory",
            )
        if self.offload_activations and self.activation_checkpointing is Checkpointing.none:
            raise ConfigError(
                key="deepspeed.offload_activations",
                value=True,
                rule="without checkpoints there is nothing to keep in host memory",
                remedy="set deepspeed.activation_checkpointing=full, or leave it out",
            )
        check_at_least(
            self,
            "deepspeed",
            gradient_clipping=0,
            param_persistence_threshold=0,
            remedy="give 0 to switch it off",
        )


@dataclass(slots=True)
class Engine:
    """A model under DeepSpeed with its named groups.

    Args:
        model: the DeepSpeed engine; call it like the module.
        groups: all groups, frozen ones too, in a fixed order.
        optim: the optimiser's settings.
        step: global steps done so far, skipped ones included.
        notes: what a reader of a checkpoint must know of the model besides its tensors, as JSON.
        checkpointing: which layers run twice; never `auto`.
        frozen_hash: of the frozen weights, once a checkpoint has needed it; they do not change.
    """

    model: Any
    groups: list[ParamGroup]
    optim: OptimConfig
    notes: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    checkpointing: Checkpointing = Checkpointing.none
    frozen_hash: str = ""
    params: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.params = {name: p for group in self.groups for name, p in group.params}

    @property
    def module(self) -> nn.Module:
        """The plain module inside DeepSpeed."""
        module: nn.Module = self.model.module
        return module

    @property
    def trained(self) -> list[ParamGroup]:
        """The groups that get updates."""
        return [group for group in self.groups if group.trainable]

    def set_lr(self, *, step: int, max_steps: int) -> dict[str, float]:
        """Set every learning rate for update number `step`; return each group's, unscaled."""
        rates = {
            group.name: group.lr
            * (group.curve or curve_of(self.optim)).factor(step=step, max_steps=max_steps)
            for group in self.trained
        }
        for group in self.model.optimizer.optimizer.param_groups:
            group["lr"] = rates[group["name"]] * group["scale"]
        return rates


def deepspeed_json(
    config: DeepSpeedConfig, *, num_trained: int, largest_trained: int
) -> dict[str, Any]:
    """Return DeepSpeed's configuration.

    Args:
        config: our settings.
        num_trained: trained elements of the model.
        largest_trained: elements of its largest trained parameter; the buckets must hold it.
    """
    bucket = max(largest_trained, min(REDUCE_BUCKET_ELEMENTS, num_trained))
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": bucket,
        # Overlap needs a second stream; on CPU there is none.
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
    }
    if config.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = config.param_persistence_threshold
        zero["stage3_prefetch_bucket_size"] = min(50_000_000, bucket)
    else:
        zero["allgather_bucket_size"] = bucket
    return {
        # Micro-steps and accumulation are the loop's; both numbers are 1 for DeepSpeed.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.gradient_clipping,
        "bf16": {"enabled": config.precision is Precision.bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "log_level": "warning",
    }


def import_deepspeed() -> ModuleType:
    """Import DeepSpeed for the device there is; late, as it takes seconds."""
    prepare_environment()
    import deepspeed

    # Its shared-memory kernels serve inference only; they would be compiled on the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    module: ModuleType = deepspeed
    return module


def zero_init_json(config: DeepSpeedConfig) -> dict[str, Any] | None:
    """Return what `deepspeed.zero.Init` needs while a model is built; None below ZeRO-3.

    The counts only size gradient buckets, which do not exist before the engine does.
    """
    if config.zero_stage != 3:
        return None
    return deepspeed_json(config, num_trained=1, largest_trained=1)


def build_engine(
    model: nn.Module,
    groups: list[ParamGroup],
    optim: OptimConfig,
    config: DeepSpeedConfig,
    *,
    notes: dict[str, Any] | None = None,
    pack_tokens: int | None = None,
) -> Engine:
    """Put `model` under DeepSpeed with AdamW over the trained named groups.

    Args:
        model: every parameter must be in exactly one of `groups`.
        groups: see `ParamGroup`; sets `requires_grad` by their `trainable`.
        optim, config: settings.
        notes: see `Engine`.
        pack_tokens: token budget of a pack; `auto` checkpointing needs to know it.

    Raises:
        ConfigError: a parameter without a group, an empty group, or nothing to train; checkpoints
            in host memory without a GPU; `auto` without `pack_tokens`.
    """
    _check_checkpointing(config, pack_tokens)
    _check_groups(model, groups)
    for group in groups:
        for _, param in group.params:
            param.requires_grad_(group.trainable)
    trained = [group for group in groups if group.trainable]
    sizes = [int(getattr(p, "ds_numel", p.numel())) for g in trained for _, p in g.params]
    deepspeed = import_deepspeed()
    optimizer = torch.optim.AdamW(
        optimizer_groups(trained),
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=deepspeed_json(config, num_trained=sum(sizes), largest_trained=max(sizes)),
        dist_init_required=False if get_world().size > 1 else None,
    )
    shards.create_optimizer_state(engine)
    policy = config.activation_checkpointing
    if policy is Checkpointing.auto:
        assert pack_tokens is not None, "checked above"
        policy = _fitting_policy(model, config, pack_tokens, sum(sizes))
    checkpoint_layers(model, policy, offload=config.offload_activations)
    return Engine(model=engine, groups=groups, optim=optim, notes=notes or {}, checkpointing=policy)


def _check_checkpointing(config: DeepSpeedConfig, pack_tokens: int | None) -> None:
    if config.offload_activations and not torch.cuda.is_available():
        raise ConfigError(
            key="deepspeed.offload_activations",
            value=True,
            rule="without a GPU all memory is the host's",
            remedy="leave it out",
        )
    if config.activation_checkpointing is Checkpointing.auto and pack_tokens is None:
        raise ConfigError(
            key="deepspeed.activation_checkpointing",
            value="auto",
            rule="it is chosen by the length of packs, which this stage has in two kinds",
            remedy="choose none, selective or full",
        )


def _fitting_policy(
    model: nn.Module, config: DeepSpeedConfig, pack_tokens: int, num_trained: int
) -> Checkpointing:
    """What the memory allows that is free now, less the gradients that are still to come."""
    world, value_bytes = get_world(), DTYPES[config.precision].itemsize
    shards_of_gradients = world.size if config.zero_stage >= 2 else 1
    chosen = choose(
        model,
        pack_tokens=-(-pack_tokens // config.sequence_parallel),
        value_bytes=value_bytes,
        free_bytes=free_memory(world) - 4 * num_trained // shards_of_gradients,
    )
    return agreed_policy(chosen)


def optimizer_groups(trained: list[ParamGroup]) -> list[dict[str, Any]]:
    """Return torch's parameter groups: one for each named group and scale of its rate."""
    split: dict[tuple[str, float], dict[str, Any]] = {}
    for group in trained:
        for name, param in group.params:
            scale = group.scales.get(name, 1.0)
            settings = {"name": group.name, "scale": scale, "weight_decay": group.weight_decay}
            start = {"params": [], "lr": group.lr * scale, **settings}
            split.setdefault((group.name, scale), start)["params"].append(param)
    return list(split.values())


def _check_groups(model: nn.Module, groups: list[ParamGroup]) -> None:
    def wrong(value: object, rule: str, remedy: str) -> ConfigError:
        return ConfigError(key="optim.groups", value=value, rule=rule, remedy=remedy)

    names = [name for group in groups for name, _ in group.params]
    doubled = sorted({name for name in names if names.count(name) > 1}) if _doubled(names) else []
    missing = sorted({name for name, _ in model.named_parameters()} - set(names))
    if doubled or missing:
        rule = "every parameter of the model belongs to exactly one group"
        raise wrong(doubled or missing, rule, "mend the mapping from names to groups")
    empty = [group.name for group in groups if not group.params]
    if empty:
        raise wrong(empty, "a group matches no parameter", "remove it or correct its name")
    if not any(group.trainable for group in groups):
        rule = "at least one group must be trained"
        raise wrong([group.name for group in groups], rule, "set trainable=true for one")


def _doubled(names: list[str]) -> bool:
    return len(set(names)) != len(names)
