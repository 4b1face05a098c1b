from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli, stages, testing

REPO = Path(__file__).parents[3]


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch", *arguments],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def cpu_seconds(*arguments: str) -> float:
    """Processor time of a command; unlike the wall's, it does not grow with what else runs."""
    command = [sys.executable, "-m", "launch", *arguments]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return used.ru_utime + used.ru_stime


def commands() -> list[str]:
    (choices,) = (a.choices for a in cli.build_parser()._actions if a.dest == "command")
    return list(choices or ())


def test_help_answers_in_half_a_second() -> None:
    for words in [[], *([name] for name in commands())]:
        # The first one may compile, and a stolen core counts as used.
        assert any(cpu_seconds(*words, "--help") < 0.5 for _ in range(3)), words


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import contextlib, io, json, sys\nfrom launch import cli\n"
        "for name in sys.argv[1:]:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        cli.main([name, '--help'])\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    names = commands()
    assert {"train", "launch", "track", "doctor"} <= set(names)
    done = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=REPO, check=True, capture_output=True, text=True
    )
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert {"launch", "argparse"} <= loaded
    assert not loaded & {
        *("torch", "transformers", "deepspeed", "trl", "datasets", "wandb", "tensorboard"),
        *("hydra", "omegaconf", "yaml", "rich", "numpy", "pyarrow", "av"),
    }


@pytest.mark.parametrize(
    "command", ["demo", "test", "stages", "config", "train", "evaluate", "data", "chaos"]
)
def test_every_command_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert f"examples:\n  omni-train {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "stage1_audi"], "did you mean stage1_audio?"),
        (["config", "zzz"], "one of: text_lm"),
        (["stages", "show", "stage1_vison"], "did you mean stage1_vision?"),
        (["evaluate", "--ranks", "0"], "at least one process"),
    ],
)
def test_usage_errors_end_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["no-such-command"], ["demo", "--fast"], ["train", "text_lm", "--gpu"]]
)
def test_argument_errors_end_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2


def test_overrides_may_stand_after_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[str], int]] = []

    def record(recipe: str, overrides: list[str], *, ranks: int, **_: object) -> int:
        seen.append((recipe, overrides, ranks))
        return 75

    monkeypatch.setattr("launch.local.run_recipe", record)
    assert cli.main(["train", "text_lm", "a=1", "--ranks", "2", "b=2"]) == 75
    assert seen == [("text_lm", ["a=1", "b=2"], 2)]


def test_every_stage_has_a_script(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["stages", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    scripts = {path.stem for path in (REPO / "recipes").glob("*.py")} - {"__init__"}
    assert {row["recipe"] for row in rows} == scripts
    assert cli.main(["stages", "show", "talker_dpo"]) == 0
    shown = capsys.readouterr().out
    assert "./run train talker_dpo" in shown
    for columns in (66, 80, 160):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert cli.main(["stages"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= columns
        names = {word for line in lines for word in line.split()}
        assert scripts <= names, "a name that is cut in two cannot be copied"
    assert len(lines) == len(stages.STAGES) + 2


def test_a_reader_that_has_enough_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "launch", "stages"]
    try:
        done = subprocess.run(command, cwd=REPO, stdout=write, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_config_reports_a_typo_with_the_stage_s_own_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["config", "stage1_audio", "optm.lr=1"]) == 2
    captured = capsys.readouterr()
    assert "did you mean optim.lr?" in captured.err
    assert captured.out == ""


def test_test_runs_pytest_alone_with_arguments_of_its_own() -> None:
    names = [name for name, _ in testing.parts(full=False)]
    assert names == ["format", "lint", "types", "tests"]
    [(name, command)] = testing.parts(full=False, pytest_args=["tests/unit/launch", "-k", "x"])
    assert name == "tests"
    assert command[-5:] == ["-m", "not slow", "tests/unit/launch", "-k", "x"]
    assert "not slow" not in testing.parts(full=True)[-1][1]


def test_test_ends_non_zero_where_a_part_fails(tmp_path: Path) -> None:
    (tmp_path / "test_bad.py").write_text("def test_bad():\n    assert 1 == 2\n")
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-m", "launch", "test", str(tmp_path / "test_bad.py")],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "1 failed" in done.stdout
    assert "FAILED (1)" in done.stdout
