"""Stages as Kubernetes objects: a TrainJob, a JobSet, or an indexed Job with its service.

Every pod runs `launch.node` on a shared volume that has code, data and run directories. It ends
with the run's own code: 75 is a pod that was asked to leave and has saved, so it counts as no
failure; a code that would come again ends the job. A chain is one JobSet whose stages wait for
each other.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from typing import Any

import yaml

from launch.cluster import ClusterConfig, Manifest, job_name
from launch.slurm import StageJob
from launch.stages import REPO
from omni_train.config.errors import ConfigError
from omni_train.engine.exit_codes import ExitCode

_PORT = 29500
_RESTARTS = 3
_VOLUME = "shared"
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
_TRAINER_RUNTIME = "torch-distributed"
# What a pod may need beyond the ranks' own time to save.
_GRACE_MARGIN_S = 30
# A second try ends the same way.
_FINAL = (
    ExitCode.usage,
    ExitCode.bad_data,
    ExitCode.missing_input,
    ExitCode.locked,
    ExitCode.non_finite,
    ExitCode.refused,
)


def manifests(jobs: Sequence[StageJob], cluster: ClusterConfig, *, name: str) -> list[dict]:
    """Return the objects to apply, in order.

    Args:
        jobs: one stage, or the stages of a chain.
        cluster: size and place.
        name: of the whole.

    Raises:
        ConfigError: something that a pod needs is not said, or cannot be said.
    """
    _check(jobs, cluster)
    if len(jobs) > 1 or cluster.manifest is Manifest.jobset:
        return [_jobset(jobs, cluster, name)]
    if cluster.manifest is Manifest.trainjob:
        return [_trainjob(jobs[0], cluster, name)]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(cluster, name),
        "spec": {
            "clusterIP": "None",
            "selector": {"job-name": name},
            "publishNotReadyAddresses": True,
        },
    }
    spec = _job_spec(jobs[0], cluster, endpoint=f"{name}-0.{name}", subdomain=name)
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(cluster, name)}
    return [service, {**job, "spec": spec}]


def send(jobs: Sequence[StageJob], cluster: ClusterConfig, *, name: str, submit: bool) -> int:
    """Print the objects as YAML, or hand them to kubectl; return the exit code."""
    text = yaml.safe_dump_all(manifests(jobs, cluster, name=name), sort_keys=False)
    if not submit:
        print(text, end="")
        return 0
    try:
        command = ["kubectl", "apply", "-f", "-"]
        done = subprocess.run(command, input=text, text=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError(
            key="--submit",
            value=True,
            rule="there is no kubectl here",
            remedy="leave --submit out and apply what is printed",
        ) from error
    return int(ExitCode.done if done.returncode == 0 else ExitCode.usage)


def _check(jobs: Sequence[StageJob], cluster: ClusterConfig) -> None:
    needed = {"container": "an image", "volume": "the claim of a shared volume"}
    needed |= {"secret": "the secret that holds cluster.secrets"} if cluster.secrets else {}
    for key, what in needed.items():
        if not getattr(cluster, key):
            raise ConfigError(
                key=f"cluster.{key}",
                value="",
                rule=f"a pod needs {what}",
                remedy=f"add cluster.{key}=NAME",
            )
    if cluster.array:
        raise ConfigError(
            key="cluster.array",
            value=cluster.array,
            rule="arrays are SLURM's",
            remedy="launch one job for each value",
        )
    for job in jobs:
        if not job.run_dir.is_relative_to(REPO):
            raise ConfigError(
                key="run.dir",
                value=str(job.run_dir),
                rule="a pod finds runs below the project on the shared volume",
                remedy="give a path such as runs/NAME",
            )
        if wrong := [word for word in job.overrides if not word.isprintable()]:
            raise ConfigError(
                key="launch",
                value=wrong[0],
                rule="a line break or another control character has no place in a job",
                remedy="rename it",
            )


def _metadata(cluster: ClusterConfig, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "namespace": cluster.namespace}
    labels = {"app.kubernetes.io/name": "omni-train"}
    return {**found, "labels": labels | _queue(cluster)}


def _queue(cluster: ClusterConfig) -> dict[str, str]:
    return {"kueue.x-k8s.io/queue-name": cluster.queue} if cluster.queue else {}


def _arguments(job: StageJob, cluster: ClusterConfig, *, node: str, endpoint: str) -> list[str]:
    run_dir = f"{cluster.workdir}/{job.run_dir.relative_to(REPO)}"
    words = [*job.overrides, f"run.dir={json.dumps(run_dir)}"]
    device = [f"--interface={cluster.interface}"] if cluster.interface else []
    return [
        *("-m", "launch.node", f"--nodes={cluster.nodes}", f"--node={node}"),
        *(f"--ranks={cluster.ranks}", f"--endpoint={endpoint}", f"--job={job_name(job.name)}"),
        *(f"--run-dir={_literal(run_dir)}", f"--stop-s={cluster.lead_s}", *device),
        *(f"recipes.{job.recipe}", *map(_literal, words)),
    ]


def _literal(word: str) -> str:
    """Kubernetes replaces $(NAME) in arguments, and reads $$ as $."""
    return word.replace("$(", "$$(")


def _environment(cluster: ClusterConfig) -> list[dict[str, Any]]:
    plain = {"PYTHONPATH": cluster.workdir, "PYTHONUNBUFFERED": "1"}
    secret = {
        name: {"secretKeyRef": {"name": cluster.secret, "key": name}} for name in cluster.secrets
    }
    return [
        *({"name": name, "value": value} for name, value in plain.items()),
        *({"name": name, "valueFrom": source} for name, source in secret.items()),
    ]


def _resources(cluster: ClusterConfig) -> dict[str, Any]:
    amounts: dict[str, str] = {}
    if cluster.gpus_per_node:
        amounts["nvidia.com/gpu"] = str(cluster.gpus_per_node)
    if cluster.cpus_per_node:
        amounts["cpu"] = str(cluster.cpus_per_node)
    if cluster.mem:
        amounts["memory"] = cluster.mem + ("i" if cluster.mem[-1].isalpha() else "Mi")
    return {"limits": amounts, "requests": dict(amounts)} if amounts else {}


def _volumes(cluster: ClusterConfig) -> tuple[list[dict], list[dict]]:
    """Return the pod's volumes and the container's mounts; NCCL shares much memory."""
    volumes = [
        {"name": _VOLUME, "persistentVolumeClaim": {"claimName": cluster.volume}},
        {"name": "memory", "emptyDir": {"medium": "Memory"}},
    ]
    mounts = [
        {"name": _VOLUME, "mountPath": cluster.mount},
        {"name": "memory", "mountPath": "/dev/shm"},  # noqa: S108  a mount, not a file
    ]
    return volumes, mounts


def _job_spec(
    job: StageJob, cluster: ClusterConfig, *, endpoint: str, subdomain: str = ""
) -> dict[str, Any]:
    """Return the spec of an indexed Job, one pod for each node."""
    volumes, mounts = _volumes(cluster)
    index = {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": _INDEX}}}
    container = {
        "name": "node",
        "image": cluster.container,
        "command": ["python"],
        "args": _arguments(job, cluster, node="$(NODE)", endpoint=f"{endpoint}:{_PORT}"),
        "env": [index, *_environment(cluster)],
        "resources": _resources(cluster),
        "volumeMounts": mounts,
    }
    rules = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        _rule("Ignore", (ExitCode.preempted,)),
        _rule("FailJob", _FINAL),
    ]
    pod = {
        **({"subdomain": subdomain} if subdomain else {}),
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": cluster.lead_s + _GRACE_MARGIN_S,
        "containers": [container],
        "volumes": volumes,
    }
    return {
        "completionMode": "Indexed",
        "completions": cluster.nodes,
        "parallelism": cluster.nodes,
        "backoffLimit": _RESTARTS * cluster.nodes,
        "podFailurePolicy": {"rules": rules},
        "template": {"spec": pod},
    }


def _rule(action: str, codes: Sequence[ExitCode]) -> dict[str, Any]:
    values = sorted(int(code) for code in codes)
    return {
        "action": action,
        "onExitCodes": {"containerName": "node", "operator": "In", "values": values},
    }


def _jobset(jobs: Sequence[StageJob], cluster: ClusterConfig, name: str) -> dict[str, Any]:
    """Return one JobSet; a stage starts when those that it needs are complete."""
    labels = {job.name: job_name(job.name)[:30].rstrip("-") for job in jobs}
    if len(set(labels.values())) < len(labels):
        raise ConfigError(
            key="cluster.manifest",
            value="jobset",
            rule="two stages would get the same name",
            remedy="give them names that differ in their first 30 letters",
        )
    replicated = []
    for job in jobs:
        label = labels[job.name]
        needs = [{"name": labels[parent], "status": "Complete"} for parent in job.after]
        spec = _job_spec(job, cluster, endpoint=f"{name}-{label}-0-0.{name}")
        one = {"name": label, "replicas": 1, "template": {"spec": spec}}
        replicated.append({**one, "dependsOn": needs} if needs else one)
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(cluster, name),
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name},
            "failurePolicy": {"maxRestarts": 0},
            "replicatedJobs": replicated,
        },
    }


def _trainjob(job: StageJob, cluster: ClusterConfig, name: str) -> dict[str, Any]:
    """Return a TrainJob on the trainer's torch runtime, which names the rendezvous in PET_*."""
    volumes, mounts = _volumes(cluster)
    pod = {
        "terminationGracePeriodSeconds": cluster.lead_s + _GRACE_MARGIN_S,
        "volumes": volumes,
        "containers": [{"name": "node", "volumeMounts": mounts}],
    }
    patched = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(cluster, name),
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "ClusterTrainingRuntime",
                "name": _TRAINER_RUNTIME,
            },
            "trainer": {
                "image": cluster.container,
                "numNodes": cluster.nodes,
                "numProcPerNode": cluster.ranks,
                "command": ["python"],
                "args": _arguments(
                    job,
                    cluster,
                    node="$(PET_NODE_RANK)",
                    endpoint="$(PET_MASTER_ADDR):$(PET_MASTER_PORT)",
                ),
                "env": _environment(cluster),
                "resourcesPerNode": _resources(cluster),
            },
            "runtimePatches": [
                {
                    "manager": "omni-train.launch/cli",
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [patched]}}},
                }
            ],
        },
    }
