"""The run directory: lock, fingerprint, states and exit codes, redaction, the key hash."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from omni_train.config.errors import ConfigError, DataError
from omni_train.engine.distributed import gather_json, sum_over_ranks
from omni_train.engine.exit_codes import ExitCode, RunError, exit_code_of
from omni_train.engine.fingerprint import Identity
from omni_train.engine.hashing import keys_hash
from omni_train.engine.heartbeat import Heartbeat, beats
from omni_train.engine.lock import RunLock
from omni_train.engine.run import RunConfig, start_run
from omni_train.tracking.events import read_jsonl

PROJECT = Path(__file__).parents[3]


class Color(Enum):
    red = "red"


@dataclass(kw_only=True, slots=True)
class Settings:
    width: int = 4
    color: Color = Color.red
    api_key: str = "hunter2"
    tracking: dict[str, int] = field(default_factory=dict)


def start(folder: Path, settings: Settings, **options: object) -> list[str]:
    config = RunConfig(dir=str(folder), **options)  # type: ignore[arg-type]
    typed = OmegaConf.create({"width": "${other}", "other": 4, "api_key": "hunter2"})
    with start_run(config, stage="toy", settings=settings, typed=typed) as run:
        run.step = 7
        run.event("hello", value=float("inf"))
    return [event["kind"] for event in read_jsonl(folder / "events.jsonl")]


def test_a_run_tells_its_whole_truth(tmp_path: Path) -> None:
    assert start(tmp_path, Settings()) == ["run_start", "hello", "run_end"]
    state = json.loads((tmp_path / "state.json").read_text())
    assert (state["status"], state["exit_code"], state["step"]) == ("done", 0, 7)
    resolved = yaml.safe_load((tmp_path / "resolved.yaml").read_text())
    assert resolved == {"width": 4, "color": "red", "api_key": "***", "tracking": {}}
    typed = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert typed == {"width": "${other}", "other": 4, "api_key": "***"}
    identity = json.loads((tmp_path / "fingerprint.json").read_text())
    assert identity["config"]["width"] == 4
    assert "omni_train/engine/run.py" in identity["code"]
    assert "torch" in identity["versions"]
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or "hunter2" not in path.read_text()


def test_resume_lists_what_changed_and_leaves_the_run_alone(tmp_path: Path) -> None:
    start(tmp_path, Settings())
    before = {p: p.read_bytes() for p in tmp_path.glob("*.*")}
    with pytest.raises(ConfigError, match="width: 4 -> 5"):
        start(tmp_path, Settings(width=5))
    assert {p: p.read_bytes() for p in tmp_path.glob("*.*")} == before
    assert start(tmp_path, Settings(tracking={"a": 1}))[3:] == ["run_resume", "hello", "run_end"]
    start(tmp_path, Settings(width=5), resume_allow=["width"])


def test_fingerprint_covers_config_data_code_and_versions() -> None:
    old = Identity(
        config={"fit.max_steps": 1, "a": 1},
        data={"s": "x"},
        code={"f.py": "1"},
        versions={"v": "1"},
    )
    new = Identity(config={"fit.max_steps": 2}, data={"s": "y"}, code={}, versions={"v": "2"})
    with pytest.raises(ConfigError) as caught:
        new.check_against(old, allow=["fit"])
    message = str(caught.value)
    for part in ("a: 1 -> None", "data.s: 'x' -> 'y'", "code.f.py: '1' -> None", "versions.v"):
        assert part in message
    assert "max_steps" not in message
    new.check_against(old, allow=["fit", "a", "data", "code", "versions"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RunError(ExitCode.non_finite, "x"), 76),
        (ConfigError(key="k", value=1, rule="r", remedy="m"), 2),
        (DataError("truncated", "x"), 65),
        (FileNotFoundError("x"), 66),
        (OSError(errno.ENOSPC, "full"), 74),
        (ZeroDivisionError(), 70),
    ],
)
def test_failures_end_in_their_exit_code(tmp_path: Path, error: Exception, code: int) -> None:
    assert exit_code_of(error) == code
    with (
        pytest.raises(type(error)),
        start_run(RunConfig(dir=str(tmp_path)), stage="toy", settings=Settings()),
    ):
        raise error
    state = json.loads((tmp_path / "state.json").read_text())
    assert (state["status"], state["exit_code"]) == ("failed", code)
    assert type(error).__name__ in state["reason"]
    assert "Traceback" in (tmp_path / "logs" / "rank-00000.log").read_text()
    RunLock(tmp_path / "lock").acquire("free again")


HOLD = """
import sys, time
from pathlib import Path
from omni_train.engine.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire("first")
print("held", flush=True)
time.sleep(60)
"""


def test_second_owner_is_refused_and_a_dead_one_replaced(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match=f"process {holder.pid} on .*'first'") as caught:
            RunLock(path).acquire("second")
        assert caught.value.code is ExitCode.locked
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    mine = RunLock(path)
    mine.acquire("second")
    assert json.loads(path.read_text())["pid"] == os.getpid()
    mine.release()


def test_another_host_keeps_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "run": "far"}))
    with pytest.raises(RunError, match="on elsewhere"):
        RunLock(path).acquire("near")


def test_a_dead_host_is_replaced_when_asked_and_a_living_one_never(tmp_path: Path) -> None:
    path, beat = tmp_path / "lock", tmp_path / "lock.beat"
    far = json.dumps({"host": "elsewhere", "pid": 1, "run": "far"})
    path.write_text(far)
    heart = Heartbeat(beat, beat_s=0.02)
    with pytest.raises(RunError, match="gives signs of life") as caught:
        RunLock(path).acquire("near", take_over=True, watch_s=5.0)
    assert caught.value.code is ExitCode.locked
    heart.stop()
    # It died: the last count stays, and nothing follows.
    beat.write_text("41\n")
    with pytest.raises(RunError, match=r"run\.take_over=true"):
        RunLock(path).acquire("near", take_over=False)
    with pytest.raises(RunError, match="delete lock there"):
        RunLock(path).acquire("near")
    assert path.read_text() == far
    mine = RunLock(path)
    mine.acquire("near", take_over=True, beat_s=0.02, watch_s=0.2)
    assert json.loads(path.read_text())["run"] == "near"
    assert beats(beat, watch_s=5.0)
    mine.release()
    assert not beat.exists()
    assert not beats(beat, watch_s=0.1)


def test_key_hash_depends_on_the_multiset_alone() -> None:
    parts = [["a", "b"], ["c", "a"]]
    whole = keys_hash(["c", "a", "a", "b"])
    assert sum(keys_hash(part) for part in parts) % (1 << 64) == whole
    assert keys_hash(["a", "b", "c"]) != whole
    assert keys_hash([]) == 0


def test_json_exchange_keeps_floats() -> None:
    value = {"x": [0.1, float("inf")], "y": "text"}
    assert gather_json(value) == [value]
    assert sum_over_ranks([3, -4]) == [3, -4]
