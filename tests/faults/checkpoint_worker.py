"""Attacks on checkpoints under the real engine; started by test_checkpoints.py on 1 or 2 ranks.

    python checkpoint_worker.py OUT SCENARIO...

Rank 0 writes OUT/<scenario>.json. The toy model, its loader and `train` are engine_worker.py's.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from omni_train.engine import checkpoint, shards
from omni_train.engine import checkpoint_files as files
from omni_train.engine.checkpoint import CheckpointWriter, restore_latest
from omni_train.engine.deepspeed import Engine, Precision
from omni_train.engine.distributed import barrier, gather_json, get_world, init_distributed
from omni_train.engine.exit_codes import RunError, exit_code_of, leave
from omni_train.engine.hashing import group_hashes
from omni_train.engine.run import Run, RunConfig, start_run
from omni_train.tracking.events import JsonlWriter, read_jsonl
from tests.numerics.engine_worker import build, train

_SYSTEM_CALLS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")


def at(run: Run, folder: Path) -> Run:
    """The same run with another directory and an event log of its own there."""
    log = JsonlWriter(folder / "attack.jsonl") if run.is_main else None
    return dataclasses.replace(run, dir=folder, _events=log)


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_jsonl(folder / "attack.jsonl") if event["kind"] == kind]


def copy(base: Path, folder: Path) -> Path:
    if get_world().rank == 0:
        shutil.copytree(base, folder)
    barrier()
    return folder


def advance(engine: Engine) -> None:
    """Make the state of another step: every master weight and moment is another one."""
    for group in engine.trained:
        for _, param in group.params:
            piece = shards.piece_of(param, rank=get_world().rank, world_size=get_world().size)
            if piece.length:
                values = {"master": shards.master(param, piece) + 1}
                values |= {key: shards.moment(param, piece, key) + 1 for key in shards.MOMENTS}
                shards.write_trained(param, piece, values)
    engine.step += 1


def save(engine: Engine, run: Run, *, keep: int = 2) -> None:
    with CheckpointWriter(engine, run, keep=keep) as writer:
        writer.save(loader_state={"step": engine.step}, metrics={})


class Bomb:
    """Kills this process at write point number `point` of whatever it does next."""

    def __init__(self, point: int) -> None:
        self._left = point
        for name in _SYSTEM_CALLS:
            setattr(os, name, self._around(getattr(os, name)))
        checkpoint.save_file = self._torn(checkpoint.save_file, place=1)
        pathlib.Path.write_text = self._torn(pathlib.Path.write_text, place=0)

    def _pass(self) -> None:
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1

    def _around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            self._pass()
            result = call(*args, **options)
            self._pass()
            return result

        return wrapped

    def _torn(self, call: Callable[..., Any], *, place: int) -> Callable[..., Any]:
        """Before the file is written, with half of it, and with all of it."""

        def wrapped(*args: Any, **options: Any) -> Any:
            self._pass()
            result = call(*args, **options)
            if self._left == 0:
                path = Path(args[place])
                os.truncate(path, path.stat().st_size // 2)
            self._pass()
            self._pass()
            return result

        return wrapped


def in_child(action: Callable[[], Any]) -> int:
    """Run `action` in a copy of this process; return its status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException as error:  # noqa: BLE001  becomes the status
            os._exit(int(exit_code_of(error)))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def base_run(out: Path, run: Run, engine: Engine, *, first: bool) -> tuple[Path, dict[int, Any]]:
    """Steps 1 and 2 saved, and the hashes of steps 2 and 3; the engine is left at step 3.

    Without `first` there is no checkpoint, so that the frozen weights are to be written too.
    """
    base = out / ("base" if first else "empty")
    (base / "checkpoints").mkdir(parents=True, exist_ok=True)
    hashes: dict[int, Any] = {}
    for step in (1, 2, 3):
        advance(engine)
        hashes[step] = group_hashes(engine)
        if first and step < 3:
            save(engine, at(run, base))
    return base, hashes


def kills(out: Path) -> dict[str, Any]:
    """Kill a save at each of its write points in turn, with and without older checkpoints."""
    results: dict[str, Any] = {}
    with start_run(RunConfig(dir=str(out / "run")), stage="toy", settings=RunConfig(dir="x")) as r:
        for name in ("later", "first"):
            engine = build(3, Precision.fp32)
            base, hashes = base_run(out, r, engine, first=name == "later")
            results[name] = rows = []
            for point in itertools.count():
                folder = copy(base, out / f"{name}-{point}")
                run = at(r, folder)

                def attack(point: int = point, run: Run = run, engine: Engine = engine) -> None:
                    engine.frozen_hash = ""
                    Bomb(point)
                    save(engine, run)

                status = in_child(attack)
                if status == 0:
                    break
                state = restore_latest(engine, run)
                step = 0 if state is None else int(state["step"])
                left = [p.name for p in (folder / "checkpoints").iterdir() if ".tmp-" in p.name]
                moved = len(list((folder / "quarantine").glob("*")))
                same = step == 0 or group_hashes(engine) == hashes[step]
                rows.append([status, step, same, left, moved])
                while engine.step < 3:
                    advance(engine)
                shutil.rmtree(folder)
    return results


def disk(out: Path) -> dict[str, Any]:
    """No room: a limit on the size of files, and a disk that is full, where one can be made."""
    results: dict[str, Any] = {}
    with start_run(RunConfig(dir=str(out / "run")), stage="toy", settings=RunConfig(dir="x")) as r:
        engine = build(3, Precision.fp32)
        base, _ = base_run(out, r, engine, first=True)
        limited = at(r, copy(base, out / "limited"))

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            save(engine, limited)

        results["limited"] = in_child(limit)
        results["limited-left"] = sorted(p.name for p in limited.checkpoints.glob("*-*"))
        small = Path(os.environ.get("SMALL_DISK", ""))
        if small.is_dir() and small != Path():
            results |= full(engine, r, base, small)
    return results


def full(engine: Engine, run: Run, base: Path, small: Path) -> dict[str, Any]:
    """On a disk of 64 KiB: first it fits once the older checkpoint is gone, then not at all."""
    shutil.copytree(base, small / "run")
    here = at(run, small / "run")
    filler = small / "filler"
    with filler.open("wb") as file:
        free = shutil.disk_usage(small).free
        file.write(bytes(free - 2 * 4096))
    try:
        save(engine, here)
        first = "saved"
    except RunError as error:
        first = f"{int(error.code)} {error}"
    left = sorted(p.name for p in here.checkpoints.glob("step-*"))
    files.prune(here.checkpoints, keep=1)
    with filler.open("ab") as file:
        file.write(bytes(shutil.disk_usage(small).free))
    advance(engine)
    try:
        save(engine, here)
        second = "saved"
    except RunError as error:
        second = f"{int(error.code)} {error}"
    restored = restore_latest(engine, here)
    assert restored is not None
    return {"first": first, "left": left, "second": second, "restored": restored["step"]}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


def beside(out: Path) -> dict[str, Any]:
    """A slow disk: training goes on, and what is saved is the state at the save all the same."""
    quick = files.fsync

    def slow(path: Path) -> None:
        time.sleep(0.2)
        quick(path)

    files.fsync = slow
    first = train(out / "slow", save_steps=2, max_steps=5)
    files.fsync = quick
    log = list(read_jsonl(out / "slow" / "events.jsonl"))
    order = [[event["kind"], event["step"]] for event in log if event["kind"] in ("step", "save")]
    waits = [[e["blocked_s"], e["seconds"]] for e in log if e["kind"] == "save"]
    shutil.rmtree(out / "slow" / "checkpoints" / "step-5")
    train(out / "slow", save_steps=2, max_steps=5)
    starts = [e for e in read_jsonl(out / "slow" / "events.jsonl") if e["kind"] == "fit_start"]
    resumed = [starts[1]["step"], starts[1]["hashes"] == first["hashes"][4]]
    return {"order": order, "waits": waits, "resumed": resumed}


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flip": _flip,
    "truncate": lambda path: os.truncate(path, path.stat().st_size - 8),
    "delete": lambda path: path.unlink(),
}


def damage(out: Path) -> dict[str, Any]:
    """Damage each file of the newest of two checkpoints in turn, and restore on all ranks."""
    rows: list[Any] = []
    with start_run(RunConfig(dir=str(out / "run")), stage="toy", settings=RunConfig(dir="x")) as r:
        engine = build(3, Precision.fp32)
        base, hashes = base_run(out, r, engine, first=True)
        barrier()
        names = [path.relative_to(base) for path in sorted((base / "checkpoints").rglob("*.*"))]
        wanted = [name for name in names if "step-2" in str(name) or "frozen" in str(name)]
        for name, kind in itertools.product(gather_json([str(n) for n in wanted])[0], DAMAGES):
            folder = copy(base, out / f"{kind}-{name.replace('/', '-')}")
            if get_world().rank == 0:
                DAMAGES[kind](folder / name)
            barrier()
            engine.frozen_hash = ""
            state = restore_latest(engine, at(r, folder))
            assert state is not None
            steps = gather_json(state["step"])
            same = gather_json(group_hashes(engine) == hashes[steps[0]])
            bad = events_of(folder, "checkpoint_bad") if get_world().rank == 0 else []
            said = [[event["checkpoint"], event["file"], event["reason"]] for event in bad]
            rows.append([name, kind, steps, all(same), said])
        # For `checkpoint convert`: the same weights in DeepSpeed's own files and in ours.
        while engine.step < 3:
            advance(engine)
        engine.model.save_checkpoint(str(out.parent / "deepspeed"))
        (out.parent / "ours").mkdir(exist_ok=True)
        save(engine, at(r, out.parent / "ours"))
    return {"rows": rows}


CHAIN = {"save_steps": 1, "micro_steps": 2}


def chain(out: Path, part: str, stop_at: int) -> dict[str, Any]:
    """One part of a run that goes from two ranks to one and back; two groups, a frozen layer."""
    home = out.parent / "chain"
    results = {}
    for precision in Precision:
        name = precision.name
        if part == "first":
            results[f"{name}-straight"] = train(home / f"{name}-s", precision=precision, **CHAIN)
        options: dict[str, Any] = {"precision": precision, "stop_at": stop_at, **CHAIN}
        results[name] = train(home / name, **options)
    return results


SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "kills": kills,
    "disk": disk,
    "beside": beside,
    "damage": damage,
    "chain-first": lambda out: chain(out, "first", 3),
    "chain-alone": lambda out: chain(out, "alone", 6),
    "chain-back": lambda out: chain(out, "back", 0),
}


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    world = init_distributed()
    for name in sys.argv[2:]:
        (out / name).mkdir(parents=True, exist_ok=True)
        result = SCENARIOS[name](out / name)
        if world.rank == 0:
            (out / f"{name}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
    leave(0)
