"""The job array: a script that bash reads as meant, hostile names, and the same set as one process.

What sbatch does is done here by hand: the script runs with each task's number, then without one.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launch.cli import main
from launch.local import child_environment
from tests.unit.data_pipelines.sourcing import set_bytes, talks, tokenizer

PARTS = 3


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """With a name that a shell would take apart."""
    folder = tmp_path / "it's $(touch hacked) & `b`"
    talks(folder, 20)
    tokenizer(folder / "tok en")
    return folder


def arguments(place: Path, out: str, *more: str) -> list[str]:
    return [
        *("data", "prepare", str(place / "talks.jsonl"), str(place / out), "--format", "jsonl"),
        *("--tokenizer", str(place / "tok en"), "--name", "set", "--samples-per-shard", "2"),
        *("--workers", "0", *more),
    ]


def jobs(place: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[str, list[str]]:
    """The script, and the lines about sbatch after it."""
    capsys.readouterr()
    assert main(arguments(place, "array", "--slurm-array", str(PARTS), *more)) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("# saved as"))
    return "\n".join(lines[:at]) + "\n", lines[at:]


def run(script: Path, folder: Path, task: int | None) -> None:
    number = {} if task is None else {"SLURM_ARRAY_TASK_ID": str(task)}
    done = subprocess.run(
        ["bash", str(script)],
        cwd=folder,
        env={**child_environment(), **number},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_array_makes_what_one_process_makes(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, notes = jobs(place, capsys, "--task", "a; touch hacked", "--partition", "cpu")
    # The dry run writes nothing.
    assert not (place / "array").exists()
    path = tmp_path / "prepare.sbatch"
    path.write_text(script)
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert "#SBATCH --partition=cpu\n" in script
    assert f"--array=0-{PARTS - 1}" in notes[1]
    assert "--dependency=afterok:JOB" in notes[2]
    for task in range(PARTS):
        run(path, tmp_path, task)
    assert not (place / "array" / "manifest.json").exists()
    run(path, tmp_path, None)
    assert main(arguments(place, "one", "--task", "a; touch hacked")) == 0
    made, wanted = set_bytes(place / "array"), set_bytes(place / "one")
    assert made.keys() == wanted.keys()
    assert len([name for name in made if name.endswith(".tar")]) == 10
    assert made == wanted
    assert not list(tmp_path.rglob("hacked"))


@pytest.mark.parametrize(
    "more",
    [
        ("--partition", "cpu\n#SBATCH --wrap=x"),
        ("--partition", "a b"),
        ("--partition", "x" * 64),
        ("--account", "$(id)"),
        ("--time", "1:00\ntouch hacked"),
        ("--time", "soon"),
        ("--mem", "4G; id"),
        ("--task", "a\ntouch hacked"),
        ("--columns", "text=a\x1bb"),
        ("--name", "a\nb"),
        ("--part", "0/3"),
        ("--slurm-array", "0"),
        ("--slurm-array", "10001"),
    ],
)
def test_what_cannot_stand_in_a_job(
    place: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    # The last three are mistakes, the others could be commands.
    code = 2 if more[0] in ("--part", "--slurm-array") else 77
    assert main(arguments(place, "array", "--slurm-array", "3", *more)) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    assert not (place / "array").exists()


@pytest.mark.parametrize("out", ["%A", "a\\b"])
def test_slurm_would_not_find_its_logs(
    place: Path, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    assert main(arguments(place, out, "--slurm-array", "3")) == 2
    assert "path of a log" in capsys.readouterr().err


@pytest.mark.parametrize("more", [("--submit",), ("--partition", "cpu"), ("--time", "5")])
def test_options_without_an_array_are_an_error(
    place: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    assert main(arguments(place, "one", *more)) == 2
    assert "--slurm-array" in capsys.readouterr().err
    assert not (place / "one").exists()


def test_submitting_calls_sbatch_twice(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a program of that name that notes how it is called."""
    tools = tmp_path / "bin"
    tools.mkdir()
    sbatch = tools / "sbatch"
    note = tmp_path / "calls"
    sbatch.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" END >> "{note}"\necho 417\\;cluster\n')
    sbatch.chmod(0o755)
    submit = arguments(place, "array", "--slurm-array", "3", "--submit")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(submit) == 2
    assert "no sbatch here" in capsys.readouterr().err
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.defpath}")
    assert main(submit) == 0
    first, second, _ = note.read_text().split("END\n")
    script = str((place / "array" / "prepare.sbatch").resolve())
    assert first.splitlines()[-3:] == ["--array=0-2", "--output=slurm-%A_%a.log", script]
    assert second.splitlines()[-2:] == ["--dependency=afterok:417", script]
    assert "merge: job 417" in capsys.readouterr().out
    sbatch.write_text("#!/bin/sh\necho 'invalid partition\nspecified' >&2\nexit 1\n")
    assert main(submit) == 2
    assert "sbatch says: invalid partition specified;" in capsys.readouterr().err
