"""Reads back what an offline W&B run wrote: W&B's own messages, out of its file of records."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import ArtifactRecord, Record

_BLOCK, _HEADER = 32_768, 7
_WHOLE, _LAST = 1, 4


def wandb_file(home: Path) -> Path:
    """The one `.wandb` file below `home`."""
    (path,) = home.rglob("*.wandb")
    return path


def records(path: Path) -> Iterator[Record]:
    """Every record of a file, which is a log in LevelDB's format with a header of its own.

    A block has 32 KiB; a record that crosses into another one is cut, each piece with its checksum.
    """
    data = path.read_bytes()
    assert data[:4] == b":W&B", data[:7]
    at, pieces = _HEADER, b""
    while at + _HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:
            at += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[at : at + _HEADER])
        piece = data[at + _HEADER : at + _HEADER + length]
        assert zlib.crc32(piece, zlib.crc32(bytes([kind]))) == checksum, at
        at += _HEADER + length
        pieces += piece
        if kind in (_WHOLE, _LAST):
            record = Record()
            record.ParseFromString(pieces)
            pieces = b""
            yield record


@dataclass
class WandbRun:
    """What a run shows.

    Args:
        id, group, job_type: of the run.
        config, summary: settings, and last values.
        history: a row for each step, by its number.
        tables: columns and rows by title; a medium is its path in the table's artifact.
        media: files of the tables by that path.
        used, made: addresses that artifacts refer to.
        alerts: titles and texts.
    """

    id: str = ""
    group: str = ""
    job_type: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    tables: dict[str, tuple[list[str], list[list[Any]]]] = field(default_factory=dict)
    media: dict[str, Path] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    alerts: list[str] = field(default_factory=list)


def read_wandb(home: Path) -> WandbRun:
    """Read the one offline run below `home`."""
    run = WandbRun()
    for record in records(wandb_file(home)):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.id, run.group = record.run.run_id, record.run.run_group
            run.job_type = record.run.job_type
            run.config |= _values(record.run.config.update)
        elif kind == "history":
            run.history.setdefault(record.history.step.num, {}).update(_values(record.history.item))
        elif kind == "summary":
            run.summary |= _values(record.summary.update)
        elif kind == "alert":
            run.alerts.append(f"{record.alert.title}: {record.alert.text}")
        elif kind == "artifact":
            _add_artifact(run, record.artifact)
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            _add_artifact(run, record.request.log_artifact.artifact)
    return run


def _values(items: Any) -> dict[str, Any]:
    return {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}


def _add_artifact(run: WandbRun, artifact: ArtifactRecord) -> None:
    addresses = [e.ref for e in artifact.manifest.contents if e.ref]
    (run.used if artifact.use_after_commit else run.made).extend(addresses)
    files = {e.path: Path(e.local_path) for e in artifact.manifest.contents if e.local_path}
    for name, path in files.items():
        if name.endswith(".table.json"):
            table = json.loads(path.read_text())
            rows = [[c["path"] if isinstance(c, dict) else c for c in r] for r in table["data"]]
            run.tables[name.removesuffix(".table.json")] = (table["columns"], rows)
        else:
            run.media[name] = path


@dataclass
class Origins:
    """All that runs read (`used`) and made, which lead to one of them."""

    used: set[str] = field(default_factory=set)
    made: set[str] = field(default_factory=set)


def origins(runs: dict[str, WandbRun], last: str) -> Origins:
    """Follow the addresses back from a run to the data."""
    makers = {address: name for name, run in runs.items() for address in run.made}
    found, todo, seen = Origins(), [last], set()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            found.used |= set(runs[name].used)
            found.made |= set(runs[name].made)
            todo += [makers[address] for address in runs[name].used if address in makers]
    return found
