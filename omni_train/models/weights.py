"""Where weights are read from: a safetensors directory of Qwen2.5-Omni, or a checkpoint of ours.

Every source speaks of tensors by the names of `ThinkerForTraining` (`thinker.model.visual...`),
whatever its file calls them. Only safetensors files are read; no pickle, no network.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from omni_train.config.errors import ConfigError, DamagedError
from omni_train.engine.checkpoint_files import MANIFEST, CheckpointError, step_folders
from omni_train.engine.checkpoint_reader import CheckpointReader
from omni_train.engine.foreign import refuse_pickles
from omni_train.models.lora import MergedReader, lora_of
from omni_train.models.talker_layout import TalkerSpec

INDEX_FILE = "model.safetensors.index.json"
# Parts of the whole model that keep their names; the Thinker does not read them.
_OTHER_PARTS = ("talker.", "token2wav.")
_TOWERS = ("audio_tower.", "visual.")
_TEXT = ("layers.", "embed_tokens.", "norm.")
LM_HEAD = "thinker.lm_head.weight"
TEXT_TABLE = "thinker.model.language_model.embed_tokens.weight"
TEXT_ROWS = "talker.text_rows.weight"
SPEAKER_ROWS = "talker.speaker_rows.weight"


@dataclass(slots=True)
class BuildReport:
    """Where every tensor of a model came from.

    Args:
        loaded: path of the source by parameter name.
        converted: what was done to a loaded one on the way, by parameter name.
        initialised: parameters that were filled at random (or with ones and zeros).
        unused: tensors of the sources that the model has no place for, by source path.
        fresh: why groups start afresh although the model is built from parts.
    """

    loaded: dict[str, str] = field(default_factory=dict)
    converted: dict[str, str] = field(default_factory=dict)
    initialised: list[str] = field(default_factory=list)
    unused: dict[str, list[str]] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)

    def origins(self) -> dict[str, str]:
        """Return of every tensor whether it was loaded, converted (and how), or is new."""
        how = dict.fromkeys(self.loaded, "loaded")
        how |= {name: f"converted: {note}" for name, note in self.converted.items()}
        return how | dict.fromkeys(self.initialised, "new")


class WeightSource(Protocol):
    """Tensors by name."""

    path: str

    def names(self) -> set[str]:
        """Return the names of all tensors of the source."""
        ...

    def tensor(self, name: str) -> Tensor:
        """Return one whole tensor on the CPU, in the dtype it was saved in."""
        ...


def canonical_name(name: str) -> str:
    """Return our name of a tensor of a released or saved model.

    Since transformers 5.23 the parts of the Thinker are `thinker.model.{audio_tower, visual,
    language_model}`; older files say `thinker.{audio_tower, visual, model}`; a file of the Thinker
    alone leaves `thinker.` out (RECIPE.md section 4). Unknown names come back as they are.
    """
    if name.startswith(_OTHER_PARTS):
        return name
    rest = name.removeprefix("thinker.")
    if rest.startswith(_TOWERS):
        return f"thinker.model.{rest}"
    inner = rest.removeprefix("model.")
    if inner != rest and inner.startswith(_TEXT):
        return f"thinker.model.language_model.{inner}"
    return f"thinker.{rest}"


class StoredTensors:
    """The safetensors files of one directory, sharded or not, by the names in the files.

    Args:
        path: the directory.

    Raises:
        ConfigError: no safetensors file, or an index that names other places.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._files: dict[str, Any] = {}
        self._places = dict(_stored_tensors(Path(path)))

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._places)

    def tensor(self, stored: str) -> Tensor:
        """Read one tensor from its file."""
        file = self._places[stored]
        if file not in self._files:
            self._files[file] = _open(Path(self.path) / file)
        try:
            tensor: Tensor = self._files[file].get_tensor(stored)
        except SafetensorError as error:
            raise _damaged(self.path, f"{file} does not hold {stored} ({error})") from error
        return tensor


class SafetensorsSource:
    """Weights of Qwen2.5-Omni in safetensors files, in any of its layouts.

    Args:
        path: the directory.

    Raises:
        ConfigError: as `StoredTensors`, or two tensors mean the same one.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._stored = StoredTensors(path)
        self._places: dict[str, str] = {}
        for stored in sorted(self._stored.names()):
            name = canonical_name(stored)
            if name in self._places:
                raise _unusable(path, f"{stored} and {self._places[name]} are the same tensor")
            self._places[name] = stored

    def names(self) -> set[str]:
        """Return the canonical names of all tensors."""
        return set(self._places)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor from its file."""
        return self._stored.tensor(self._places[name])


class CheckpointSource:
    """Weights of a checkpoint that a run of ours saved: the fp32 master weights.

    Adapters come merged into the weights that they belong on.

    Args:
        path: the checkpoint; every byte of it is checked first. `settings` are those of the run
            that wrote it, by dotted key.

    Raises:
        DamagedError: a file of it is missing or not what was written.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._reader: CheckpointReader | MergedReader
        try:
            reader = CheckpointReader(path)
            lora = lora_of(reader.notes(), reader.path)
            self._reader = reader if lora is None else MergedReader(reader, lora)
        except CheckpointError as error:
            raise _damaged(path, str(error)) from error
        self.settings: dict[str, Any] = reader.manifest.fingerprint.get("config", {})

    def names(self) -> set[str]:
        """Return the names of all parameters that the checkpoint holds."""
        return set(self._reader.names())

    def tensor(self, name: str) -> Tensor:
        """Put one parameter together from the slices of all ranks."""
        return self._reader.full(name)


class TalkerRowsSource:
    """Another source, with the Talker's copy of rows of the Thinker's table where it has none.

    A released checkpoint holds the table alone. The row of a new speaker begins as the mean of the
    named old ones.

    Args:
        source: where all other tensors are.
        spec: which rows.
    """

    def __init__(self, source: WeightSource, spec: TalkerSpec) -> None:
        self.path = source.path
        self._source, self._spec = source, spec
        self._held = source.names()

    def names(self) -> set[str]:
        """Return the source's names, and those of the rows where they can be had."""
        known = {TEXT_TABLE, TEXT_ROWS} & self._held
        return self._held | {TEXT_ROWS, SPEAKER_ROWS} if known else self._held

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the source, or rows cut out of its table."""
        spec = self._spec
        num_old = len(spec.row_ids) - spec.num_new_speakers
        if name in self._held:
            return self._source.tensor(name)
        if name == TEXT_ROWS:
            return self._source.tensor(TEXT_TABLE)[list(spec.row_ids[:num_old])]
        if name == SPEAKER_ROWS:
            new, named = spec.row_ids[num_old:], spec.speakers.values()
            old = [i for i, row in enumerate(spec.row_ids[:num_old]) if row in named]
            old = [i for i in old if spec.row_ids[i] not in new]
            # Rows 0 and 1 are no speakers.
            rows = self.tensor(TEXT_ROWS)[old or list(range(2, num_old))]
            return rows.mean(0, keepdim=True).expand(len(new), -1)
        raise KeyError(name)


def open_source(path: str) -> WeightSource:
    """Return the source at `path`: our own checkpoint, a run, or else a safetensors directory.

    Of a run the newest checkpoint is taken; a damaged one is an error here, since to start from
    an older one is for a person to decide.

    Raises:
        ConfigError: there is no such directory, or nothing in it that can be read.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise _unusable(path, "there is no such directory")
    if (directory / "checkpoints").is_dir():
        newest = step_folders(directory / "checkpoints")[:1]
        if not newest:
            raise _unusable(path, "the run has no checkpoint yet")
        return CheckpointSource(str(newest[0]))
    if (directory / MANIFEST).is_file() and not any(directory.glob("model*.safetensors")):
        return CheckpointSource(path)
    return SafetensorsSource(path)


def _stored_tensors(directory: Path) -> list[tuple[str, str]]:
    """(name in the file, file) of every tensor of a directory."""
    index = directory / INDEX_FILE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            pairs = [(str(name), str(file)) for name, file in weight_map.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(str(directory), f"{INDEX_FILE} cannot be read ({error!r})") from error
        for name, file in pairs:
            # The index is input: it may only name files beside it.
            if Path(file).name != file or not (directory / file).is_file():
                raise _damaged(str(directory), f"{name} should be in {file!r}, which is not there")
        return pairs
    # Some releases keep the same weights in another precision beside it.
    alone = directory / "model.safetensors"
    files = [alone] if alone.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        refuse_pickles(directory, key="model.init_from")
        raise _unusable(str(directory), "there is no safetensors file in it")
    return [(name, file.name) for file in files for name in _names(file)]


def _names(file: Path) -> list[str]:
    return list(_open(file).keys())


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise _damaged(str(file), f"the file cannot be read ({error})") from error


def _unusable(path: str, rule: str, error: type[ConfigError] = ConfigError) -> ConfigError:
    return error(
        key="model.init_from",
        value=path,
        rule=rule,
        remedy="give a checkpoint, a run, or a directory with the safetensors of Qwen2.5-Omni",
    )


def _damaged(path: str, rule: str) -> ConfigError:
    return _unusable(path, rule, DamagedError)
