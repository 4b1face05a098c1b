"""Low-rank adapters on the Thinker's linear layers, made and named by peft.

Done here: which layers get one, their first values, merging, peft's own file format. The weights
under an adapter keep their place and, frozen, every bit; a checkpoint has both, and whoever starts
from it reads them merged (weights.py).

Letters: O outputs and I inputs of a layer, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from omni_train.config.errors import ConfigError
from omni_train.engine.checkpoint_files import CheckpointError
from omni_train.engine.checkpoint_reader import CheckpointReader
from omni_train.models.groups import ADAPTED, adapter_group, group_of

# Groups whose layers are all plain matrix products of one input.
ADAPTABLE = ("llm", "audio_encoder", "vision_encoder")
# Under which name checkpoints and runs speak of the adapters (Engine.notes).
NOTE = "lora"
_BASE = ".base_layer."
_A, _B = ".lora_A.default.", ".lora_B.default."
# peft's name of a module inside the model that it wraps.
_PEFT_PREFIX = "base_model.model."
_DEFAULT_ALPHA = 16.0


def _default_groups() -> list[str]:
    return ["llm"]


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Adapters of a stage.

    Args:
        rank: of every adapter; 0 for none.
        alpha: the adapters' output is scaled by alpha / rank.
        groups: whose linear layers get adapters: llm, audio_encoder, vision_encoder.
    """

    rank: int = 0
    alpha: float = _DEFAULT_ALPHA
    groups: list[str] = field(default_factory=_default_groups)

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha <= 0:
            raise ConfigError(
                key="lora.rank" if self.rank < 0 else "lora.alpha",
                value=self.rank if self.rank < 0 else self.alpha,
                rule="a rank is not negative, and alpha is positive",
                remedy="give rank 0 for training without adapters",
            )
        wrong = sorted(set(self.groups) - set(ADAPTABLE))
        if wrong or not self.groups or len(set(self.groups)) != len(self.groups):
            raise ConfigError(
                key="lora.groups",
                value=self.groups,
                rule=f"each of {', '.join(ADAPTABLE)} at most once, and at least one",
                remedy="name the groups that get adapters",
            )
        if not self.rank and (self.groups != _default_groups() or self.alpha != _DEFAULT_ALPHA):
            raise ConfigError(
                key="lora.rank",
                value=0,
                rule="alpha and groups have no effect without adapters",
                remedy="give a rank, such as 16, or leave them out",
            )


def adapter_groups(config: LoraConfig) -> list[str]:
    """Return the parameter groups that hold the adapters: `llm_lora` and so on."""
    return [adapter_group(name) for name in config.groups]


def notes_of(config: LoraConfig) -> dict[str, Any]:
    """Return what a checkpoint must say of the adapters; nothing where there are none."""
    return {NOTE: asdict(config)} if config.rank else {}


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Put adapters on a model that is still on the meta device.

    Args:
        model: with the parameter names that `group_of` knows; is changed in place.
        config: with a rank.
    """
    from peft import inject_adapter_in_model

    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and group_of(f"{name}.weight") in config.groups
    ]
    inject_adapter_in_model(_peft_config(config, targets), model, low_cpu_mem_usage=True)


def plain_name(name: str) -> str:
    """Return the name that a parameter has in a model without adapters."""
    return name.replace(_BASE, ".")


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ADAPTED in name


def initialise_adapter(module: nn.Linear, name: str) -> None:
    """Give a matrix of an adapter peft's first values: A as torch has it, B zero."""
    module.reset_parameters()
    if name.endswith(_B.rstrip(".")):
        nn.init.zeros_(module.weight)


def lora_of(notes: Mapping[str, Any], place: Path) -> LoraConfig | None:
    """Return the adapters that a checkpoint speaks of, or None.

    Raises:
        CheckpointError: the note is not what `notes_of` writes.
    """
    if NOTE not in notes:
        return None
    try:
        return LoraConfig(**notes[NOTE])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{place}: its note on adapters cannot be read ({error})") from None


class MergedReader:
    """A checkpoint with adapters, read as if it had none.

    Args:
        reader: of the checkpoint.
        config: of its adapters.
    """

    def __init__(self, reader: CheckpointReader, config: LoraConfig) -> None:
        self._reader, self._scale = reader, config.alpha / config.rank
        self._stored = {plain_name(name): name for name in reader.names() if not is_adapter(name)}

    def names(self) -> list[str]:
        """Return the names of a model without adapters."""
        return list(self._stored)

    def full(self, name: str) -> Tensor:
        """Return a parameter; with an adapter float32 [O, I], W + alpha / R * B A."""
        stored = self._stored[name]
        value = self._reader.full(stored)
        if not stored.endswith(f"{_BASE}weight"):
            return value
        stem = stored.removesuffix(f"{_BASE}weight")
        a, b = (self._reader.full(f"{stem}{part}weight").float() for part in (_A, _B))
        return value.float() + self._scale * (b @ a)


def write_adapter(reader: CheckpointReader, config: LoraConfig, folder: Path, base: str) -> None:
    """Write a checkpoint's adapters in peft's own format, for `PeftModel.from_pretrained`.

    Args:
        reader, config: of the checkpoint and its adapters.
        folder: gets `adapter_config.json` and `adapter_model.safetensors`.
        base: name of the whole model (not of its Thinker) that they belong on.
    """
    names = [name for name in reader.names() if is_adapter(name)]
    tensors = {
        _PEFT_PREFIX + name.replace(".default.", "."): reader.full(name).contiguous()
        for name in names
    }
    targets = [name.removesuffix(f"{_A}weight") for name in names if name.endswith(f"{_A}weight")]
    written = _peft_config(config, targets)
    written.base_model_name_or_path, written.inference_mode = base, True
    folder.mkdir(parents=True, exist_ok=True)
    written.save_pretrained(str(folder))
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def _peft_config(config: LoraConfig, targets: list[str]) -> Any:
    import peft

    return peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=sorted(targets), lora_dropout=0.0
    )
