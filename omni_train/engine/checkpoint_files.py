"""Checkpoint directories on disk: manifest, verification, atomic appearance, retention.

    checkpoints/
        latest                          name of the newest complete one
        step-200/                       manifest.json, state.json, rank-*.safetensors, rank-*.json
        step-300.tmp-1f2e3d4c/          being written, or left by a crash
        frozen-<hash>/                  frozen weights, written once and shared by all steps
    quarantine/                         leftovers and bad checkpoints, moved here, never read

A directory is complete when its manifest is there, and the manifest is written last. What the
files hold is not known here (see checkpoint.py).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from omni_train.engine.exit_codes import ExitCode, RunError
from omni_train.engine.hashing import file_hash

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
_STEP_NAME = re.compile(r"step-(\d+)")
# What cannot be the name of a directory with frozen weights.
_FROZEN_NAME = re.compile(r"^(?!frozen-[A-Za-z0-9]+\Z).+", re.DOTALL)


class CheckpointError(RunError):
    """A checkpoint that cannot be used (exit code 65); the message names file and reason."""

    def __init__(self, message: str) -> None:
        super().__init__(ExitCode.bad_data, message)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and xxh3-64 (16 hex digits) of one file."""

    size: int
    xxh3: str


@dataclass(frozen=True, slots=True)
class Problem:
    """A file that is not what the manifest says. `reason`: missing, size, xxh3 or unreadable."""

    file: str
    reason: str
    detail: str


@dataclass(slots=True)
class Manifest:
    """Contents of a checkpoint directory.

    Args:
        step: global step after which it was written.
        world_size: ranks that wrote it.
        fingerprint: identity of config, data and code of the run.
        files: by name below the directory.
        frozen: name of the directory with the frozen weights, beside this one; empty for none.
        frozen_files: its files, by name.
        params: by parameter name: shape, trainable, dtype of the weights as the model ran.
    """

    step: int
    world_size: int
    fingerprint: dict[str, Any]
    files: dict[str, FileRecord]
    frozen: str = ""
    frozen_files: dict[str, FileRecord] = field(default_factory=dict)
    params: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write `manifest.json`, with a hash of its own, and make it durable."""
        body = {"format": FORMAT, **asdict(self)}
        text = json.dumps({**body, "xxh3": _body_hash(body)}, indent=1, sort_keys=True)
        path = folder / MANIFEST
        path.write_text(text + "\n", encoding="utf-8")
        fsync(path)
        fsync(folder)

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read and check `manifest.json`.

        Raises:
            CheckpointError: it is missing, damaged or of another format.
        """
        path = folder / MANIFEST
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            own = body.pop("xxh3")
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as e:
            raise CheckpointError(f"{path}: unreadable manifest ({e})") from None
        if own != _body_hash(body):
            raise CheckpointError(f"{path}: its xxh3 does not match its contents")
        if body.pop("format", None) != FORMAT:
            raise CheckpointError(f"{path}: this code reads format {FORMAT} only")
        try:
            for key in ("files", "frozen_files"):
                body[key] = {name: FileRecord(**record) for name, record in body[key].items()}
            manifest = Manifest(**body)
            names = [*manifest.files, *manifest.frozen_files]
            # A checkpoint of somebody else's is input: it may only name files of its own.
            outside = [n for n in names if Path(n).name != n] + _FROZEN_NAME.findall(
                manifest.frozen
            )
        except (TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a manifest ({error})") from None
        if outside:
            raise CheckpointError(f"{path}: names files outside of the checkpoint: {outside[:3]}")
        return manifest


def _body_hash(body: dict[str, Any]) -> str:
    return str(xxhash.xxh3_64_hexdigest(json.dumps(body, sort_keys=True).encode()))


def rank_file(rank: int, suffix: str) -> str:
    """Return the name of a rank's file."""
    return f"rank-{rank:05d}.{suffix}"


def fsync(path: Path) -> None:
    """Make a file's contents, or a directory's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def record_of(path: Path) -> FileRecord:
    """Return size and hash of a file as it now is."""
    return FileRecord(path.stat().st_size, file_hash(path))


def verify_file(path: Path, record: FileRecord) -> Problem | None:
    """Return what is wrong with a file, or None."""
    try:
        size = path.stat().st_size
        if size != record.size:
            return Problem(path.name, "size", f"{size} bytes, the manifest says {record.size}")
        found = file_hash(path)
    except FileNotFoundError:
        return Problem(path.name, "missing", "the manifest names it")
    except OSError as error:
        return Problem(path.name, "unreadable", str(error))
    if found != record.xxh3:
        return Problem(path.name, "xxh3", f"{found}, the manifest says {record.xxh3}")
    return None


def verify_checkpoint(
    folder: Path, *, share: int = 0, shares: int = 1, with_frozen: bool = True
) -> list[Problem]:
    """Return what is wrong with a checkpoint; an empty list means every byte is as written.

    Args:
        folder: a `step-N` directory.
        share, shares: check every `shares`-th file from number `share`, so ranks split the work.
        with_frozen: check the frozen weights too.
    """
    try:
        manifest = Manifest.read(folder)
    except CheckpointError as error:
        return [Problem(MANIFEST, "unreadable", str(error))]
    entries = [(folder / name, record) for name, record in sorted(manifest.files.items())]
    if with_frozen:
        home = folder.parent / manifest.frozen
        entries += [(home / name, record) for name, record in sorted(manifest.frozen_files.items())]
    problems = [verify_file(path, record) for path, record in entries[share::shares]]
    return [problem for problem in problems if problem is not None]


def step_folders(root: Path) -> list[Path]:
    """Return the `step-N` directories, newest first by step number (never by file time)."""
    if not root.is_dir():
        return []
    found = [(_STEP_NAME.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir()]
    numbered = [(int(match.group(1)), path) for match, path in found if match is not None]
    return [path for _, path in sorted(numbered, reverse=True)]


def new_temporary(root: Path, name: str) -> Path:
    """Create and return `name.tmp-<id>` below `root`."""
    folder = root / f"{name}.tmp-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    return folder


def put_in_place(temporary: Path, target: Path) -> None:
    """Rename a finished directory to its name and make the rename durable."""
    if target.exists():
        quarantine(target)
    fsync(temporary)
    temporary.rename(target)
    fsync(target.parent)


def point_to(root: Path, name: str) -> None:
    """Replace the pointer file atomically."""
    temporary = root / f"{LATEST}.tmp-{uuid.uuid4().hex[:8]}"
    temporary.write_text(name + "\n", encoding="utf-8")
    fsync(temporary)
    temporary.replace(root / LATEST)
    fsync(root)


def quarantine(path: Path) -> Path:
    """Move a directory of `checkpoints/` out of the way, beside `checkpoints/`; delete nothing."""
    home = path.parent.parent / "quarantine"
    home.mkdir(exist_ok=True)
    target = home / f"{path.name}-{uuid.uuid4().hex[:8]}"
    path.rename(target)
    return target


def quarantine_leftovers(root: Path) -> list[Path]:
    """Move what a crash left half written to quarantine and return where it went."""
    if not root.is_dir():
        return []
    return [quarantine(path) for path in sorted(root.iterdir()) if ".tmp-" in path.name]


def prune(root: Path, *, keep: int, milestone_steps: int = 0) -> list[str]:
    """Delete all but the newest `keep` complete checkpoints, and frozen weights none of them names.

    An incomplete directory counts for nothing, so the only complete one is never deleted.

    Args:
        root: directory of the checkpoints.
        keep: how many; at least one stays.
        milestone_steps: a checkpoint whose step this divides stays too; 0 for no such ones.
    """
    complete: list[tuple[Path, Manifest]] = []
    for folder in step_folders(root):
        try:
            complete.append((folder, Manifest.read(folder)))
        except CheckpointError:
            continue
    newest = max(1, keep)
    kept, doomed = complete[:newest], []
    for folder, manifest in complete[newest:]:
        if milestone_steps and manifest.step % milestone_steps == 0:
            kept.append((folder, manifest))
        else:
            doomed.append(folder)
    needed = {manifest.frozen for _, manifest in kept}
    if kept:
        frozen = [p for p in root.glob("frozen-*") if p.is_dir() and ".tmp-" not in p.name]
        doomed += [path for path in frozen if path.name not in needed]
    for folder in doomed:
        # Renamed first: a crash in the middle leaves a leftover, not a checkpoint with holes.
        condemned = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
        folder.rename(condemned)
        shutil.rmtree(condemned)
    return [folder.name for folder in doomed]
