"""Reads constants.yaml: constants, devices, published rows; and a device of the user's own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from omni_train.config.errors import ConfigError
from omni_train.planning.shapes import DecoderLoad, DecoderShape, Recompute, Setup

CONSTANTS_FILE = Path(__file__).with_name("constants.yaml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """What the formulas multiply with; constants.yaml has the meaning and origin of each."""

    matmul_efficiency: float
    attention_efficiency: float
    network_efficiency: float
    link_efficiency: float
    recompute_flops: float
    collective_latency_s: float
    bytes_per_trained: float
    bytes_per_frozen: float
    work_bytes_per_width: float
    logit_bytes: float
    rest_bytes: float
    vision_encode_s_per_patch: float
    audio_encode_s_per_frame: float
    checkpoint_bytes_per_s: float
    restart_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A kind of machine.

    Args:
        name: of the device.
        peak_flops: dense bf16, what MFU is counted against.
        matmul_flops: the best rate that a matrix product reaches.
        memory_bytes: of one device.
        link_bytes_per_s: one direction, per device, inside a node.
        network_bytes_per_s: the same between nodes.
        devices_per_node, cores_per_node, host_bytes: of one node.
        rest_bytes: what a rank holds beyond the formulas, where that is not what CUDA holds.
    """

    name: str
    peak_flops: float
    matmul_flops: float
    memory_bytes: float
    link_bytes_per_s: float
    network_bytes_per_s: float
    devices_per_node: int
    cores_per_node: int
    host_bytes: float
    rest_bytes: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "rest_bytes" and value is None:
                continue
            if field.name != "name" and not (isinstance(value, int | float) and value > 0):
                raise ConfigError(
                    key=f"hardware.{field.name}",
                    value=value,
                    rule="a positive number is needed",
                    remedy="mend the description; constants.yaml has examples",
                )


@dataclass(frozen=True, slots=True)
class Row:
    """A published measurement.

    Args:
        system: whose; rows of one system share what cannot be known from outside.
        split: `fit` or `hold_out`.
        hardware: where it was taken.
        setup: what was run.
        tokens_per_s: per device.
        memory_gb: peak of one device in 1e9 bytes; None where none was published.
    """

    system: str
    split: str
    hardware: Hardware
    setup: Setup
    tokens_per_s: float
    memory_gb: float | None

    @property
    def name(self) -> str:
        """System and what distinguishes the row within it."""
        setup = self.setup
        parts = [f"{setup.decoders[0].tokens / 1024:.0f}k", f"{setup.devices} devices"]
        if setup.sequence_parallel > 1:
            parts.append(f"SP {setup.sequence_parallel}")
        if setup.zero_stage != 3:
            parts.append(f"ZeRO {setup.zero_stage}")
        return f"{self.system} {', '.join(parts)}"


@cache
def _file() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(CONSTANTS_FILE.read_text(encoding="utf-8"))
    return values


def load_constants(hardware: Hardware | None = None) -> Constants:
    """Return the constants of the file, with what is known of a device in their place."""
    values = {key: float(entry["value"]) for key, entry in _file()["constants"].items()}
    if hardware is not None and hardware.rest_bytes is not None:
        values["rest_bytes"] = hardware.rest_bytes
    return Constants(**values)


def constant_origins() -> dict[str, str]:
    """Return where each constant is from."""
    return {key: str(entry["origin"]) for key, entry in _file()["constants"].items()}


def mtbf_device_hours() -> float:
    """Return the device hours between two failures that are assumed where none are given."""
    return float(_file()["mtbf_device_hours"]["value"])


def known_hardware() -> list[str]:
    """Return the names of the devices that the file describes."""
    return list(_file()["hardware"])


def load_hardware(name: str) -> Hardware:
    """Return a device by its name, or from a YAML file of one's own with the same fields.

    Raises:
        ConfigError: no such device or file, or fields are missing, unknown or not positive.
    """
    known = _file()["hardware"]
    if name in known:
        values = dict(known[name])
    elif name.endswith((".yaml", ".yml")) and Path(name).is_file():
        values = _own_hardware(Path(name))
    else:
        raise ConfigError(
            key="--hardware",
            value=name,
            rule="neither a known device nor a YAML file",
            remedy=f"use one of {', '.join(known)}, or describe yours in a file",
        )
    values.pop("origin", None)
    wanted = {field.name for field in dataclasses.fields(Hardware)} - {"name", "rest_bytes"}
    if wrong := sorted(wanted ^ (values.keys() - {"rest_bytes"})):
        raise ConfigError(
            key="--hardware",
            value=name,
            rule=f"exactly these fields are needed: {', '.join(sorted(wanted))}",
            remedy=f"add or remove {', '.join(wrong)}",
        )
    return Hardware(name=Path(name).stem, **values)


def _own_hardware(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        values = error
    if not isinstance(values, dict):
        raise ConfigError(
            key="--hardware",
            value=str(path),
            rule=f"not a mapping of fields ({values})",
            remedy="see hardware in omni_train/planning/constants.yaml",
        )
    return values


def load_rows() -> list[Row]:
    """Return the published measurements."""
    values = _file()
    shapes = {name: DecoderShape(**sizes) for name, sizes in values["models"].items()}
    return [_row(entry, shapes[entry["model"]]) for entry in values["rows"]]


def _row(entry: dict[str, Any], shape: DecoderShape) -> Row:
    tokens = float(entry["tokens"])
    length = float(entry.get("document_tokens", tokens))
    embedding = shape.vocab * shape.width
    load = DecoderLoad(shape=shape, tokens=tokens, pairs=tokens * length, loss_tokens=tokens)
    setup = Setup(
        decoders=(load,),
        parameters=shape.matmul_parameters + embedding,
        trained_parameters=shape.matmul_parameters + embedding,
        largest_tensor=embedding,
        devices=entry["devices"],
        sequence_parallel=entry.get("sequence_parallel", 1),
        micro_steps=entry.get("micro_steps", 1),
        zero_stage=entry.get("zero_stage", 3),
        recompute=Recompute(entry.get("checkpointing", "full")),
        fused_loss=entry.get("fused_loss", True),
    )
    return Row(
        system=entry["system"],
        split=entry["split"],
        hardware=load_hardware(entry["hardware"]),
        setup=setup,
        tokens_per_s=float(entry["tokens_per_s"]),
        memory_gb=entry.get("memory_gb"),
    )
