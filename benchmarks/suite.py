"""The rows of the table, which script takes each, and running them one after the other.

Every script runs in a process of its own, so that no row inherits another's threads, memory or
imports; each prints its own table too: `python -m benchmarks.MODULE [--json]`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.report import MISSED, NO_GPU, NO_TORCHVISION, NOT_TAKEN

REPO = Path(__file__).resolve().parents[1]
# Seconds after which a script is ended. The twelve CPU rows take 20 minutes at most together, the
# seven GPU rows ten.
LIMIT_S = {"B": 400, "G": 85}


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One row of the table.

    Args:
        module: of this package, which takes it.
        what: is measured.
        peer: whom it is held against.
        torchvision: the peer needs it; see b03_encode.py.
    """

    module: str
    what: str
    peer: str
    torchvision: bool = False


BENCHMARKS = {
    "B1": Benchmark("b01_positions", "TMRoPE ids", "transformers' get_rope_index"),
    "B2": Benchmark("b02_mel", "log-mel frames", "transformers' feature extractor"),
    "B3": Benchmark("b03_encode", "a sample to tensors", "Qwen2_5OmniProcessor", torchvision=True),
    "B4": Benchmark("b04_packing", "tokens/s of a tiny Thinker", "transformers, padded or packed"),
    "B5": Benchmark("b05_balance", "load balance over ranks", "random, grouped by length"),
    "B6": Benchmark("b06_loss", "loss over 152,064 ids", "ForCausalLMLoss"),
    "B7": Benchmark("b07_read", "reading shards", "webdataset"),
    "B8": Benchmark("b08_resume", "first batch after resume", "Trainer's skip, webdataset"),
    "B9": Benchmark("b09_video", "frames of a clip", "PyAV, reading on and seeking"),
    "B10": Benchmark("b10_preference", "a DPO step", "trl.DPOTrainer"),
    "B11": Benchmark("b11_save", "saving and restoring", "torch.save, safetensors, DCP"),
    "B12": Benchmark("b12_trainer", "overhead of the loop", "Trainer, Accelerate"),
    "G1": Benchmark("g1_layers", "language layers and head", "a large product, transformers"),
    "G2": Benchmark("g2_memory", "memory of a token", "transformers"),
    "G3": Benchmark("g3_loss", "loss over 152,064 ids", "a large product, whole logits"),
    "G4": Benchmark("g4_syncs", "host waits and busy share", "transformers"),
    "G5": Benchmark("g5_towers", "vision and audio tower", "a large product, transformers"),
    "G6": Benchmark("g6_decode", "codes/s of the Talker", "a large copy, transformers' generate"),
    "G7": Benchmark("g7_stage1", "stage 1 end to end", "a large product"),
}


def measure(
    row: str, *, pairs: int | None = None, torchvision: Path | None = None
) -> dict[str, Any]:
    """Run one row's script and return its JSON with load, seconds and exit status.

    Args:
        row: such as B1.
        pairs: timed pairs; the script's own number where left out.
        torchvision: directory of a torchvision that only rows see whose peer needs one.
    """
    environment = dict(os.environ)
    if torchvision and BENCHMARKS[row].torchvision:
        before = environment.pop("PYTHONPATH", "")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [before, str(torchvision)]))
    command = [sys.executable, "-m", f"benchmarks.{BENCHMARKS[row].module}", "--json"]
    if pairs:
        command += ["--pairs", str(pairs)]
    load, start = os.getloadavg()[0], time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=REPO,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            timeout=LIMIT_S[row[0]],
        )
        # A peer's library may have printed before it; a script that fell prints none.
        last = (done.stdout.splitlines() or [""])[-1]
        fallen = _nothing(f"the script ended with {done.returncode}; its message is above")
        found: dict[str, Any] = json.loads(last) if last.startswith("{") else fallen
    except subprocess.TimeoutExpired:
        found = _nothing(f"it ran past {LIMIT_S[row[0]]} s")
    found["seconds"] = round(time.monotonic() - start, 1)
    # Processes that wanted a core, the benchmark itself included.
    found["load"] = [round(load, 1), round(os.getloadavg()[0], 1)]
    return found


def _missing(row: str, torchvision: Path | None) -> str:
    """Say what a row needs and this machine lacks, before its script has imported everything."""
    if row.startswith("G"):
        import torch  # late: the other rows need it in their own processes alone

        return "" if torch.cuda.is_available() else NO_GPU
    lacking = BENCHMARKS[row].torchvision and not (torchvision or find_spec("torchvision"))
    return NO_TORCHVISION if lacking else ""


def _nothing(reason: str) -> dict[str, Any]:
    return {"rows": [], "notes": [], "versions": {}, "not_taken": reason}


def run(
    rows: Sequence[str], *, pairs: int | None = None, torchvision: Path | None = None
) -> dict[str, Any]:
    """Measure the rows in turn; tell progress on stderr; return the JSON of all; see `measure`.

    Returns:
        `rows`: one item for each line of the table, `row` being its name (B1); `benchmarks`: by
        row its notes, versions, seconds, load before and after, and `not_taken` where nothing
        could be measured; `cores`, `seconds`.
    """
    lines: list[dict[str, Any]] = []
    benchmarks: dict[str, Any] = {}
    for row in rows:
        entry = BENCHMARKS[row]
        print(f"{row}: {entry.what} ...", end="", file=sys.stderr, flush=True)
        if missing := _missing(row, torchvision):
            found = {**_nothing(missing), "seconds": 0.0, "load": []}
        else:
            found = measure(row, pairs=pairs, torchvision=torchvision)
        said = found.get("not_taken") or f"{len(found['rows'])} lines"
        print(f" {said}, {found['seconds']:.0f} s", file=sys.stderr, flush=True)
        lines += [{"row": row, **line} for line in found.pop("rows")]
        benchmarks[row] = found
    return _record(lines, benchmarks)


def joined(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON of both, in the order of the table; a row of `after` replaces `before`'s."""
    found = before["benchmarks"] | after["benchmarks"]
    kept = [line for line in before["rows"] if line["row"] not in after["benchmarks"]]
    order = list(BENCHMARKS)
    lines = sorted([*kept, *after["rows"]], key=lambda line: order.index(line["row"]))
    return _record(lines, {row: found[row] for row in order if row in found})


def _record(lines: list[dict[str, Any]], benchmarks: dict[str, Any]) -> dict[str, Any]:
    seconds = sum(found["seconds"] for found in benchmarks.values())
    record = {"rows": lines, "benchmarks": benchmarks}
    return record | {"cores": os.cpu_count(), "seconds": round(seconds, 1)}


def status_of(record: dict[str, Any]) -> int:
    """Return 66 where a row was not taken, 1 where a goal was missed, else 0."""
    if any("not_taken" in found for found in record["benchmarks"].values()):
        return NOT_TAKEN
    return MISSED if any(line["pass"] is False for line in record["rows"]) else 0
