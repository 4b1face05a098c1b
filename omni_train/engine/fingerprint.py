"""Identity of a run: what must not change silently between a start and a resume.

Config by dotted key, data by source, code by file, versions by package. Reading these is all that
happens here; who is refused for what is `Identity.check_against`.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

import omni_train
from omni_train.config.errors import ConfigError

PACKAGES = ("torch", "deepspeed", "transformers", "trl", "tokenizers", "numpy", "av", "soxr")
CODE_FOLDERS = ("omni_train", "recipes")
# Settings that say where and how often, not what; they may change between start and resume.
NOT_IDENTITY = (
    "run.dir",
    "run.resume_allow",
    "run.take_over",
    "tracking",
    "fit.save_steps",
    "fit.log_steps",
    "fit.keep_checkpoints",
    "fit.milestone_steps",
    "fit.max_skipped_steps",
    "fit.spikes",
    "fit.watch",
    "fit.fault",
    "heldout",
    "cluster",
    "data.num_workers",
    "data.prefetch_packs",
    "data.fetch",
)
_SECRET_NAME = re.compile(
    r"(^|_)(token|secret|password|passwd|api_?key|credentials?)(_|$)", re.IGNORECASE
)
REDACTED = "***"
# A shorter value could stand in any text by chance.
_SECRET_CHARACTERS = 8
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^/@\s'\"]*@)?([^?\s'\"]*)(\?[^\s'\"]*)?")


@dataclass(slots=True)
class Identity:
    """Fingerprint of a run.

    Args:
        config: value by dotted key.
        data: hash by source.
        code: hash by file below the project.
        versions: version by package.
        git: commit of the code, empty where there is none; for the reader, never compared.
    """

    config: dict[str, Any] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    git: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON-able nested dicts."""
        return asdict(self)

    def check_against(self, before: Identity, *, allow: Sequence[str]) -> None:
        """Raise where this differs from `before`, but for keys that start with one in `allow`.

        Raises:
            ConfigError: lists every difference as `key: old -> new`.
        """
        differences: dict[str, str] = {}
        for part in ("config", "data", "code", "versions"):
            old, new = getattr(before, part), getattr(self, part)
            for key in sorted(old.keys() | new.keys()):
                if old.get(key) != new.get(key):
                    name = key if part == "config" else f"{part}.{key}"
                    differences[name] = f"{old.get(key)!r} -> {new.get(key)!r}"
        refused = [key for key in differences if not any(is_covered(a, key) for a in allow)]
        if refused:
            raise ConfigError(
                key="run.dir",
                value="; ".join(f"{key}: {differences[key]}" for key in refused),
                rule="a run is resumed with the config, data and code it was started with",
                remedy=f"restore these, use a new run.dir, or set run.resume_allow={refused[:3]}",
            )


def is_covered(allowed: str, key: str) -> bool:
    """Say whether `key` is `allowed` or lies below it."""
    return key == allowed or key.startswith(f"{allowed}.")


def identity_of(settings: object, data_hashes: Mapping[str, str]) -> Identity:
    """Return the fingerprint of a config, its data and the code that runs."""
    project = Path(omni_train.__file__).parent.parent
    flat = {
        key: value
        for key, value in flatten(redact(plain(settings))).items()
        if not any(is_covered(free, key) for free in NOT_IDENTITY)
    }
    return Identity(flat, dict(data_hashes), _code_hashes(project), _versions(), _git_sha(project))


def plain(value: Any) -> Any:
    """Return a config as dicts, lists and scalars; an Enum becomes its member's name."""
    if is_dataclass(value) and not isinstance(value, type):
        return {spec.name: plain(getattr(value, spec.name)) for spec in fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def redact(value: Any) -> Any:
    """Return plain settings with the values of secret-looking keys, and secrets in texts, replaced.

    Besides by name, a secret is known by its place in an address and by its value: what stands in
    an environment variable with a secret-looking name.
    """
    if isinstance(value, dict):
        return {
            key: REDACTED if item and _is_secret(key, item) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [redact(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """Return a text without known secrets, and addresses in it without user and query."""
    if "://" in text:
        text = _ADDRESS.sub(_shown, text)
    for name, secret in os.environ.items():
        if len(secret) >= _SECRET_CHARACTERS and secret in text and _SECRET_NAME.search(name):
            text = text.replace(secret, REDACTED)
    return text


def _shown(match: re.Match[str]) -> str:
    scheme, user, place, query = match.groups()
    return f"{scheme}{f'{REDACTED}@' if user else ''}{place}{f'?{REDACTED}' if query else ''}"


def _is_secret(key: str, item: object) -> bool:
    return isinstance(item, str) and _SECRET_NAME.search(key) is not None


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat.update(flatten(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _code_hashes(project: Path) -> dict[str, str]:
    files = [path for folder in CODE_FOLDERS for path in (project / folder).rglob("*.py")]
    return {
        path.relative_to(project).as_posix(): str(xxhash.xxh3_64_hexdigest(path.read_bytes()))
        for path in sorted(files)
    }


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git_sha(project: Path) -> str:
    command = ["git", "-C", str(project), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
