"""Chains of stages: `conf/pipeline/NAME.yaml` as a graph, and what of it is done.

    omni-train pipeline show demo                    the graph and its state
    omni-train pipeline run demo --from talker_icl   from that node on; what is done stays done

A node is a recipe (or one of the demo's two data steps) whose inputs are other nodes' directories.
Its fingerprint covers its settings, the files they come from and the fingerprints of its inputs:
done with another fingerprint is stale. Code and data are checked by the run itself, on resume.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import xxhash

from launch.cluster import to_schema
from launch.outcome import outcome
from launch.stages import REPO, recipe_names
from omni_train.config.errors import ConfigError
from omni_train.config.keys import nearest_key
from omni_train.config.names import check_name
from omni_train.config.safe_yaml import load_yaml
from omni_train.engine.lock import living_owner

PIPELINES = REPO / "conf" / "pipeline"
RECORD_NAME = "node.json"
# A command leaves this beside what it made.
DONE_NAME = "node-done"


class Kind(Enum):
    """What a node runs."""

    recipe = "recipe"
    corpus = "corpus"
    codes = "codes"
    ranking = "ranking"
    pairs = "pairs"
    command = "command"


@dataclass(kw_only=True, slots=True)
class NodeConfig:
    """One node.

    Args:
        kind: a recipe, one of the demo's data steps, or a command of the `talker` group.
        recipe: name under `recipes/`.
        experiment: file under `conf/experiment`.
        overrides: what differs from it.
        inputs: override -> node whose directory it gets, or NODE/PATH below that directory.
        after: nodes that must be done before although no override names them.
        subset: of the corpus, for codes.
        args: of a command; {root} stands for the directory of all nodes.
        folder: its directory, where it is not the node's name.
        needs: what must be supplied from outside, in words.
    """

    kind: Kind = Kind.recipe
    recipe: str = ""
    experiment: str = ""
    overrides: list[str] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    after: list[str] = field(default_factory=list)
    subset: str = ""
    args: list[str] = field(default_factory=list)
    folder: str = ""
    needs: str = ""

    @property
    def parents(self) -> list[str]:
        """Nodes that must be done before, each once."""
        return list(dict.fromkeys([*(v.split("/")[0] for v in self.inputs.values()), *self.after]))


@dataclass(kw_only=True, slots=True)
class PipelineConfig:
    """A whole pipeline.

    Args:
        about: one sentence.
        experiment: directory under `runs/` of all its nodes, and W&B's group.
        needs: what the user must supply.
        missing: what no public source provides.
        nodes: in an order in which they can run.
    """

    about: str
    experiment: str
    needs: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    nodes: dict[str, NodeConfig] = field(default_factory=dict)


class State(Enum):
    """How a node stands."""

    done = "done"
    stale = "stale"
    failed = "failed"
    preempted = "preempted"
    running = "running"
    died = "died"
    none = "to do"


@dataclass(frozen=True, slots=True)
class Node:
    """A node with its place, fingerprint and state.

    Args:
        name: of the node and its directory.
        config: as in the file.
        run_dir: absolute.
        fingerprint: of settings and inputs.
        state: how it stands.
        why: of a stale or failed one.
    """

    name: str
    config: NodeConfig
    run_dir: Path
    fingerprint: str
    state: State
    why: str = ""

    def overrides(self, experiment: str) -> list[str]:
        """Return what its command line says, but for `run.dir`."""
        first = [f"experiment={self.config.experiment}"] if self.config.experiment else []
        inputs = [f"{key}=runs/{experiment}/{v}" for key, v in self.config.inputs.items()]
        return [*first, f"run.experiment={experiment}", *self.config.overrides, *inputs]


def pipeline_names() -> list[str]:
    """Return the pipelines that there are."""
    return sorted(path.stem for path in PIPELINES.glob("*.yaml"))


def load_pipeline(name: str, folder: Path = PIPELINES) -> PipelineConfig:
    """Read and check one pipeline.

    Raises:
        ConfigError: there is none of that name, or its graph does not hold together.
    """
    if name not in {path.stem for path in folder.glob("*.yaml")}:
        near = nearest_key(name, pipeline_names())
        raise ConfigError(
            key="pipeline",
            value=name,
            rule="there is no such file in conf/pipeline",
            remedy=f"did you mean {near}?" if near else f"one of: {', '.join(pipeline_names())}",
        )
    config: PipelineConfig = to_schema(
        PipelineConfig, load_yaml(folder / f"{name}.yaml"), where=name
    )
    _check(name, config)
    return config


def _check(name: str, config: PipelineConfig) -> None:
    seen: set[str] = set()
    for label, node in config.nodes.items():
        key = f"{name}.nodes.{label}"
        parts = [label, config.experiment, *filter(None, node.folder.split("/"))]
        for part in parts:
            check_name(part, key=key)
        if node.kind is Kind.recipe and node.recipe not in recipe_names():
            raise ConfigError(
                key=f"{key}.recipe",
                value=node.recipe,
                rule="there is no such recipe",
                remedy=f"one of: {', '.join(recipe_names())}",
            )
        if node.kind is Kind.command and node.args[:1] != ["talker"]:
            raise ConfigError(
                key=f"{key}.args",
                value=node.args,
                rule="a node's command is one of the talker group",
                remedy="begin with talker, as in [talker, rank, ...]",
            )
        for parent in node.parents:
            if parent not in seen:
                raise ConfigError(
                    key=key,
                    value=parent,
                    rule="a node comes after what it needs",
                    remedy="name a node that stands before it in the file",
                )
        seen.add(label)


def nodes_of(config: PipelineConfig, root: Path | None = None) -> dict[str, Node]:
    """Return the nodes with their states, in order.

    Args:
        config: the pipeline.
        root: directory of its nodes; None is `runs/EXPERIMENT`.
    """
    root = REPO / "runs" / config.experiment if root is None else root
    nodes: dict[str, Node] = {}
    for name, node in config.nodes.items():
        parents = [nodes[parent] for parent in node.parents]
        fingerprint = _fingerprint(node, parents)
        run_dir = root / (node.folder or name)
        state, why = _state(node, run_dir, fingerprint, parents)
        nodes[name] = Node(name, node, run_dir, fingerprint, state, why)
    return nodes


def _fingerprint(node: NodeConfig, parents: list[Node]) -> str:
    """Settings as data, not as text: a comment in a YAML file makes nothing stale."""
    files = [f"{node.recipe}.yaml", f"experiment/{node.experiment}.yaml"]
    paths = [REPO / "conf" / name for name in files]
    settings = {
        "node": {k: str(v) for k, v in asdict(node).items() if k != "needs"},
        "files": [load_yaml(path) for path in paths if path.is_file()],
        "inputs": {parent.name: parent.fingerprint for parent in parents},
    }
    return str(xxhash.xxh3_64_hexdigest(json.dumps(settings, sort_keys=True).encode()))


def _state(
    node: NodeConfig, run_dir: Path, fingerprint: str, parents: list[Node]
) -> tuple[State, str]:
    record = run_dir / RECORD_NAME
    recorded = json.loads(record.read_bytes())["fingerprint"] if record.exists() else None
    if node.kind is Kind.recipe:
        word = outcome(run_dir)
        if word == "running" and not living_owner(run_dir / "lock"):
            word = "died"
    else:
        word = "done" if (run_dir / _PROOF[node.kind]).exists() else "none"
    if word == "done":
        if recorded is not None and recorded != fingerprint:
            return State.stale, "its settings changed"
        changed = [parent.name for parent in parents if parent.state is not State.done]
        if changed:
            return State.stale, f"{', '.join(changed)} must run first"
    reason = ""
    if word == "failed":
        reason = str(json.loads((run_dir / "state.json").read_bytes()).get("reason", ""))
    return State[word], reason


# File that a data step writes last.
_PROOF = {
    Kind.corpus: "corpus.json",
    Kind.codes: "manifest.json",
    Kind.ranking: "ledger.jsonl",
    Kind.pairs: "manifest.json",
    Kind.command: DONE_NAME,
}


def chosen(
    nodes: dict[str, Node], *, first: str | None = None, last: str | None = None
) -> list[Node]:
    """Return the nodes from `first` on, and up to `last`, in order.

    Raises:
        ConfigError: there is no such node.
    """
    for option, name in (("--from", first), ("--to", last)):
        if name is not None and name not in nodes:
            near = nearest_key(name, nodes)
            raise ConfigError(
                key=option,
                value=name,
                rule="there is no such node",
                remedy=f"did you mean {near}?" if near else f"one of: {', '.join(nodes)}",
            )
    below = {first} if first else set(nodes)
    if first:
        for name, node in nodes.items():
            if below & set(node.config.parents):
                below.add(name)
    above = {last} if last else set(nodes)
    if last:
        for name, node in reversed(nodes.items()):
            if name in above:
                above |= set(node.config.parents)
    return [node for name, node in nodes.items() if name in below and name in above]


def set_aside(node: Node) -> Path:
    """Move what a stale node left out of the way; nothing is deleted."""
    kept = node.run_dir.parent / "stale"
    kept.mkdir(exist_ok=True)
    number = sum(1 for _ in kept.glob(f"{node.name}-*"))
    return node.run_dir.rename(kept / f"{node.name}-{number}")


def record(node: Node) -> None:
    """Write down with which settings a node was run."""
    node.run_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"fingerprint": node.fingerprint, "inputs": node.config.parents})
    (node.run_dir / RECORD_NAME).write_text(text + "\n", encoding="utf-8")


def picture(config: PipelineConfig, nodes: dict[str, Node]) -> str:
    """Return the graph as text: a node stands under the last one that it needs."""
    children: dict[str, list[str]] = {name: [] for name in nodes}
    roots: list[str] = []
    for name, node in nodes.items():
        parents = node.config.parents
        (children[max(parents, key=list(nodes).index)] if parents else roots).append(name)
    lines = [f"{config.about}", f"runs/{config.experiment}", ""]

    def draw(names: list[str], indent: str) -> Iterator[str]:
        """A line for each node, and below it those that stand under it."""
        for number, name in enumerate(names):
            node, final = nodes[name], number == len(names) - 1
            others = [p for p in node.config.parents if name not in children[p]]
            also = f"  (and {', '.join(others)})" if others else ""
            why = f": {node.why}" if node.why else ""
            branch = "`- " if final else "|- "
            yield f"{indent}{branch}{name}{also}  [{node.state.value}{why}]"
            yield from draw(children[name], indent + ("   " if final else "|  "))

    lines += draw(roots, "")
    for title, rows in (
        (
            "needs",
            [*config.needs, *(f"{n}: {d.needs}" for n, d in config.nodes.items() if d.needs)],
        ),
        ("no public source provides", config.missing),
    ):
        wrapped = (
            textwrap.fill(r, 78, initial_indent="  - ", subsequent_indent="    ") for r in rows
        )
        lines += ["", f"{title}:", *wrapped] if rows else []
    return "\n".join(lines)


def as_dict(config: PipelineConfig, nodes: dict[str, Node]) -> dict[str, Any]:
    """Return the graph as plain values."""
    rows = [
        {
            "name": node.name,
            "recipe": node.config.recipe or node.config.kind.name,
            "after": node.config.parents,
            "run_dir": str(node.run_dir),
            "state": node.state.value,
            "why": node.why,
            "fingerprint": node.fingerprint,
        }
        for node in nodes.values()
    ]
    whole = {"about": config.about, "experiment": config.experiment, "needs": config.needs}
    return {**whole, "missing": config.missing, "nodes": rows}
