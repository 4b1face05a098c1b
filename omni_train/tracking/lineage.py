"""What a run read and what it made, each with a hash, so that runs join into one graph.

A checkpoint has the same address as the output of one run and the input of the next: its run's id,
its step and the hash of its manifest, which in turn has the hash of every file. Reads only.
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


@dataclass(frozen=True, slots=True)
class Item:
    """Something that a run read or made.

    Args:
        name: letters, digits, . _ and -.
        kind: dataset, checkpoint or codec.
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
        _item("codec", f"{run_id}/{e['name']}", str(e["codebook_xxh3"]))
        for e in events
        if e["kind"] == "artifact" and "codebook_xxh3" in e
    ]
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
    for other in _runs_named(run_dir, project):
        found += made_by(other)
    return list(dict.fromkeys(found))


def _runs_named(run_dir: Path, project: Path) -> Iterator[Path]:
    path = run_dir / "resolved.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    for value in flatten(settings).values():
        if not isinstance(value, str) or "/" not in value:
            continue
        named = project / value
        for place in [named, *named.parents][: _LEVELS_UP + 1]:
            if (place / "events.jsonl").is_file():
                if place.resolve() != run_dir.resolve():
                    yield place
                break
