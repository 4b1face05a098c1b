"""Turns a directory that DeepSpeed's ZeRO-3 saved into safetensors with whole fp32 weights.

    DIR/latest, DIR/global_stepN/
        zero_pp_rank_R_mp_rank_00_model_states.pt        shapes, frozen fragments, buffers
        [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt  flat fp32 slices of the trained weights

Each rank holds an equal slice of every parameter, the last one padded; a rank's slices lie one
after the other in its flat tensors, in the order of `param_shapes`. The files are pickles: see
foreign.py.
Not done here: moments, step and data position, which a run of ours could not go on from anyway.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from omni_train.config.errors import ConfigError, DamagedError
from omni_train.engine.checkpoint_files import fsync
from omni_train.engine.foreign import load_tensors

_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_(model_states|optim_states)\.pt")
_SHARD_BYTES = 4_000_000_000
_KEY = "DIRECTORY"


class _Held:
    """Stands for a class of DeepSpeed: takes what the file gives it, and does nothing."""

    def __init__(self, *_: object) -> None:
        return


# The only classes of its own that DeepSpeed writes into these files.
STAND_INS: dict[str, type] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": _Held,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _Held,
}


@dataclass(frozen=True, slots=True)
class Converted:
    """What came out.

    Args:
        tensors: number of tensors.
        parameters: their elements, all together.
        ranks: that had written the directory.
        files: names of the safetensors files.
    """

    tensors: int
    parameters: int
    ranks: int
    files: list[str]


def convert_zero3(source: Path, target: Path) -> Converted:
    """Write the weights of a ZeRO-3 directory as safetensors, trained ones in fp32.

    Args:
        source: what `save_checkpoint` was given, or one `global_stepN` in it.
        target: directory that is made; it appears whole or not at all.

    Raises:
        ConfigError: `source` has no such files, or `target` is there already.
        DamagedError: a file is missing or does not fit the others.
        UnsafeError: a file is a pickle of more than tensors.
    """
    if target.exists():
        raise ConfigError(
            key="TARGET", value=str(target), rule="it exists", remedy="give another directory"
        )
    folder = _step_folder(source)
    models, optims = _rank_files(folder)
    model_states = [load_tensors(path, key=_KEY, stand_ins=STAND_INS) for path in models]
    optim_states = [load_tensors(path, key=_KEY, stand_ins=STAND_INS) for path in optims]
    try:
        tensors = _tensors(model_states, optim_states)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise _damaged(
            folder, f"not what ZeRO-3 writes ({type(error).__name__}: {error})"
        ) from None
    temporary = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    names = _write(tensors, temporary)
    temporary.rename(target)
    numels = sum(tensor.numel() for tensor in tensors.values())
    return Converted(len(tensors), numels, len(models), names)


def _step_folder(source: Path) -> Path:
    latest = source / "latest"
    if not latest.is_file():
        return source
    name = latest.read_text(encoding="utf-8").strip()
    if Path(name).name != name:
        raise _damaged(source, f"latest names {name!r}, not a directory beside it")
    return source / name


def _rank_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files of ranks 0, 1, ... of both kinds."""
    found: dict[str, dict[int, Path]] = {"model_states": {}, "optim_states": {}}
    for path in sorted(folder.glob("*.pt")):
        match = _FILE.fullmatch(path.name)
        if match is None or int(match[2]):
            raise _damaged(folder, f"{path.name} is none of ZeRO-3 without tensor parallelism")
        found[match[3]][int(match[1])] = path
    count = max(len(paths) for paths in found.values())
    if not count:
        raise ConfigError(
            key=_KEY,
            value=str(folder),
            rule="there is no zero_pp_rank_*_states.pt in it",
            remedy="give what DeepSpeed's save_checkpoint was given",
        )
    for kind, paths in found.items():
        missing = sorted(set(range(count)) - paths.keys())
        if missing:
            raise _damaged(folder, f"{kind} of rank {missing[0]} of {count} is missing")
    models, optims = ([paths[rank] for rank in range(count)] for paths in found.values())
    return models, optims


def _tensors(models: list[Any], optims: list[Any]) -> dict[str, Tensor]:
    """Return every weight by name, whole."""
    found: dict[str, Tensor] = {}
    ranks = [optim["optimizer_state_dict"]["fp32_flat_groups"] for optim in optims]
    shapes = {name: shape for group in models[0]["param_shapes"] for name, shape in group.items()}
    offset = 0
    for name, shape in shapes.items():
        width = math.ceil(shape.numel() / len(ranks))
        parts = [_range(flat_groups, offset, width) for flat_groups in ranks]
        found[name] = torch.cat(parts)[: shape.numel()].view(shape)
        offset += width
    for rank, flat_groups in enumerate(ranks):
        held = sum(flat.numel() for flat in flat_groups)
        # Each flat tensor may be padded, by less than two elements a rank.
        if not 0 <= held - offset <= 2 * len(ranks) * len(flat_groups):
            raise ValueError(f"rank {rank} holds {held} values, the shapes say {offset}")
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        fragments = [model["frozen_param_fragments"][name].flatten() for model in models]
        found[name] = torch.cat(fragments)[: shape.numel()].view(shape)
    for name in models[0]["buffer_names"]:
        found[name] = models[0]["module"][name]
    for alias, name in dict(models[0].get("shared_params") or {}).items():
        found[alias] = found[name].clone()
    return found


def _range(flat_groups: list[Tensor], start: int, length: int) -> Tensor:
    """Return [start, start + length) of flat tensors that lie one behind the other."""
    parts, begin = [], 0
    for flat in flat_groups:
        low, high = max(start - begin, 0), min(start + length - begin, flat.numel())
        if low < high:
            parts.append(flat[low:high])
        begin += flat.numel()
    found = torch.cat(parts)
    if found.numel() != length:
        raise ValueError(f"{found.numel()} of {length} values at {start}")
    return found


def _write(tensors: dict[str, Tensor], folder: Path) -> list[str]:
    """Write safetensors files of a few GB, and the index that says which has what."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [
            f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
        ]
        weight_map = {t: file for file, part in zip(names, shards, strict=True) for t in part}
        index = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1)
        (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    for name, part in zip(names, shards, strict=True):
        save_file({key: value.contiguous() for key, value in part.items()}, str(folder / name))
        fsync(folder / name)
    fsync(folder)
    return names


def _damaged(folder: Path, rule: str) -> DamagedError:
    return DamagedError(key=_KEY, value=str(folder), rule=rule, remedy="copy it whole")
