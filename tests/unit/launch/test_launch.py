"""Scripts and manifests: hostile values, schemas, quoting; pipelines as graphs."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api import models

from launch import slurm
from launch.cli import main
from launch.cluster import ClusterConfig, Manifest, Runtime, job_name, parse_words
from launch.kubernetes import manifests
from launch.outcome import outcome, write_failure
from launch.slurm import StageJob
from launch.stages import REPO
from omni_train.config.errors import ConfigError

HOSTILE = ("a\nb", "$(touch hacked)", "`touch hacked`", "a;touch hacked", "a b", "'\"", "-rf", "%j")
POD = {"container": "registry.test/omni:1", "volume": "data", "queue": "gpu"}


def stage(run_dir: Path, *overrides: str, name: str = "stage", after: Any = ()) -> StageJob:
    return StageJob(name, "text_lm", list(overrides), run_dir, tuple(after))


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize(
    "key", ["partition", "account", "time", "mem", "container", "namespace", "queue", "mount"]
)
def test_a_hostile_value_is_refused_with_its_key(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"cluster\.{key}="):
        ClusterConfig(**{key: value})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["target=slurm", "cluster.nodez=2"], "did you mean cluster.nodes"),
        (["target=slurm", "cluster.nodes=0"], "must be 1 to"),
        (["target=slurm", "cluster.nodes=x"], "cluster.nodes"),
        (["target=pbs"], "one of local, slurm, kubernetes"),
        (["cluster.nodes=2"], "target"),
        (["target=slurm", "cluster=nowhere"], "one of: cpu, gpu8"),
        (["target=slurm", "cluster.secrets=[a b]"], "a variable's name"),
        (["target=slurm", "cluster.array=run.seed=$(x),2"], "plain values"),
    ],
)
def test_wrong_words_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse_words(words)


def test_words_go_where_they_belong() -> None:
    words = parse_words(
        ["target=slurm", "cluster=gpu8", "cluster.nodes=4", "cluster.time=1-12", "optim.lr=1e-3"]
    )
    assert (words.cluster.nodes, words.cluster.ranks, words.cluster.time) == (4, 8, "1-12")
    assert words.cluster.secrets == ["WANDB_API_KEY"]
    assert words.overrides == ["optim.lr=1e-3"]


def test_the_script_hands_every_word_on_as_it_is(tmp_path: Path) -> None:
    run_dir = tmp_path / "it's $(touch hacked) & `b`"
    words = [f"run.experiment={value}" for value in HOSTILE if value.isprintable()]
    script = slurm.sbatch_script(stage(run_dir, *words), ClusterConfig(nodes=2))
    path = tmp_path / "job.sbatch"
    # Only what assigns; what it starts needs a cluster (tests/e2e/test_slurm.py).
    head = script[: script.index("# Relative paths")]
    path.write_text(head + 'printf "%s\\0" "$run_dir" "${overrides[@]}"\n')
    done = subprocess.run(["bash", path], cwd=tmp_path, capture_output=True, check=True)
    said = done.stdout.decode().split("\0")[:-1]
    assert said == [str(run_dir), *words, f"run.dir={json.dumps(str(run_dir))}"]
    assert not (tmp_path / "hacked").exists()
    path.write_text(script)
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0


@pytest.mark.parametrize("name", ["a\nb", 'a"b', "a%jb", "a\\b"])
def test_a_run_directory_that_slurm_or_bash_would_change_is_refused(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError):
        slurm.sbatch_script(stage(tmp_path / name), ClusterConfig())


def test_options_of_a_job_and_its_array(tmp_path: Path) -> None:
    size = ClusterConfig(
        nodes=2, partition="gpu", account="lab", time="12:00:00", mem="500G", cpus_per_node=96,
        lead_s=120, container="images/omni.sif", runtime=Runtime.apptainer, secrets=["HF_TOKEN"],
        array="run.seed=0,1,2", interface="ib0",
    )  # fmt: skip
    script = slurm.sbatch_script(stage(tmp_path / "run"), size)
    for line in (
        *("--nodes=2", "--gpus-per-node=8", "--partition=gpu", "--account=lab", "--requeue"),
        *("--time=12:00:00", "--mem=500G", "--cpus-per-task=96", "--array=0-2"),
        *("--signal=USR1@120", "--export=HOME,USER,LANG,PATH,HF_TOKEN"),
    ):
        assert f"#SBATCH {line}\n" in script
    assert "apptainer exec --nv images/omni.sif bash" in script
    assert "export GLOO_SOCKET_IFNAME=ib0\n" in script
    head = script[: script.index("# Relative paths")]
    probe = tmp_path / "probe.sh"
    probe.write_text(head + 'printf "%s\\n" "$run_dir" "${overrides[@]}"\n')
    said = subprocess.run(
        ["bash", probe],
        env={"SLURM_ARRAY_TASK_ID": "2"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert said == [f"{tmp_path}/run/2", "run.seed=2", f'run.dir="{tmp_path}/run/2"']
    pyxis = ClusterConfig(container="nvcr.io/x:1", runtime=Runtime.pyxis)
    assert "--container-image=nvcr.io/x:1 bash" in slurm.sbatch_script(stage(tmp_path), pyxis)


def test_the_snapshot_is_the_code_and_stays(tmp_path: Path) -> None:
    slurm.save_snapshot(tmp_path)
    kept = slurm.snapshot_path(tmp_path)
    assert (kept / "recipes" / "text_lm.py").read_bytes() == (
        REPO / "recipes" / "text_lm.py"
    ).read_bytes()
    assert (kept / "conf" / "text_lm.yaml").is_file()
    before = kept.stat().st_mtime_ns
    slurm.save_snapshot(tmp_path)
    assert kept.stat().st_mtime_ns == before


def test_outcome_counts_only_what_this_attempt_recorded(tmp_path: Path) -> None:
    assert outcome(tmp_path) == outcome(tmp_path, 0) == "none"
    log = tmp_path / "events.jsonl"
    log.write_text('{"kind": "run_end", "status": "preempted"}\n')
    seen = log.stat().st_size
    assert (outcome(tmp_path, 0), outcome(tmp_path, seen)) == ("preempted", "none")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-00000.out").write_text("config error: no such key\n")
    (tmp_path / "state.json").write_text('{"status": "running", "step": 3}')
    assert write_failure(tmp_path, "srun 1") == "config error: no such key (srun 1)"
    assert outcome(tmp_path) == "failed"
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 3


def objects(kind: Manifest, *, chain: bool = False, **more: Any) -> list[dict[str, Any]]:
    size = ClusterConfig(nodes=2, manifest=kind, secrets=["WANDB_API_KEY"], secret="keys",
                         cpus_per_node=8, mem="64G", **POD, **more)  # fmt: skip
    runs = REPO / "runs"
    jobs = [stage(runs / "one", "a=$(HOME)", *(f"b={h}" for h in HOSTILE[1:]), name="one")]
    if chain:
        jobs.append(stage(runs / "two", name="two", after=["one"]))
        jobs.append(stage(runs / "three", name="three", after=["one", "two"]))
    made = manifests(jobs, size, name="demo")
    return list(yaml.safe_load_all(yaml.safe_dump_all(made, sort_keys=False)))


def refused_fields(model: Any, given: Any) -> list[str]:
    """Keys that the model dropped: its classes ignore what they do not know."""
    kept = model.to_dict()

    def compare(a: Any, b: Any, where: str) -> list[str]:
        if isinstance(a, dict):
            return [
                found
                for key, value in a.items()
                for found in (
                    compare(value, b[key], f"{where}.{key}") if key in b else [f"{where}.{key}"]
                )
            ]
        if isinstance(a, list):
            return [f for n, x in enumerate(a) for f in compare(x, b[n], f"{where}[{n}]")]
        return []

    return compare(given, kept, "")


def test_trainjob_and_jobset_fit_their_models() -> None:
    (train,) = objects(Manifest.trainjob)
    assert refused_fields(models.TrainerV1alpha1TrainJob.from_dict(train), train) == []
    for chain in (False, True):
        (made,) = objects(Manifest.jobset, chain=chain)
        assert refused_fields(models.JobsetV1alpha2JobSet.from_dict(made), made) == []
    needs = {job["name"]: job.get("dependsOn", []) for job in made["spec"]["replicatedJobs"]}
    assert [n["name"] for n in needs["three"]] == ["one", "two"]
    assert needs["two"] == [{"name": "one", "status": "Complete"}]
    broken = {**train, "spec": {**train["spec"], "runtimeRef": {}}}
    with pytest.raises(ValueError, match="name"):
        models.TrainerV1alpha1TrainJob.from_dict(broken)


def test_core_objects_fit_kubernetes_own_schemas() -> None:
    service, job = objects(Manifest.job)
    (jobset,) = objects(Manifest.jobset, chain=True)
    inner = [
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **j["template"]}
        for j in jobset["spec"]["replicatedJobs"]
    ]
    version = kubernetes_validate.latest_version()
    for made in (service, job, *inner):
        kubernetes_validate.validate(made, version, strict=True)
    job["spec"]["template"]["spec"]["containers"][0]["imaje"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, version, strict=True)


@pytest.mark.parametrize("kind", list(Manifest))
def test_pods_get_secrets_by_name_time_to_save_and_literal_words(kind: Manifest) -> None:
    *_, made = objects(kind)
    text = json.dumps(made)
    assert '"secretKeyRef": {"name": "keys", "key": "WANDB_API_KEY"}' in text
    assert '"terminationGracePeriodSeconds": 330' in text
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"
    assert '"claimName": "data"' in text
    # Kubernetes would replace $(HOME) by the variable's value.
    assert '"a=$$(HOME)"' in text
    assert '"b=$$(touch hacked)"' in text
    if kind is not Manifest.trainjob:
        actions = re.findall(r'"action": "(\w+)"', text)
        assert actions == ["Ignore", "Ignore", "FailJob"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"container": ""}, "an image"),
        ({"volume": ""}, "shared volume"),
        ({"secrets": ["A_KEY"]}, "cluster.secret"),
        ({"array": "run.seed=1,2"}, "SLURM"),
    ],
)
def test_what_a_pod_needs_must_be_said(change: dict[str, Any], said: str) -> None:
    size = ClusterConfig(**{**POD, **change})
    with pytest.raises(ConfigError, match=re.escape(said)):
        manifests([stage(REPO / "runs" / "x")], size, name="x")
    with pytest.raises(ConfigError, match=re.escape("run.dir")):
        manifests([stage(Path("/elsewhere"))], ClusterConfig(**POD), name="x")


def test_names_of_jobs_are_labels() -> None:
    assert job_name("Stage 1_audio\n$(x)") == "stage-1-audio-x"
    assert job_name("$$$") == "run"


def test_a_dry_run_of_a_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["text_lm", "experiment=text_lm/debug", f"run.dir='{tmp_path}/r'"]
    assert main(["launch", *words, "target=slurm", "cluster=cpu"]) == 0
    shown = capsys.readouterr().out
    assert "torch.distributed.run" in shown
    assert "nothing was sent" in shown
    assert not (tmp_path / "r").exists()
    assert main(["launch", *words, "target=local", "cluster=cpu"]) == 2
    assert main(["launch", "no_such_stage", "target=slurm"]) == 2
    said = capsys.readouterr().err
    assert "target=local has none" in said
    assert "text_lm" in said
