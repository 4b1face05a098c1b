"""Times of a step with and without waiting; faults on purpose that are refused, inert, or real."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from omni_train.config.errors import ConfigError
from omni_train.engine.distributed import World
from omni_train.engine.faults import FaultConfig, FaultKind, FaultPhase, Faults
from omni_train.engine.fit_config import FitConfig
from omni_train.engine.phases import Phases, waits
from omni_train.engine.progress import log_step
from omni_train.engine.run import RunConfig, start_run
from omni_train.engine.stragglers import spread
from omni_train.tracking.events import read_steps
from tests.unit.engine.test_spikes import ITEM, verdict

WORLD = World(rank=1, size=2, local_rank=1, device=torch.device("cpu"))


def fault(kind: FaultKind, **settings: object) -> FaultConfig:
    return FaultConfig(kind=kind, step=3, rank=1, **settings)  # type: ignore[arg-type]


def test_what_is_waited_for_is_no_work_of_this_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    phases = Phases(Faults())
    phases.next_step(1)
    with phases.part("forward"):
        time.sleep(0.05)
        monkeypatch.setattr(waits, "seconds", waits.seconds + 0.04)
    assert phases.seconds["forward"] >= 0.05
    assert phases.own["forward"] == pytest.approx(phases.seconds["forward"] - 0.04)
    with phases.part("update"):
        pass
    updated = phases.own["update"]
    entered, place = phases.place.entered, phases.place
    assert (place.phase, place.step) == ("after update", 1)
    phases.next_step(2)
    # The update is reported with the next step; everything else begins anew.
    assert phases.own == {"update": updated}
    assert phases.seconds == {}
    assert phases.place.entered > entered
    assert phases.first_step == 1


def test_the_slowest_rank_is_named() -> None:
    found = spread([{"data": 0.1, "forward": 0.1}, {"data": 0.1}, {"forward": 0.9}])
    assert found == {"min": 0.1, "median": 0.2, "max": 0.9, "slowest": 2}


def test_rank_0_alone_measures_the_machine(tmp_path: Path) -> None:
    config, told = RunConfig(dir=str(tmp_path)), verdict(2.0)
    told.metrics, told.own = {"loss_source/a": 3.0}, [{"forward": 0.5}, {"forward": 0.1}]
    phases = Phases(Faults())
    phases.next_step(1)
    phases.seconds["forward"] = 0.5
    with start_run(config, stage="toy", settings=config) as run:
        figures = log_step(run, ITEM, told, {"llm": 0.1}, phases, log_steps=1)
        # Where this one runs there may be no such directory.
        other = replace(run, world=WORLD, dir=tmp_path / "gone", _events=None)
        assert log_step(other, ITEM, told, {"llm": 0.1}, phases, log_steps=1) == figures
    assert figures == {"loss": 2.0, "loss_source/a": 3.0}
    (step,) = read_steps(tmp_path / "events.jsonl")
    assert (step["rank_seconds"]["slowest"], step["disk_free_gib"] >= 0) == (0, True)
    line = "step 0 loss 2.0000 norm 1 18 tok/s, ranks 0.1 / 0.3 / 0.5 s, slowest 0"
    assert line in (tmp_path / "logs" / "rank-00000.log").read_text()


def test_faults_that_cannot_happen_are_refused() -> None:
    for key, value in (("step", 0), ("rank", -1), ("seconds", -1.0)):
        with pytest.raises(ConfigError) as found:
            FaultConfig(**{key: value})
        assert found.value.key == f"fit.fault.{key}"
    with pytest.raises(ConfigError, match="never reached"):
        FitConfig(max_steps=2, fault=fault(FaultKind.kill))
    with pytest.raises(ConfigError, match="there are 2 ranks"):
        Faults(FaultConfig(kind=FaultKind.kill, rank=2), WORLD)


def test_other_ranks_steps_and_phases_see_nothing() -> None:
    loss = torch.tensor(2.0)
    elsewhere = World(rank=0, size=2, local_rank=0, device=torch.device("cpu"))
    for faults in (Faults(), Faults(fault(FaultKind.poison), elsewhere)):
        assert faults.poisoned(loss, 3) is loss
    mine = Faults(fault(FaultKind.hang, phase=FaultPhase.backward), WORLD)
    for phase, step in (("backward", 2), ("backward", 4), ("forward", 3)):
        with mine.during(phase, step):
            pass
    assert torch.isnan(Faults(fault(FaultKind.poison), WORLD).poisoned(loss, 3))


def test_a_full_disk_refuses_real_writes_and_only_while_it_is_full(tmp_path: Path) -> None:
    faults = Faults(fault(FaultKind.disk), WORLD)
    tensors, before = {"x": torch.zeros(10_000)}, resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(Exception, match="File too large"), faults.during("save", 3):
        save_file(tensors, str(tmp_path / "x"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before
    save_file(tensors, str(tmp_path / "x"))


@pytest.mark.parametrize("kind", ["kill", "stop"])
def test_signals_are_real(kind: str) -> None:
    code = (
        "import torch\n"
        "from omni_train.engine.distributed import World\n"
        "from omni_train.engine.faults import FaultConfig, FaultKind, Faults\n"
        "world = World(0, 1, 0, torch.device('cpu'))\n"
        f"faults = Faults(FaultConfig(kind=FaultKind.{kind}), world)\n"
        "with faults.during('forward', 1): print('inside', flush=True)\n"
        "print('after')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    sent = signal.SIGKILL if kind == "kill" else signal.SIGTERM
    assert done.returncode == -sent, done.stderr
    # A kill comes inside the block, which never ends.
    assert done.stdout == ("inside\n" if kind == "kill" else "")
