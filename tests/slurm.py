"""A real SLURM of two nodes on this machine, started for a test and stopped after it.

Debian's packages, installed where root may; two slurmd with names and ports of their own.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
PACKAGES = ("slurm-wlm", "munge")
_START_S = 60.0

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=5
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True, slots=True)
class Slurm:
    """A cluster that runs.

    Args:
        folder: its state, keys and logs.
        environment: in which its commands find it.
    """

    folder: Path
    environment: dict[str, str]

    def ask(self, *command: str) -> str:
        """Run a command of SLURM and return what it prints."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout

    def state(self, job: str) -> str:
        """State of a job, such as RUNNING."""
        shown = self.ask("scontrol", "show", "job", job)
        return shown.partition("JobState=")[2].split()[0]

    def wait(self, job: str, *states: str, limit_s: float = 300.0) -> str:
        """Wait until a job has one of the states; return it."""
        end = time.monotonic() + limit_s
        while (state := self.state(job)) not in states:
            assert time.monotonic() < end, (job, state, self.logs())
            time.sleep(0.5)
        return state

    def logs(self) -> str:
        """The last lines of every daemon, for a message."""
        return "\n".join(
            f"{path.name}: {path.read_text(errors='replace')[-1500:]}"
            for path in sorted(self.folder.glob("*.log"))
        )


def _install() -> None:
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip(f"no {missing[0]}, and only root can install Debian's {PACKAGES[0]}")
    quiet = ("apt-get", "-y", "-qq", "--no-install-recommends")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (("apt-get", "update", "-qq"), (*quiet, "install", *PACKAGES)):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"{PACKAGES[0]} cannot be installed here: {done.stderr.strip()[-200:]}")


def _path() -> str:
    return os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _until(condition: object, what: str, slurm: Slurm) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        with suppress(subprocess.CalledProcessError):
            if condition():  # type: ignore[operator]
                return
        time.sleep(0.3)
    raise AssertionError(f"{what}\n{slurm.logs()}")


@contextmanager
def two_nodes(folder: Path) -> Iterator[Slurm]:
    """Start munged, slurmctld and two slurmd in the foreground; stop them at the end."""
    if {name for _, name in socket.if_nameindex()} == {"lo"}:
        pytest.skip("SLURM binds to no port where there is no network beside loopback")
    _install()
    folder.mkdir(parents=True)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    text = _CONF.format(
        host=socket.gethostname().split(".")[0], ports=_free_ports(3), user=user, folder=folder
    )
    (folder / "slurm.conf").write_text(text)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    slurm = Slurm(folder, environment)
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    commands = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge],
        ["slurmctld", "-D", "-f", f"{folder}/slurm.conf"],
        *(["slurmd", "-D", "-N", name, "-f", f"{folder}/slurm.conf"] for name in ("n1", "n2")),
    ]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            with (folder / f"{command[0]}-out.log").open("ab") as output:
                daemons.append(
                    subprocess.Popen(command, env=environment, stdout=output, stderr=output)
                )
            if command[0] == "munged":
                _until((folder / "munge.socket").exists, "munged does not start", slurm)
        _until(
            lambda: slurm.ask("sinfo", "--noheader", "--format=%T").split() == ["idle"],
            "the nodes do not come up",
            slurm,
        )
        yield slurm
    finally:
        with suppress(subprocess.SubprocessError):
            slurm.ask("scancel", "--user", user, "--signal=KILL", "--full")
            slurm.ask("scancel", "--user", user)
            time.sleep(1)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=10)
            daemon.kill()
