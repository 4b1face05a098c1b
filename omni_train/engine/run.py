"""The run directory: who owns it, what was started there, what happened, how it ended.

    config.yaml       as it was composed       fingerprint.json  identity of config, data and code
    resolved.yaml     without secrets          events.jsonl      the truth; all else is a view
    state.json        status and exit code     ledger.jsonl      samples that could not be used
    lock              one owner at a time      logs/rank-*.log   checkpoints/  quarantine/
    stacks/           of all ranks, if it hung

Only rank 0 writes here, apart from each rank's log, stacks and checkpoint files. Training is not
here.
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from omni_train.config.errors import ConfigError
from omni_train.engine.distributed import World, gather_json, init_distributed
from omni_train.engine.exit_codes import ExitCode, RunError, exit_code_of
from omni_train.engine.faults import Faults
from omni_train.engine.fingerprint import Identity, identity_of, plain, redact, redact_text
from omni_train.engine.lock import RunLock
from omni_train.engine.stop import StopRequest
from omni_train.tracking.config import TrackingConfig
from omni_train.tracking.events import JsonlWriter

log = logging.getLogger("omni_train")
_FINGERPRINT = "fingerprint.json"


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Where a run lives and what it is called.

    Args:
        dir: run directory; the same directory again resumes.
        experiment: name that groups the runs of several stages.
        seed: of Python, NumPy and torch, and of the data order.
        take_over: replace an owner of the directory on another machine that gives no sign of life.
        resume_allow: fingerprint keys (or their prefixes) that may differ on resume.
    """

    dir: str
    experiment: str = "default"
    seed: int = 0
    take_over: bool = False
    resume_allow: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.dir:
            raise ConfigError(
                key="run.dir",
                value=self.dir,
                rule="a run needs a directory of its own",
                remedy="give a path such as runs/my-run",
            )
        if self.seed < 0:
            raise ConfigError(
                key="run.seed",
                value=self.seed,
                rule="must not be negative",
                remedy="give 0 or more",
            )


@dataclass(slots=True)
class Run:
    """A run in progress, as the recipe and `fit` see it.

    Args:
        dir: run directory.
        world: this process among the ranks.
        config: the run's settings.
        stage: name of the recipe.
        identity: fingerprint that checkpoints carry.
        step: last finished global step.
        stop: whether this process was asked to stop.
        faults: what goes wrong on purpose.
    """

    dir: Path
    world: World
    config: RunConfig
    stage: str
    identity: Identity
    step: int = 0
    stop: StopRequest = field(default_factory=StopRequest)
    faults: Faults = field(default_factory=Faults)
    _started: float = field(default_factory=time.monotonic)
    _events: JsonlWriter | None = None
    _ledger: JsonlWriter | None = None
    _end: threading.Lock = field(default_factory=threading.Lock)
    _speaks: bool = False
    _state: str = ""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, or stands in for it."""
        return self.world.rank == 0 or self._speaks

    def claim_end(self) -> bool:
        """Return True to the one thread of this process that records how the run ends."""
        return self._end.acquire(blocking=False)

    def speak_for_rank_0(self) -> None:
        """Write events and state from here on, as rank 0 cannot."""
        if not self.is_main:
            self._speaks, self._events = True, JsonlWriter(self.dir / "events.jsonl")

    @property
    def checkpoints(self) -> Path:
        """Directory of the checkpoints."""
        return self.dir / "checkpoints"

    def event(self, kind: str, **fields: Any) -> None:
        """Append an event; ranks other than 0 may call it and write nothing."""
        if self._events is not None:
            elapsed = round(time.monotonic() - self._started, 6)
            stamp = {"kind": kind, "time": round(time.time(), 3), "elapsed_s": elapsed}
            self._events.write({**stamp, **fields})

    def say(self, *texts: str) -> None:
        """Log texts of one or more lines; ranks other than 0 may call it and stay silent."""
        if self.is_main:
            for text in texts:
                log.info("%s", text)

    def ledger(self, *, source: str, shard: str, key: str, reason: str) -> None:
        """Record a sample that was planned but not used; ranks other than 0 write nothing."""
        if self._ledger is not None:
            row = {"step": self.step, "source": source, "shard": shard, "key": key}
            self._ledger.write({**row, "reason": reason})

    def write_state(self, status: str, **fields: Any) -> None:
        """Replace `state.json` on rank 0; a reader never sees half of it."""
        if self.is_main:
            state = {"status": status, "stage": self.stage, "step": self.step, **fields}
            self._state = json.dumps(state, indent=1) + "\n"
            write_text_atomically(self.dir / "state.json", self._state)

    def has_stand_in(self) -> bool:
        """Return whether another rank has written the state that this one wrote before."""
        path = self.dir / "state.json"
        return bool(self._state) and path.read_text(encoding="utf-8") != self._state


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a file so that readers, and a crash, leave either the old or the new text."""
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch alike on every rank; the model is then built alike too."""
    # rich draws a number when it is imported, which torch does in the first step of any start: a
    # resumed run would be one ahead.
    import rich.style  # noqa: F401

    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)


@contextmanager
def start_run(
    config: RunConfig,
    *,
    stage: str,
    settings: object,
    typed: DictConfig | None = None,
    data_hashes: Mapping[str, str] | None = None,
    tracking: TrackingConfig | None = None,
) -> Iterator[Run]:
    """Open or resume a run directory, seed, start the process group, and record how the run ends.

    Args:
        config: directory, seed, names.
        stage: name of the recipe.
        settings: the recipe's whole typed config; secrets are redacted before it is written.
        typed: the config as composed, with its interpolations; kept in `config.yaml`.
        data_hashes: what identifies the data: a name and a hash per source.
        tracking: views to write at the end.

    Raises:
        RunError: another process owns the directory (exit code 73).
        ConfigError: no package for a view; or config, data or code are not the directory's.
    """
    views = _checked(tracking or TrackingConfig(wandb=False))
    world = init_distributed()
    run_dir = Path(config.dir).absolute()
    lock = RunLock(run_dir / "lock")
    _on_main(world, lambda: lock.acquire(config.experiment, take_over=config.take_over))
    run = Run(run_dir, world, config, stage, identity_of(settings, data_hashes or {}))
    try:
        _on_main(world, lambda: _check_identity(run))
    except BaseException:
        lock.release()
        raise
    handlers = _open_logs(run)
    with run.stop.listening():
        try:
            _on_main(world, lambda: _open(run, settings, typed))
            seed_everything(config.seed)
            with run.stop.ends_at_once():
                yield run
        except BaseException as error:
            _claim_end(run)
            ended = _as_stopped(run, error)
            record_failure(run, ended)
            if ended is error:
                raise
            raise ended from error
        else:
            _claim_end(run)
            run.event("run_end", status="done", step=run.step)
            run.write_state("done", exit_code=int(ExitCode.done), reason="")
        finally:
            if run.is_main:
                _write_views(run, settings, views)
            lock.release()
            for handler in handlers:
                log.removeHandler(handler)
                handler.close()


def _checked(tracking: TrackingConfig) -> TrackingConfig:
    """Refuse a view that cannot be written here, before anything is trained."""
    if tracking.tensorboard:
        from omni_train.tracking.tensorboard_view import check_installed

        check_installed()
    return tracking


def _on_main(world: World, action: Any) -> None:
    """Run `action` on rank 0 alone; every rank ends the same way where it fails."""
    failure: Exception | None = None
    if world.rank == 0:
        try:
            action()
        except Exception as error:  # noqa: BLE001  raised again below, on every rank
            failure = error
    codes = gather_json([int(exit_code_of(failure)), str(failure)] if failure else None)
    if failure is not None:
        raise failure
    if codes[0] is not None:
        raise RunError(ExitCode(codes[0][0]), codes[0][1])


def _check_identity(run: Run) -> None:
    """Refuse to resume another run, before anything that is recorded of it is touched."""
    recorded = run.dir / _FINGERPRINT
    if recorded.exists():
        before = Identity(**json.loads(recorded.read_text(encoding="utf-8")))
        run.identity.check_against(before, allow=run.config.resume_allow)


def _open(run: Run, settings: object, typed: DictConfig | None) -> None:
    recorded = run.dir / _FINGERPRINT
    resumed = recorded.exists()
    write_text_atomically(recorded, json.dumps(run.identity.as_dict(), indent=1) + "\n")
    resolved = redact(plain(settings))
    composed = (
        resolved if typed is None else redact(OmegaConf.to_container(typed, enum_to_str=True))
    )
    for name, content in (("config.yaml", composed), ("resolved.yaml", resolved)):
        write_text_atomically(run.dir / name, yaml.safe_dump(content, sort_keys=False))
    run._events = JsonlWriter(run.dir / "events.jsonl")
    run._ledger = JsonlWriter(run.dir / "ledger.jsonl")
    run.write_state("running", exit_code=None, reason="")
    run.event(
        "run_resume" if resumed else "run_start",
        stage=run.stage,
        experiment=run.config.experiment,
        run_id=f"{run.config.experiment}/{run.dir.name}",
        ranks=run.world.size,
        seed=run.config.seed,
        versions=run.identity.versions,
    )


class _Redacting(logging.Formatter):
    """Keeps secrets out of every line, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return redact_text(super().format(record))


def _open_logs(run: Run) -> list[logging.Handler]:
    folder = run.dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [
        logging.FileHandler(folder / f"rank-{run.world.rank:05d}.log", encoding="utf-8")
    ]
    if run.is_main:
        terminal = logging.StreamHandler()
        terminal.setLevel(logging.INFO)
        handlers.append(terminal)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    formatter = _Redacting("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
    for handler in handlers:
        handler.setFormatter(formatter)
        log.addHandler(handler)
    return handlers


def _as_stopped(run: Run, error: BaseException) -> BaseException:
    """Return what ended the run: where ranks were asked to stop, the others lose their peers."""
    if run.stop.name and exit_code_of(error) is ExitCode.bug:
        reason = f"asked to stop by {run.stop.name}; not saved: {type(error).__name__}: {error}"
        return RunError(ExitCode.preempted, reason)
    return error


def _claim_end(run: Run) -> None:
    """Go on to the end, or wait for it where the watchdog ends this process."""
    if not run.claim_end():
        threading.Event().wait()


def record_failure(run: Run, error: BaseException) -> None:
    """Log and record what ended a run; ranks other than 0 only log it.

    Where another rank stood in for a rank 0 that came back late, what it recorded holds.
    """
    if run.has_stand_in():
        return
    code = exit_code_of(error)
    reason = redact_text(f"{type(error).__name__}: {error}")
    status = "preempted" if code is ExitCode.preempted else "failed"
    log.error("run %s at step %d: %s", status, run.step, reason)
    log.debug("where it failed", exc_info=error)
    run.event("run_end", status=status, step=run.step, exit_code=int(code), reason=reason)
    run.write_state(status, exit_code=int(code), reason=reason)


def _write_views(run: Run, settings: object, tracking: TrackingConfig) -> None:
    """Write the views; a view that fails is reported and costs the run nothing."""

    def wandb() -> None:
        from omni_train.tracking.wandb_view import write_wandb

        write_wandb(run.dir, project=tracking.project, config=redact(plain(settings)))

    def tensorboard() -> None:
        from omni_train.tracking.tensorboard_view import write_tensorboard

        write_tensorboard(run.dir)

    for view, wanted in ((wandb, tracking.wandb), (tensorboard, tracking.tensorboard)):
        if not wanted or run._events is None:
            continue
        try:
            view()
        except Exception as error:  # noqa: BLE001  a view must never harm the run
            log.warning("no %s view: %s: %s", view.__name__, type(error).__name__, error)
            reason = f"{type(error).__name__}: {error}"
            run.event("view_failed", view=view.__name__, reason=reason)
    for writer in (run._events, run._ledger):
        if writer is not None:
            writer.close()
