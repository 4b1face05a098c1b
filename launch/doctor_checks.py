"""The checks of `omni-train doctor`, one function each: what was found, and what to do about it.

Each returns findings and raises nothing that a broken machine could cause. Nothing is changed, but
for one file that is written and deleted to time the disk.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from launch.local import count_gpus
from launch.stages import REPO

# Older ones have known holes: unpickling in torch.load, remote code in transformers, code from
# configurations in Hydra, memory errors in FFmpeg's demuxers.
SAFE_FROM = {"torch": (2, 10), "transformers": (5, 3), "hydra-core": (1, 3, 8), "av": (18,)}
_CHECKED = (
    *("torch", "deepspeed", "transformers", "trl", "hydra-core", "omegaconf", "av", "soxr"),
    *("soundfile", "pyarrow", "safetensors", "xxhash", "webdataset", "wandb"),
)
_OLDEST_PYTHON = (3, 11)
_WRITE_MIB, _SLOW_MB_PER_S = 64, 100.0
_LEAST_FREE_BYTES = 10e9
_CLOCK_WARN_S, _CLOCK_FAIL_S = 0.1, 5.0
# Bytes per second: a link inside a node, and any network that ZeRO-3 could live with.
_SLOW_RANKS = {"nccl": 20e9, "gloo": 50e6}
_CONNECT_S = 3.0


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: `status` is pass, warn or fail; `remedy` is what to do, if anything."""

    name: str
    status: str
    detail: str
    remedy: str = ""


def check_python() -> list[Check]:
    """The interpreter's version."""
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < _OLDEST_PYTHON:
        return [Check("python", "fail", found, "install Python 3.11 or newer")]
    return [Check("python", "pass", found)]


def check_packages(constraints: Path = REPO / "constraints.txt") -> list[Check]:
    """Installed versions against the pins, and against the oldest that has no known hole."""
    pins = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)", constraints.read_text(encoding="utf-8")))
    other, found = [], []
    for name in _CHECKED:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append(Check(name, "fail", "not installed", "run ./run once; it installs all"))
            continue
        oldest = SAFE_FROM.get(name)
        if oldest is not None and numbers(version) < oldest:
            wanted = ".".join(map(str, oldest))
            text = f"{version} has known vulnerabilities"
            found.append(Check(name, "fail", text, f"install {name}>={wanted}"))
        elif name in pins and version.partition("+")[0] != pins[name].partition("+")[0]:
            other.append(f"{name} {version} (tested with {pins[name]})")
    if other:
        remedy = "pip install -r constraints.txt, or rerun the tests with these"
        found.append(Check("packages", "warn", ", ".join(other), remedy))
    elif not found:
        found.append(
            Check("packages", "pass", f"{len(_CHECKED)} as pinned, none below the oldest safe one")
        )
    return found


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: `2.13.0+cpu` -> (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def check_gpus() -> list[Check]:
    """Driver and devices."""
    count, tool = count_gpus(), shutil.which("nvidia-smi")
    if not count:
        return [Check("GPU", "warn", "none; ranks run on the CPU", "fine for the demo and tests")]
    if tool is None:
        remedy = "install the driver's utilities; the devices may still work"
        return [Check("GPU", "warn", f"{count} devices, no nvidia-smi", remedy)]
    query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run([tool, *query], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        text = " ".join((done.stderr or done.stdout).split())
        return [Check("GPU", "fail", text, "reload or reinstall the NVIDIA driver")]
    lines = sorted(set(done.stdout.strip().splitlines()))
    kinds = "; ".join(lines)
    if len(lines) > 1:
        return [
            Check("GPU", "warn", f"{count} devices of several kinds: {kinds}", "use alike ones")
        ]
    return [Check("GPU", "pass", f"{count} x {kinds}")]


def check_disk(folder: Path, needed: float | None) -> list[Check]:
    """Free space against three checkpoints, and the speed of writing with fsync.

    Args:
        folder: where runs will lie; the nearest directory above it that exists is looked at.
        needed: bytes of one checkpoint; None where no stage was named.
    """
    place = folder.absolute()
    while not place.is_dir():
        place = place.parent
    free = shutil.disk_usage(place).free
    wanted = _LEAST_FREE_BYTES if needed is None else 3 * needed
    what = "10 GB" if needed is None else f"three checkpoints ({wanted / 1e9:,.2f} GB)"
    status = "pass" if free >= wanted else ("warn" if needed is None else "fail")
    remedy = "" if status == "pass" else "free some, or give another directory by --dir"
    found = [Check("disk space", status, f"{free / 1e9:,.1f} GB free; wanted {what}", remedy)]
    return [*found, _write_speed(place)]


def _write_speed(folder: Path) -> Check:
    block = os.urandom(2**20)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            for _ in range(_WRITE_MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - start
    except OSError as error:
        text = f"cannot write into {folder}: {error.strerror}"
        return Check("disk speed", "fail", text, "choose a directory of your own by --dir")
    rate = _WRITE_MIB * 2**20 / seconds / 1e6
    text = f"{rate:,.0f} MB/s written and synced in {folder}"
    if rate < _SLOW_MB_PER_S:
        return Check("disk speed", "warn", text, "checkpoints will take long; use a faster disk")
    return Check("disk speed", "pass", text)


def check_codecs() -> list[Check]:
    """Decoders of every codec that data may use."""
    import av
    import soundfile

    from omni_train.data.clip import AUDIO_CODECS, VIDEO_CODECS

    wanted = (*VIDEO_CODECS, *AUDIO_CODECS)
    missing = [name for name in wanted if name not in av.codecs_available]
    formats = [name for name in ("WAV", "FLAC", "MP3") if name not in soundfile.available_formats()]
    if missing or formats:
        text = f"no decoder for {', '.join([*missing, *formats])}"
        return [Check("codecs", "fail", text, "install the wheels of av and soundfile from PyPI")]
    return [Check("codecs", "pass", f"{', '.join(wanted)}; WAV, FLAC, MP3 files")]


def check_recognizers() -> list[Check]:
    """Recognisers that evaluation may ask for, and the demo's voices."""
    uses = {
        "pocketsphinx": "the demo's recogniser",
        "espeakng_loader": "the demo's voices",
        "funasr": "Chinese (Paraformer)",
    }
    there = {name: importlib.util.find_spec(name) is not None for name in uses}
    have = [f"{name}: {uses[name]}" for name, found in there.items() if found]
    have.append("transformers: Whisper from a directory")
    missing = [name for name, found in there.items() if not found]
    if "pocketsphinx" in missing or "espeakng_loader" in missing:
        remedy = "pip install -e '.[demo]'"
        return [Check("speech", "warn", f"missing: {', '.join(missing)}", remedy)]
    return [Check("speech", "pass", "; ".join(have))]


def check_wandb(host: str = "api.wandb.ai", port: int = 443) -> list[Check]:
    """Whether the tracking service answers; runs are written offline and never wait for it."""
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError as error:
        text = f"{host} does not answer ({error}); runs are kept offline all the same"
        return [
            Check("W&B", "warn", text, "upload later from where it does: omni-train track sync")
        ]
    return [Check("W&B", "pass", f"{host} answers; runs are written offline first")]


def check_sources(sources: dict[str, str]) -> list[Check]:
    """Every shard root: its manifest, and the index of its first shard.

    Args:
        sources: directory or URL by name.
    """
    from omni_train.config.errors import ConfigError, DataError
    from omni_train.data.source import ShardSet

    found = []
    for name, path in sources.items():
        try:
            shards = ShardSet(name, path)
            shards.rows(0)
        except (ConfigError, DataError, OSError, IndexError) as error:
            remedy = "mend data.sources; indexes are made by omni-train data index"
            found.append(Check(f"data {name}", "fail", f"{path}: {error}", remedy))
            continue
        text = f"{path}: {len(shards.counts)} shards, {shards.num_samples:,} samples"
        found.append(Check(f"data {name}", "pass", text))
    return found


def judge_ranks(report: dict[str, Any]) -> list[Check]:
    """Judge what `launch.doctor_ranks` printed: bandwidth, clocks, software alike everywhere."""
    ranks: list[dict[str, Any]] = report["ranks"]
    hosts = sorted({rank["host"] for rank in ranks})
    where = "1 host" if len(hosts) == 1 else f"{len(hosts)} hosts"
    text = f"{len(ranks)} ranks on {where}, {ranks[0]['device']}"
    found = [Check("ranks", "pass", text)]
    if len({str(rank["packages"]) for rank in ranks}) > 1:
        by_host = {rank["host"]: rank["packages"] for rank in ranks}
        remedy = "install the same constraints.txt everywhere"
        found.append(Check("software", "fail", f"it differs: {by_host}", remedy))
    if report["bytes_per_s"] is None:
        return [*found, Check("all-reduce", "warn", "one rank has nobody to talk to", "--ranks 2")]
    rate, backend = float(report["bytes_per_s"]), report["backend"]
    slow = rate < _SLOW_RANKS["nccl" if "nccl" in backend else "gloo"]
    remedy = "check NVLink, the network cards and NCCL_DEBUG=INFO" if slow else ""
    text = f"{rate / 1e9:,.2f} GB/s on the bus ({backend})"
    found.append(Check("all-reduce", "warn" if slow else "pass", text, remedy))
    offsets = {rank["host"]: float(rank["offset_s"]) for rank in ranks}
    worst = max(offsets, key=lambda host: abs(offsets[host]))
    apart = abs(offsets[worst])
    status = "pass" if apart < _CLOCK_WARN_S else "warn" if apart < _CLOCK_FAIL_S else "fail"
    remedy = "" if status == "pass" else f"start a time service (chrony) on {worst}"
    text = f"at most {apart * 1e3:,.2f} ms apart ({worst})"
    return [*found, Check("clocks", status, text, remedy)]
