"""The tensors of an export: which there are, where each comes from, and the files they go into.

    the run         what the stage had in its model, in the precision it was trained in
    the base        all other parts of the model, byte for byte
    the Talker's rows of the Thinker's table go back to where they were taken from

Done here: names, dtypes, safetensors shards. Not done here: config and the other files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from omni_train.config.errors import ConfigError
from omni_train.models.talker_layout import TalkerSpec
from omni_train.models.weights import INDEX_FILE, SPEAKER_ROWS, TEXT_ROWS, TEXT_TABLE, WeightSource


class Layout(Enum):
    """How the Thinker's parts are called in the files; transformers >= 5.23 reads both.

    released: as in the published checkpoints (`thinker.visual`), which older versions need.
    current: as transformers calls them itself (`thinker.model.visual`).
    """

    released = "released"
    current = "current"


_RELEASED = (
    ("thinker.model.audio_tower.", "thinker.audio_tower."),
    ("thinker.model.visual.", "thinker.visual."),
    ("thinker.model.language_model.", "thinker.model."),
)


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the export."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def stored_name(name: str, layout: Layout) -> str:
    """Return a tensor's name in the files."""
    if layout is Layout.released:
        for ours, theirs in _RELEASED:
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
    return name


def choose_parts(
    wanted: Collection[str],
    run: WeightSource,
    base: WeightSource | None,
    *,
    dtype: torch.dtype,
    spec: TalkerSpec | None,
) -> list[Part]:
    """Return every tensor of an export.

    Args:
        wanted: names of the tensors that the model has.
        run: the checkpoint.
        base: has the parts that the run has not.
        dtype: of what comes from the run.
        spec: of the run's Talker, if it has one.

    Raises:
        ConfigError: neither has one of the tensors.
    """
    of_run, of_base = run.names(), base.names() if base is not None else set()
    parts, missing = [], []
    for name in sorted(wanted):
        if name in of_run:
            parts.append(_from_run(name, run, dtype, spec))
        elif base is not None and name in of_base:
            parts.append(_carried(name, base))
        else:
            missing.append(name)
    if missing:
        raise ConfigError(
            key="--base",
            value=base.path if base is not None else "",
            rule=f"{len(missing)} tensors are neither in the run nor there, such as {missing[0]}",
            remedy="give the directory that the run's model began from",
        )
    return parts


def _from_run(name: str, run: WeightSource, dtype: torch.dtype, spec: TalkerSpec | None) -> Part:
    def read() -> Tensor:
        value = run.tensor(name).to(dtype)
        if name == TEXT_TABLE and spec is not None:
            value = with_rows(value, run, spec)
        return value.contiguous()

    return Part(name, tuple(run.tensor(name).shape), dtype, read)


def _carried(name: str, base: WeightSource) -> Part:
    value = base.tensor(name)
    return Part(
        name, tuple(value.shape), value.dtype, lambda: base.tensor(name).clone().contiguous()
    )


def with_rows(table: Tensor, run: WeightSource, spec: TalkerSpec) -> Tensor:
    """Return the Thinker's table [V, E] with the rows that the Talker was trained with."""
    table = table.clone()
    num_old = len(spec.row_ids) - spec.num_new_speakers
    for name, ids in ((TEXT_ROWS, spec.row_ids[:num_old]), (SPEAKER_ROWS, spec.row_ids[num_old:])):
        if ids:
            table[list(ids)] = run.tensor(name).to(table.dtype)
    return table


def write_parts(parts: list[Part], folder: Path, *, layout: Layout, shard_bytes: int) -> None:
    """Write `model-0000i-of-0000n.safetensors` and their index.

    Args:
        parts: tensors; each is read when its file is written.
        folder: gets the files.
        layout: names in the files.
        shard_bytes: largest file, unless one tensor is larger.
    """
    shards: list[list[Part]] = [[]]
    for part in parts:
        if shards[-1] and sum(p.num_bytes for p in shards[-1]) + part.num_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(part)
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {stored_name(part.name, layout): part.read() for part in shard}
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        # An export is to be read by others; safetensors leaves it to its owner.
        (folder / file).chmod(0o644)
        placed |= dict.fromkeys(tensors, file)
    total = sum(part.num_bytes for part in parts)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
