"""What a job asks of a cluster: `conf/cluster/NAME.yaml`, and `cluster.KEY=` on the command line.

    omni-train launch stage1_audio target=slurm cluster=NAME cluster.nodes=2 run.dir=runs/audio

Values end up in job scripts and manifests, so each is held to a list of harmless characters here.
Nothing is written or submitted here (launch/slurm.py, launch/kubernetes.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, cast, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.stages import REPO
from omni_train.config.errors import ConfigError
from omni_train.config.keys import dotted_keys, field_types, nearest_key
from omni_train.config.safe_yaml import check_yaml, load_yaml

CLUSTERS = REPO / "conf" / "cluster"


class Target(Enum):
    """Where a run is started."""

    local = "local"
    slurm = "slurm"
    kubernetes = "kubernetes"


class Manifest(Enum):
    """Kind of Kubernetes object that a stage becomes."""

    trainjob = "trainjob"
    jobset = "jobset"
    job = "job"


class Runtime(Enum):
    """What starts a container under SLURM."""

    apptainer = "apptainer"
    pyxis = "pyxis"


_NAME = (r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", "letters, digits, . _ - and at most 63 of them")
_DNS = (r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "lower-case letters, digits and - (a DNS label)")
# Fields that a script or a manifest takes as they are -> pattern, and the rule in words.
_TEXTS = {
    "partition": _NAME,
    "account": _NAME,
    "qos": _NAME,
    "time": (
        r"(\d{1,3}-)?\d{1,4}(:[0-5]\d){0,2}",
        "minutes, hours:minutes:seconds or days-hours",
    ),
    "mem": (r"\d{1,6}[KMGT]?", "a number with K, M, G or T"),
    "container": (
        r"[A-Za-z0-9./][A-Za-z0-9._/:@+#-]{0,400}",
        "an image's path or reference, without spaces",
    ),
    "interface": (r"[A-Za-z0-9._-]{1,15}", "the name of a network device"),
    "namespace": _DNS,
    "queue": _DNS,
    "volume": _DNS,
    "secret": _DNS,
    "mount": (r"/[A-Za-z0-9._/-]{1,200}", "an absolute path of plain characters"),
    "workdir": (r"/[A-Za-z0-9._/-]{1,200}", "an absolute path of plain characters"),
}
_SECRET = re.compile(r"[A-Z][A-Z0-9_]{0,62}")
_SWEEP = re.compile(r"([A-Za-z_][A-Za-z0-9_.]*)=([A-Za-z0-9._+-]+(?:,[A-Za-z0-9._+-]+)+)")


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """Size and place of a job.

    Args:
        nodes: machines; one torchrun on each.
        gpus_per_node: 0 trains on CPUs.
        ranks_per_node: processes on each; 0 is one for each GPU.
        cpus_per_node: 0 leaves it to the cluster.
        lead_s: seconds before the end of its time in which a job is told to save.
        interface: network device of the ranks' own traffic, where the host name leads elsewhere.
        secrets: names of environment variables that are handed on; their values are in no file.
        array: `KEY=V1,V2`: one run for each value, in directories of its own (SLURM).
        partition, account, qos, time, mem, container, runtime: of SLURM; empty leaves it to the
            cluster. A container is an image's path or reference for Kubernetes too.
        manifest, namespace, queue, volume, mount, workdir, secret: of Kubernetes: the kind of
            object, Kueue's queue, the claim of the shared volume, where it is mounted, where the
            code lies in the image, the secret that holds `secrets`.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    ranks_per_node: int = 0
    cpus_per_node: int = 0
    lead_s: int = 300
    interface: str = ""
    secrets: list[str] = field(default_factory=list)
    array: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    time: str = ""
    mem: str = ""
    container: str = ""
    runtime: Runtime = Runtime.apptainer
    manifest: Manifest = Manifest.trainjob
    namespace: str = "default"
    queue: str = ""
    volume: str = ""
    mount: str = "/data"
    workdir: str = "/data/omni-train"
    secret: str = ""

    def __post_init__(self) -> None:
        bounds = {
            "nodes": (1, 10_000),
            "gpus_per_node": (0, 64),
            "ranks_per_node": (0, 256),
            "cpus_per_node": (0, 4096),
            "lead_s": (30, 65_535),
        }
        for key, (least, most) in bounds.items():
            if not least <= getattr(self, key) <= most:
                raise _refused(key, getattr(self, key), f"must be {least} to {most}")
        for key, (pattern, rule) in _TEXTS.items():
            value = getattr(self, key)
            if value and not re.fullmatch(pattern, value):
                raise _refused(key, value, rule)
        for name in self.secrets:
            if not _SECRET.fullmatch(name):
                raise _refused("secrets", name, "a variable's name, such as WANDB_API_KEY")
        if self.array and not _SWEEP.fullmatch(self.array):
            raise _refused("array", self.array, "KEY=V1,V2,... with at least two plain values")

    @property
    def ranks(self) -> int:
        """Processes on each node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    def sweep(self) -> tuple[str, list[str]]:
        """Return the key and the values of `array`; no values where it is empty."""
        found = _SWEEP.fullmatch(self.array)
        return (found[1], found[2].split(",")) if found else ("", [])


@dataclass(frozen=True, slots=True)
class Words:
    """The words of a `launch` command, taken apart.

    Args:
        target: where to start.
        cluster: what is asked of it.
        overrides: what goes on to the recipe.
    """

    target: Target
    cluster: ClusterConfig
    overrides: list[str]


def _refused(key: str, value: object, rule: str) -> ConfigError:
    return ConfigError(key=f"cluster.{key}", value=value, rule=rule, remedy="correct it")


def parse_words(words: Sequence[str]) -> Words:
    """Take `target=`, `cluster=NAME` and `cluster.KEY=VALUE` from the words; the rest is Hydra's.

    Raises:
        ConfigError: no or an unknown target, no such file, key or value.
    """
    given = {"target": "", "cluster": ""}
    values: dict[str, Any] = {}
    overrides: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in given:
            given[key] = value
        elif equals and key.startswith("cluster."):
            check_yaml(value, key)
            values[key.removeprefix("cluster.")] = OmegaConf.create({"v": value})["v"]
            if value[:1] == "[":
                values[key.removeprefix("cluster.")] = value.strip("[]").split(",")
        else:
            overrides.append(word)
    if given["target"] not in Target.__members__:
        raise ConfigError(
            key="target",
            value=given["target"],
            rule="a job needs a place",
            remedy=f"add target=NAME, one of {', '.join(Target.__members__)}",
        )
    return Words(Target[given["target"]], _cluster(given["cluster"], values), overrides)


def _cluster(name: str, values: Mapping[str, Any]) -> ClusterConfig:
    known = sorted(path.stem for path in CLUSTERS.glob("*.yaml"))
    if name and name not in known:
        raise ConfigError(
            key="cluster",
            value=name,
            rule="no such file in conf/cluster",
            remedy=f"one of: {', '.join(known)}; or set cluster.KEY=VALUE",
        )
    base = load_yaml(CLUSTERS / f"{name}.yaml") if name else {}
    config: ClusterConfig = to_schema(ClusterConfig, {**base, **values}, where="cluster")
    return config


def to_schema(schema: type, values: Mapping[str, Any], *, where: str) -> Any:
    """Return the dataclass that plain values stand for.

    Raises:
        ConfigError: an unknown key, a value of another type, or the schema's own rule.
    """
    for key in _unknown(schema, values):
        near = nearest_key(key, dotted_keys(schema))
        raise ConfigError(
            key=f"{where}.{key}",
            value="(given)",
            rule="there is no such key",
            remedy=f"did you mean {where}.{near}?" if near else "remove it",
        )
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), dict(values)))
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or "")
        raise ConfigError(
            key=f"{where}.{key}" if key else where,
            value="(given)",
            rule=" ".join(str(error).splitlines()[0].split()),
            remedy="give a value of the type that the schema states",
        ) from None
    except TypeError as error:
        # A required field of a dataclass inside a mapping or list.
        raise ConfigError(
            key=where, value="(absent)", rule=str(error), remedy="add what is missing"
        ) from None


def _unknown(hint: Any, value: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys that the schema lacks; names in its mappings are free."""
    if is_dataclass(hint) and isinstance(value, Mapping):
        known = field_types(cast("type", hint))
        for key, item in value.items():
            if key in known:
                yield from _unknown(known[key], item, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"
    elif get_origin(hint) is dict and isinstance(value, Mapping):
        for key, item in value.items():
            yield from _unknown(get_args(hint)[1], item, f"{prefix}{key}.")


def job_name(*parts: str) -> str:
    """Return a name for a job: a DNS label made of the parts, 50 characters at most."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")[:50].strip("-") or "run"


def code_files(root: Path = REPO) -> list[Path]:
    """Return the files that a run needs, relative to the project, sorted."""
    folders = ("conf", "data_pipelines", "launch", "omni_train", "recipes")
    kept = (".py", ".yaml", ".typed")
    found = (path for folder in folders for path in (root / folder).rglob("*"))
    return sorted(path.relative_to(root) for path in found if path.suffix in kept)
