"""Builds Thinker and Talker on no memory, then fills it tensor by tensor.

The model is made on the meta device; each module with tensors of its own is then allocated, filled
from a source or by a seeded initialisation, and under ZeRO-3 partitioned at once, so no rank ever
holds more than one module whole. A fresh tensor's values depend on the seed and its name alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from omni_train.config.errors import ConfigError
from omni_train.engine.deepspeed import (
    DTYPES,
    DeepSpeedConfig,
    Precision,
    import_deepspeed,
    zero_init_json,
)
from omni_train.engine.distributed import get_world
from omni_train.engine.groups import ParamGroup
from omni_train.engine.run import Run
from omni_train.models.config import ModelConfig
from omni_train.models.groups import THINKER_GROUPS, UNUSED, format_group_table, group_of
from omni_train.models.lora import (
    LoraConfig,
    add_adapters,
    initialise_adapter,
    is_adapter,
    plain_name,
)
from omni_train.models.parts import PartSource, part_sources
from omni_train.models.presets import (
    model_spec,
    resolve_config,
    resolve_speech_config,
)
from omni_train.models.sequence_parallel import (
    check_sequence_parallel,
    refuse_sequence_parallel,
    start_sequence_parallel,
)
from omni_train.models.talker import OmniForTraining, Talker, TalkerForTraining
from omni_train.models.talker_layout import TalkerSpec
from omni_train.models.talker_spec import talker_spec
from omni_train.models.thinker import ThinkerForTraining
from omni_train.models.weights import (
    TEXT_TABLE,
    BuildReport,
    CheckpointSource,
    TalkerRowsSource,
    WeightSource,
    open_source,
)

# Bytes that are read between two calls of malloc_trim, which walks the whole heap.
_TRIM_BYTES = 64 << 20
# What a Talker that starts afresh takes from no checkpoint; its rows are still the Thinker's.
FRESH_TALKER = frozenset({"talker", "talker_projection", "codec_head"})


def build_thinker(
    model_config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    dtype: torch.dtype,
    zero3_config: dict[str, Any] | None = None,
    lora: LoraConfig | None = None,
) -> ThinkerForTraining:
    """Build the Thinker that `model_config` describes; its `report` says where each tensor is from.

    Args:
        model_config: preset, and the directories of the weights.
        tokenizer: the model's.
        seed: of tensors without a source.
        dtype: of the parameters; buffers keep float32.
        zero3_config: the DeepSpeed settings of the run, where ZeRO-3 shards the parameters.
        lora: adapters to put on; they always start afresh.

    Raises:
        ConfigError: a source cannot be read, lacks a tensor or holds one of another shape.
    """
    config = resolve_config(model_config, tokenizer)
    with torch.device("meta"):
        thinker = Qwen2_5OmniThinkerForConditionalGeneration(config.thinker_config)
        model = ThinkerForTraining(thinker)
    if lora is not None and lora.rank:
        add_adapters(model, lora)
    model.spec = model_spec(config.thinker_config, tokenizer)
    parts = part_sources(model_config.parts, config.thinker_config)
    sources = _sources(model, model_config, parts=parts.by_group)
    _check_rope(model_config, sources.get(TEXT_TABLE))
    model.report = materialise(
        model,
        sources=sources,
        seed=seed,
        dtype=dtype,
        zero3_config=zero3_config,
    )
    model.report.fresh = parts.fresh
    return model


def build_talker(
    model_config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    dtype: torch.dtype,
    fresh: bool,
    zero3_config: dict[str, Any] | None = None,
) -> TalkerForTraining:
    """Build the Talker that `model_config` describes.

    Args:
        model_config: as for the Thinker; `init_from` may also be a checkpoint of the Talker alone.
        tokenizer: the model's.
        seed, dtype, zero3_config: as in `build_thinker`.
        fresh: start from random weights even where `init_from` is given; the rows of the Thinker's
            table come from there all the same.

    Raises:
        ConfigError: as `build_thinker`.
    """
    config = resolve_speech_config(model_config, tokenizer)
    spec = talker_spec(config, model_config, tokenizer)
    with torch.device("meta"):
        model = TalkerForTraining(Talker(config.talker_config, spec))
    skipped = FRESH_TALKER - set(model_config.init_groups) if fresh else frozenset()
    model.report = materialise(
        model,
        sources=_sources(model, model_config, skipped=skipped, spec=spec),
        seed=seed,
        dtype=dtype,
        zero3_config=zero3_config,
    )
    return model


def needs_weights(config: ModelConfig, what: str) -> None:
    """Refuse a stage that would start from random weights.

    Args:
        config: of the model.
        what: such a stage usually starts from.
    """
    if not config.init_from:
        raise ConfigError(
            key="model.init_from",
            value="",
            rule="the stage goes on from trained weights",
            remedy=f"give {what}, or a directory of safetensors",
        )


def by_model(config: ModelConfig) -> tuple[ModelConfig, ModelConfig]:
    """Return the settings of the Thinker and of the Talker, each with its own `init_groups`."""
    ours: dict[str, str] = {}
    rest: dict[str, str] = {}
    for group, path in config.init_groups.items():
        (ours if group in THINKER_GROUPS else rest)[group] = path
    return replace(config, init_groups=ours), replace(config, init_groups=rest)


def build_omni_for_training(
    model_config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    deepspeed: DeepSpeedConfig,
    *,
    seed: int,
    joint: bool,
    fresh_talker: bool,
) -> OmniForTraining:
    """Build Thinker and Talker for one engine, partitioned from the start under ZeRO-3.

    Args:
        model_config, tokenizer, seed: as in `build_thinker`; `init_groups` may name groups of both.
        deepspeed: precision and ZeRO stage.
        joint: whether gradients flow into the Thinker.
        fresh_talker: see `build_talker`.
    """
    refuse_sequence_parallel(deepspeed.sequence_parallel, stage="a Talker stage")
    thinker_config, talker_config = by_model(model_config)
    talker = build_talker(
        talker_config,
        tokenizer,
        seed=seed,
        dtype=DTYPES[deepspeed.precision],
        fresh=fresh_talker,
        zero3_config=zero_init_json(deepspeed),
    )
    thinker = build_for_training(thinker_config, tokenizer, deepspeed, seed=seed)
    return OmniForTraining(thinker, talker, joint=joint)


def build_talker_replica(
    model_config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    precision: Precision,
    device: torch.device,
) -> Talker:
    """Build a plain Talker on one device, for sampling; it has no part in training."""
    dtype = DTYPES[precision]
    model = build_talker(model_config, tokenizer, seed=0, dtype=dtype, fresh=False)
    replica: Talker = model.talker.to(device).requires_grad_(False).eval()
    return replica


def build_for_training(
    model_config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    deepspeed: DeepSpeedConfig,
    *,
    seed: int,
    lora: LoraConfig | None = None,
) -> ThinkerForTraining:
    """Build the Thinker in the run's precision, partitioned from the start under ZeRO-3.

    All ranks must call; its `spec` says which part of a pack is this rank's.
    """
    text = resolve_config(model_config, tokenizer).thinker_config.text_config
    size = deepspeed.sequence_parallel
    check_sequence_parallel(
        size,
        world_size=get_world().size,
        num_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
    )
    model = build_thinker(
        model_config,
        tokenizer,
        seed=seed,
        dtype=DTYPES[deepspeed.precision],
        zero3_config=zero_init_json(deepspeed),
        lora=lora,
    )
    model.sequence = start_sequence_parallel(size, text)
    if model.sequence is not None:
        model.spec = replace(model.spec, sequence=model.sequence.place)
    return model


def build_replica(
    model_config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    precision: Precision,
    device: torch.device,
) -> ThinkerForTraining:
    """Build a plain Thinker on one device, for decoding; it has no part in training."""
    model = build_thinker(model_config, tokenizer, seed=0, dtype=DTYPES[precision])
    return model.to(device).requires_grad_(False).eval()


def materialise(
    model: nn.Module,
    *,
    sources: Mapping[str, WeightSource],
    seed: int,
    dtype: torch.dtype,
    zero3_config: dict[str, Any] | None = None,
) -> BuildReport:
    """Give every tensor of a model on the meta device its memory and its value.

    Args:
        model: built on the meta device.
        sources: by parameter name; a parameter without one is initialised.
        seed, dtype, zero3_config: as in `build_thinker`.
    """
    report, freed = BuildReport(), 0
    for prefix, module, owner in _modules_with_tensors(model):
        names = {key: f"{prefix}.{key}" for key, _ in module.named_parameters(recurse=False)}
        values = {key: _load(module, key, name, sources) for key, name in names.items()}
        _allocate(module)
        if any(value is None for value in values.values()) or module._buffers:
            _initialise(module, owner, seed=seed, name=prefix)
        for key, value in values.items():
            param = getattr(module, key)
            # A copy: ZeRO-3 writes into what it partitions, and a written page of a mapped file
            # stays in memory until the file is closed, so all of them would.
            param.data = param.data.to(dtype) if value is None else value.to(dtype, copy=True)
            if value is None:
                report.initialised.append(names[key])
            else:
                source = sources[names[key]]
                report.loaded[names[key]] = source.path
                if isinstance(source, PartSource) and (note := source.note(names[key])):
                    report.converted[names[key]] = note
        if zero3_config is not None and names:
            _partition(module, zero3_config)
            freed += sum(4 * value.numel() for value in values.values() if value is not None)
        if freed > _TRIM_BYTES:
            freed = _return_freed_memory()
    for source in {id(source): source for source in sources.values()}.values():
        used = {plain_name(name) for name in report.loaded}
        report.unused[source.path] = sorted(source.names() - used)
    return report


def format_build_report(report: BuildReport) -> str:
    """Return a few lines: tensors by origin and group, and by name what no source gave."""
    counts: dict[tuple[str, str], int] = {}
    for name, how in report.origins().items():
        text = f"loaded from {report.loaded[name]}" if name in report.loaded else "initialised"
        if how.startswith("converted"):
            text += f", {report.converted[name]}"
        key = (group_of(name), text)
        counts[key] = counts.get(key, 0) + 1
    lines = [f"{group:<18} {count:>5} tensors {how}" for (group, how), count in counts.items()]
    lines += [f"starts afresh: {why}" for why in report.fresh]
    if report.loaded and report.initialised:
        lines += [f"not in any source: {name}" for name in report.initialised]
    for path, names in report.unused.items():
        parts: dict[str, int] = {}
        for name in names:
            part = name.split(".", 1)[0]
            parts[part] = parts.get(part, 0) + 1
        lines += [f"left alone in {path}: {n} tensors of {part}" for part, n in parts.items()]
    return "\n".join(lines)


def report_model(report: BuildReport, groups: Sequence[ParamGroup], run: Run) -> None:
    """Say where the weights came from and what is trained; the event names every tensor."""
    run.say(format_build_report(report), format_group_table(list(groups)))
    run.event("weights", tensors=report.origins(), sources=sorted(set(report.loaded.values())))


def _sources(
    model: nn.Module,
    config: ModelConfig,
    *,
    parts: Mapping[str, WeightSource] = MappingProxyType({}),
    skipped: Collection[str] = (),
    spec: TalkerSpec | None = None,
) -> dict[str, WeightSource]:
    """The source of each parameter that has one; raises where a source lacks its tensor.

    Args:
        model, config: what is filled, and from where.
        parts: sources by group; those of `config` go before them.
        skipped: groups that no source fills.
        spec: of a Talker, whose rows may have to be cut out of the Thinker's table.
    """

    def opened(path: str) -> WeightSource:
        source = open_source(path)
        return source if spec is None else TalkerRowsSource(source, spec)

    base = opened(config.init_from) if config.init_from else None
    by_group = dict(parts) | {group: opened(path) for group, path in config.init_groups.items()}
    names = [name for name, _ in model.named_parameters()]
    groups = sorted({group_of(name) for name in names} - {UNUSED})
    for group, path in config.init_groups.items():
        if group not in groups:
            raise ConfigError(
                key=f"model.init_groups.{group}",
                value=path,
                rule="no parameter of this model is in the group",
                remedy=f"use one of {', '.join(groups)}",
            )
    sources: dict[str, WeightSource] = {}
    missing: dict[str, list[str]] = {}
    held = {id(source): source.names() for source in [base, *by_group.values()] if source}
    for name in names:
        source = by_group.get(group_of(name), base)
        if source is None or group_of(name) in skipped or is_adapter(name):
            continue
        if plain_name(name) in held[id(source)]:
            sources[name] = source
        elif group_of(name) != UNUSED:
            missing.setdefault(source.path, []).append(name)
    for path, absent in missing.items():
        raise ConfigError(
            key="model.init_from",
            value=path,
            rule=f"{len(absent)} expected tensors are missing: {_shorten(absent)}",
            remedy="use a checkpoint of the whole part, or init_groups for some groups of it",
        )
    return sources


def _check_rope(config: ModelConfig, source: WeightSource | None) -> None:
    """A run's checkpoint has no config.json that could tell the base it was trained with."""
    if not isinstance(source, CheckpointSource) or config.rope_theta is not None:
        return
    trained_with = source.settings.get("model.rope_theta")
    if trained_with is not None:
        raise ConfigError(
            key="model.rope_theta",
            value=None,
            rule=f"{source.path} was trained with {trained_with}",
            remedy=f"set model.rope_theta={trained_with}",
        )


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _modules_with_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """(name, module, model that knows its initialisation) of modules that own tensors."""
    owners = {name: m for name, m in model.named_modules() if isinstance(m, PreTrainedModel)}
    for name, module in list(model.named_modules()):
        if module._parameters or module._buffers:
            nearest = max((o for o in owners if f"{name}.".startswith(f"{o}.")), key=len)
            yield name, module, owners[nearest]


def _load(
    module: nn.Module, key: str, name: str, sources: Mapping[str, WeightSource]
) -> Tensor | None:
    if name not in sources:
        return None
    value = sources[name].tensor(plain_name(name))
    expected = getattr(module, key).shape
    if value.shape != expected:
        raise ConfigError(
            key="model.init_from",
            value=sources[name].path,
            rule=f"{name} is {tuple(value.shape)}, the model needs {tuple(expected)}",
            remedy="use the preset and sizes that the weights were made with",
        )
    return value


def _allocate(module: nn.Module) -> None:
    """Replace the module's own meta tensors by CPU ones; what fills them comes next."""
    for key, param in list(module.named_parameters(recurse=False)):
        empty = torch.empty(param.shape, dtype=torch.float32)
        setattr(module, key, nn.Parameter(empty, requires_grad=param.requires_grad))
    for key, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, key, torch.empty_like(buffer, device="cpu"))


def _initialise(module: nn.Module, owner: PreTrainedModel, *, seed: int, name: str) -> None:
    """transformers' own initialisation, with a generator state that follows from the name."""
    before = torch.get_rng_state()
    # The default generator alone: torch.manual_seed would also reset those of the devices.
    # A layer under an adapter keeps the values that it would have without one.
    known = plain_name(f"{name}.")[:-1]
    torch.default_generator.manual_seed(xxhash.xxh3_64_intdigest(f"{seed}:{known}".encode()) >> 1)
    try:
        with torch.no_grad():
            if is_adapter(name):
                assert isinstance(module, nn.Linear), f"{name} is {type(module)}"
                initialise_adapter(module, name)
            else:
                owner._init_weights(module)
    finally:
        torch.set_rng_state(before)


def _return_freed_memory() -> int:
    """Hand freed memory back to the system where the C library can, and count from 0 again.

    Whole tensors come and go between partitions that stay, so the heap would keep their room: about
    as much again as this rank's share of the model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return 0


def _partition(module: nn.Module, zero3_config: dict[str, Any]) -> None:
    import_deepspeed().zero.Init(module=module, config_dict_or_path=zero3_config)
