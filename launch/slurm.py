"""A stage as a SLURM job, a chain as jobs that wait for each other.

One readable script per stage. srun starts its `node` part once on every node, which becomes that
node's torchrun. Before the job's time ends, or on `scancel --signal=USR1`, SLURM signals every
process of the step: the ranks save and end, and the script has the job queued again where
`state.json` says preempted, under the same number, so that what waits for it goes on waiting.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from launch.cluster import ClusterConfig, Runtime, code_files, job_name
from launch.local import measured_stop_s
from launch.stages import REPO
from omni_train.config.errors import ConfigError

SCRIPT_NAME = "job.sbatch"
RECORD_NAME = "job.json"
# What a job keeps of the environment that it is submitted from, beside secrets.
_KEPT = ("HOME", "USER", "LANG", "PATH")

_TEMPLATE = """\
#!/usr/bin/env bash
# @WHAT@. Written by `omni-train launch`.
@OPTIONS@
set -euo pipefail

python=@PYTHON@
run_dir=@RUN_DIR@
script=@SCRIPT@
code=@CODE@
module=@MODULE@
overrides=(@OVERRIDES@)
@ARRAY@
# Relative paths of the configuration start here; the code is the copy made when the job was sent.
cd -- @WORKDIR@
export PYTHONPATH="$code" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false WDS_SECURE=1
@ENVIRONMENT@
address() { scontrol show node "$1" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p'; }

if [[ "${1:-}" == node ]]; then  # srun starts this part once on every node
    trap '' USR1  # the ranks take note of it, torchrun must live on
    exec "$python" -m torch.distributed.run \\
        --nnodes=@NODES@ --nproc-per-node=@RANKS@ --max-restarts=0 --shutdown-timeout=@LEAD@ \\
        --rdzv-backend=c10d --rdzv-endpoint="$2" --rdzv-id="slurm-$SLURM_JOB_ID" \\
        --rdzv-conf="is_host=$((SLURM_NODEID == 0)),join_timeout=600" \\
        --local-addr="$(address "$SLURMD_NODENAME")" \\
        -m launch.rank "$run_dir/logs" "$module" "${overrides[@]}"
fi

outcome() { "$python" -m launch.outcome "$run_dir" "$@"; }

if [[ $(outcome) == done ]]; then
    echo "already done: $run_dir"
    exit 0
fi
mkdir -p -- "$run_dir/logs"
# Only what this attempt records counts below.
seen=$(stat -c %s -- "$run_dir/events.jsonl" 2>/dev/null || echo 0)
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
status=0
srun --export=ALL --nodes=@NODES@ --ntasks=@NODES@ --ntasks-per-node=1 --kill-on-bad-exit=0 \\
    --wait=@LEAD@ @CONTAINER@bash -- "$script" node "$(address "$head"):$port" \\
    || status=$?

case $(outcome "$seen") in
done) exit 0 ;;
preempted)
    echo "preempted: queued again, to go on from the newest checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 300  # SLURM ends this attempt
    ;;
esac
[[ $status != 0 ]] || status=1
"$python" -m launch.outcome "$run_dir" "$seen" --failed "srun ended with status $status"
exit "$status"
"""


@dataclass(frozen=True, slots=True)
class StageJob:
    """One stage to be sent.

    Args:
        name: of the job.
        recipe: module under `recipes`.
        overrides: of the recipe, without `run.dir`.
        run_dir: absolute.
        after: names of jobs of the same chain that must be done before.
    """

    name: str
    recipe: str
    overrides: Sequence[str]
    run_dir: Path
    after: tuple[str, ...] = ()


def snapshot_path(run_dir: Path) -> Path:
    """Return where the code of a run is kept: named by its content, so that it is copied once."""
    digest = xxhash.xxh3_64()
    for path in code_files():
        digest.update(f"{path}\0".encode() + (REPO / path).read_bytes())
    return run_dir / "code" / digest.hexdigest()


def save_snapshot(run_dir: Path) -> None:
    """Copy the code into the run directory; what changes later does not reach a queued job."""
    target = snapshot_path(run_dir)
    if target.exists():
        return
    staging = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    for path in code_files():
        (staging / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPO / path, staging / path)
    staging.rename(target)


def sbatch_script(job: StageJob, cluster: ClusterConfig) -> str:
    """Return the script of a stage.

    Raises:
        ConfigError: a value that has no place in a script.
    """
    words = [*job.overrides, str(job.run_dir), str(REPO), sys.executable, job.name]
    if wrong := [word for word in words if not word.isprintable()]:
        raise ConfigError(
            key="launch",
            value=wrong[0],
            rule="a line break or another control character has no place in a job",
            remedy="rename it",
        )
    if set('%\\"') & set(str(job.run_dir)):
        raise ConfigError(
            key="run.dir",
            value=str(job.run_dir),
            rule='SLURM puts job numbers where a path has %, and no path may have " or a backslash',
            remedy="choose another directory",
        )
    key, values = cluster.sweep()
    container = ""
    if cluster.container:
        container = {
            Runtime.apptainer: f"apptainer exec --nv {shlex.quote(cluster.container)} ",
            Runtime.pyxis: f"--container-image={shlex.quote(cluster.container)} ",
        }[cluster.runtime]
    overrides = shlex.join([*job.overrides, f"run.dir={json.dumps(str(job.run_dir))}"])
    array = ""
    if values:
        array = (
            f'values=({shlex.join(values)})\nrun_dir="$run_dir/$SLURM_ARRAY_TASK_ID"\n'
            f'overrides+=("{key}=${{values[$SLURM_ARRAY_TASK_ID]}}" "run.dir=\\"$run_dir\\"")\n'
        )
        overrides = shlex.join(job.overrides)
    cpu = "export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive\n"
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    device = "".join(f"export {n}={cluster.interface}\n" for n in names if cluster.interface)
    filled = {
        "WHAT": f"{job.name}: {job.recipe} on {cluster.nodes} x {cluster.ranks} ranks",
        "OPTIONS": "\n".join(f"#SBATCH {option}" for option in _options(job, cluster)),
        "PYTHON": shlex.quote(sys.executable),
        "RUN_DIR": shlex.quote(str(job.run_dir)),
        "CODE": shlex.quote(str(snapshot_path(job.run_dir))),
        "MODULE": shlex.quote(f"recipes.{job.recipe}"),
        "OVERRIDES": overrides,
        "ARRAY": array,
        "WORKDIR": shlex.quote(str(REPO)),
        "ENVIRONMENT": ("" if cluster.gpus_per_node else cpu) + device,
        "NODES": str(cluster.nodes),
        "RANKS": str(cluster.ranks),
        "LEAD": str(cluster.lead_s),
        "CONTAINER": container,
        "SCRIPT": shlex.quote(str(job.run_dir / SCRIPT_NAME)),
    }
    # One pass: a value that looks like a place is left as it is.
    return re.sub(r"@([A-Z_]+)@", lambda found: filled[found[1]], _TEMPLATE)


def _options(job: StageJob, cluster: ClusterConfig) -> list[str]:
    """Everything here was held to harmless characters by ClusterConfig."""
    texts = ("partition", "account", "qos", "time", "mem")
    _, values = cluster.sweep()
    return [
        f"--job-name={job_name(job.name)}",
        f"--nodes={cluster.nodes}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={cluster.gpus_per_node}"] if cluster.gpus_per_node else []),
        *([f"--cpus-per-task={cluster.cpus_per_node}"] if cluster.cpus_per_node else []),
        *(f"--{name}={value}" for name in texts if (value := getattr(cluster, name))),
        *([f"--array=0-{len(values) - 1}"] if values else []),
        f"--signal=USR1@{cluster.lead_s}",
        "--requeue",
        "--open-mode=append",
        f"--export={','.join([*_KEPT, *cluster.secrets])}",
    ]


def sbatch_command(job: StageJob, cluster: ClusterConfig, after: Sequence[str]) -> list[str]:
    """Return the command that sends the script.

    Args:
        job: the stage.
        cluster: its size.
        after: numbers of the jobs that must end well before.
    """
    log = "slurm-%A_%a.out" if cluster.array else "slurm-%j.out"
    waits = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
    return [
        *("sbatch", "--parsable", f"--chdir={job.run_dir}", f"--output={log}"),
        *(waits if after else []),
        str(job.run_dir / SCRIPT_NAME),
    ]


def show(jobs: Sequence[StageJob], cluster: ClusterConfig) -> None:
    """Print the scripts and the commands that would send them."""
    for job in jobs:
        print(sbatch_script(job, cluster), end="")
        after = [f"JOB-OF-{name}" for name in job.after]
        print(f"# {shlex.join(sbatch_command(job, cluster, after))}\n")
    print("# nothing was sent; --submit does")


def submit(jobs: Sequence[StageJob], cluster: ClusterConfig) -> dict[str, str]:
    """Send the jobs in order and return their numbers by name.

    Raises:
        ConfigError: a value that cannot stand in a job, no sbatch, or one that refuses.
    """
    from omni_train.engine.run import write_text_atomically  # late: it imports torch

    scripts = {job.name: sbatch_script(job, cluster) for job in jobs}
    numbers: dict[str, str] = {}
    for job in jobs:
        _warn_about_time(job, cluster)
        job.run_dir.mkdir(parents=True, exist_ok=True)
        save_snapshot(job.run_dir)
        write_text_atomically(job.run_dir / SCRIPT_NAME, scripts[job.name])
        after = [numbers[name] for name in job.after]
        numbers[job.name] = sbatch(sbatch_command(job, cluster, after))
        record = {"target": "slurm", "job": numbers[job.name], "after": after}
        write_text_atomically(job.run_dir / RECORD_NAME, json.dumps(record) + "\n")
        waits = f", after {', '.join(job.after)}" if job.after else ""
        print(f"{job.name}: job {numbers[job.name]}{waits}; logs: {job.run_dir}")
    return numbers


def _warn_about_time(job: StageJob, cluster: ClusterConfig) -> None:
    measured = measured_stop_s(job.run_dir)
    if measured is not None and cluster.lead_s < 2 * measured:
        print(
            f"{job.name}: cluster.lead_s={cluster.lead_s}, but two steps and a save took "
            f"{measured:.1f} s before; give at least twice that",
            file=sys.stderr,
        )


def sbatch(command: list[str]) -> str:
    """Run sbatch and return the number of the job.

    Raises:
        ConfigError: there is none, or it refuses.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError(
            key="--submit",
            value=True,
            rule="there is no sbatch here",
            remedy="run this on a login node of the cluster, or leave --submit out",
        ) from error
    number = done.stdout.strip().partition(";")[0]
    if done.returncode != 0 or not number.isdecimal():
        raise ConfigError(
            key="--submit",
            value=shlex.join(command),
            rule=f"sbatch says: {' '.join((done.stderr or done.stdout).split())}",
            remedy="correct it, or submit the script by hand",
        )
    return number
