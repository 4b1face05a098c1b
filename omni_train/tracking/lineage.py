"""What a run read and what it made, each with a hash, so that runs join into one graph.

A checkpoint has the same address as the output of one run and the input of the next: its run's id,
its step and the hash of its manifest, which in turn has the hash of every file. What lies between
two runs without being one is bridged by its own records: codes name their codec, pairs the sampled
replies that they were chosen from. Reads only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash
import yaml

from omni_train.engine.fingerprint import flatten
from omni_train.tracking.events import read_jsonl

_SCHEME = "omni-train"
# A setting may name a run, or something below it: a checkpoint, a codec.
_LEVELS_UP = 2
_CANDIDATES = "candidates"
# Record of a set of shards -> kind of what it was made with or from, and the key of its hash.
_ORIGINS = {"codes.json": ("codec", "fingerprint"), "pairs.json": (_CANDIDATES, "candidates")}


@dataclass(frozen=True, slots=True)
class Item:
    """Something that a run read or made.

    Args:
        name: letters, digits, . _ and -.
        kind: dataset, checkpoint, codec or candidates.
        address: with its hash; the same wherever it lies.
    """

    name: str
    kind: str
    address: str


def _item(kind: str, path: str, digest: str) -> Item:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{kind}-{path}")
    return Item(name, kind, f"{_SCHEME}://{kind}/{path}?hash={digest}")


def made_by(run_dir: Path) -> list[Item]:
    """Return what a run made: its newest checkpoint, or what its `artifact` events name."""
    events = list(read_jsonl(run_dir / "events.jsonl"))
    run_id = next((str(e["run_id"]) for e in events if "run_id" in e), run_dir.name)
    found = [
        _item("codec", "codec", str(e["codebook_xxh3"]))
        for e in events
        if e["kind"] == "artifact" and "codebook_xxh3" in e
    ]
    sampled = run_dir / _CANDIDATES / f"{_CANDIDATES}.json"
    if sampled.is_file():
        digest = str(xxhash.xxh3_64_hexdigest(sampled.read_bytes()))
        found.append(_item(_CANDIDATES, _CANDIDATES, digest))
    manifests = list((run_dir / "checkpoints").glob("step-*/manifest.json"))
    steps = {int(p.parent.name[5:]): p for p in manifests if p.parent.name[5:].isdigit()}
    if steps:
        newest = steps[max(steps)].read_bytes()
        digest = str(xxhash.xxh3_64_hexdigest(newest))
        found.append(_item("checkpoint", f"{run_id}/step-{max(steps)}", digest))
    return list(dict.fromkeys(found))


def read_by(run_dir: Path, project: Path) -> list[Item]:
    """Return what a run read: the data of its fingerprint, and what other runs made.

    Args:
        run_dir: of the run.
        project: directory to which relative paths of its settings belong.
    """
    found: list[Item] = []
    recorded = run_dir / "fingerprint.json"
    if recorded.exists():
        data = json.loads(recorded.read_bytes()).get("data", {})
        found += [_item("dataset", name, str(digest)) for name, digest in data.items()]
    named = list(_paths_named(run_dir, project))
    for path in named:
        found += _origin(path)
    for other in _runs_named(named):
        if other.resolve() != run_dir.resolve():
            found += made_by(other)
    return list(dict.fromkeys(found))


def _origin(shards: Path) -> Iterator[Item]:
    for name, (kind, key) in _ORIGINS.items():
        if (shards / name).is_file():
            digest = json.loads((shards / name).read_bytes()).get(key)
            if digest:
                yield _item(kind, kind, str(digest))


def _paths_named(run_dir: Path, project: Path) -> Iterator[Path]:
    """Paths among the settings, but for the run's own, which may have been moved since."""
    path = run_dir / "resolved.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    for key, value in flatten(settings).items():
        if isinstance(value, str) and "/" in value and key != "run.dir":
            yield project / value


def _runs_named(paths: list[Path]) -> Iterator[Path]:
    for named in paths:
        for place in [named, *named.parents][: _LEVELS_UP + 1]:
            if (place / "events.jsonl").is_file():
                yield place
                break
