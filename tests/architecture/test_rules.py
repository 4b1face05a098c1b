"""Holds the repository to the rules, and each rule to an example that it must reject."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.architecture import checks

REPO = Path(__file__).parents[2]
PACKAGES = ("omni_train", "recipes", "data_pipelines", "launch", "benchmarks")
Check = Callable[[str, str], list[str]]


def read(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> dict[str, str]:
    files = [path for folder in folders for path in (REPO / folder).rglob("*")]
    return {
        path.relative_to(REPO).as_posix(): path.read_text(encoding="utf-8")
        for path in files
        if path.suffix in suffixes and path.is_file() and "__pycache__" not in path.parts
    }


def root_files() -> dict[str, str]:
    names = ["run", ".ci/run", "pyproject.toml", "constraints.txt", "README.md", "CONTRIBUTING.md"]
    return {name: (REPO / name).read_text(encoding="utf-8") for name in names}


def code() -> dict[str, str]:
    return read(*PACKAGES)


def everything() -> dict[str, str]:
    suffixes = (".py", ".yaml", ".yml", ".md", ".sh", ".toml")
    return read(*PACKAGES, "tests", "conf", suffixes=suffixes) | root_files()


def problems(check: Check, files: dict[str, str]) -> list[str]:
    assert len(files) > 5, "the files were not found"
    return [found for path, text in files.items() for found in check(path, text)]


@pytest.mark.parametrize(
    ("check", "where"),
    [
        (checks.long_file, lambda: code() | read("tests")),
        (checks.long_functions, lambda: code() | read("tests")),
        (checks.wrong_arrows, code),
        (checks.unsafe_code, lambda: code() | read("tests")),
        (checks.forbidden_text, lambda: code() | read("conf", suffixes=(".yaml",))),
        (checks.deepspeed_launcher, lambda: own_text_excluded(everything())),
        (checks.absolute_paths, lambda: own_text_excluded(everything())),
        (checks.not_ascii, everything),
        (checks.environment_reads, code),
        (checks.loose_schemas, lambda: code() | read("tests")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_repository_keeps_the_rule(check: Check, where: Callable[[], dict[str, str]]) -> None:
    assert problems(check, where()) == []


def own_text_excluded(files: dict[str, str]) -> dict[str, str]:
    """Leave out the two files that hold the bad examples."""
    return {path: text for path, text in files.items() if not path.startswith("tests/architecture")}


def test_an_optional_dependency_has_one_wrapper() -> None:
    users: dict[str, list[str]] = {}
    for path, text in code().items():
        for name in checks.optional_imports(text):
            users.setdefault(name, []).append(path)
    assert {name: paths for name, paths in users.items() if len(paths) > 1} == {}


LONG_FUNCTION = "def f():\n" + "    x = 1\n" * 60

BAD: list[tuple[Check, str, str]] = [
    (checks.long_file, "omni_train/a.py", "x = 1\n" * 501),
    (checks.long_file, "tests/unit/a.py", "x = 1\n" * 501),
    (checks.long_file, "recipes/a.py", "x = 1\n" * 151),
    (checks.long_file, "omni_train/engine/fit.py", "x = 1\n" * 201),
    (checks.long_functions, "omni_train/a.py", LONG_FUNCTION),
    (checks.long_functions, "tests/a.py", LONG_FUNCTION),
    (checks.wrong_arrows, "omni_train/a.py", "import recipes.stage1_audio"),
    (checks.wrong_arrows, "omni_train/a.py", "from launch import cli"),
    (checks.wrong_arrows, "omni_train/a.py", "def f():\n    import data_pipelines"),
    (checks.wrong_arrows, "omni_train/a.py", "from . import b"),
    (checks.wrong_arrows, "launch/a.py", "from recipes.evaluate import main"),
    (checks.wrong_arrows, "launch/a.py", "import importlib\nimportlib.import_module('recipes.x')"),
    (checks.wrong_arrows, "launch/a.py", "import runpy"),
    (checks.wrong_arrows, "recipes/a.py", "from data_pipelines.corpus import x"),
    (checks.wrong_arrows, "data_pipelines/a.py", "from omni_train.engine.fit import fit"),
    (checks.wrong_arrows, "data_pipelines/a.py", "from omni_train import engine"),
    (checks.unsafe_code, "a.py", "torch.load(p, weights_only=False)"),
    (checks.unsafe_code, "a.py", "torch.load(p)"),
    (checks.unsafe_code, "a.py", "import pickle"),
    (checks.unsafe_code, "a.py", "from dill import loads"),
    (checks.unsafe_code, "a.py", "np.load(p, allow_pickle=True)"),
    (checks.unsafe_code, "a.py", "run('x', shell=True)"),
    (checks.unsafe_code, "a.py", "load('x', trust_remote_code=flag)"),
    (checks.unsafe_code, "a.py", "hydra.utils.instantiate(cfg)"),
    (checks.unsafe_code, "a.py", "from hydra.utils import instantiate as make"),
    (checks.unsafe_code, "a.py", "yaml.load(text, Loader=L)"),
    (checks.unsafe_code, "a.py", "os.system('x')"),
    (checks.forbidden_text, "a.py", "# weights_only=False"),
    (checks.forbidden_text, "conf/a.yaml", "_target_: os.system"),
    (checks.forbidden_text, "conf/a.yaml", "x: ${oc.env:HOME}"),
    (checks.deepspeed_launcher, "a.py", "subprocess.run(['deepspeed', 'train.py'])"),
    (checks.deepspeed_launcher, "a.py", "import deepspeed.launcher.runner"),
    (checks.deepspeed_launcher, "README.md", "deepspeed --num_gpus 8 train.py"),
    (checks.absolute_paths, "a.py", "open('/tmp/x')"),
    (checks.absolute_paths, "conf/a.yaml", "dir: /home/me/runs"),
    (checks.not_ascii, "a.py", "# caf\u00e9"),
    (checks.environment_reads, "a.py", "import os\nos.environ['MY_SWITCH']"),
    (checks.environment_reads, "a.py", "import os\nos.environ.get('MY_SWITCH', 1)"),
    (checks.environment_reads, "a.py", "import os\nos.getenv(name)"),
    (checks.loose_schemas, "a.py", "@dataclass(kw_only=True)\nclass AConfig:\n    x: int = 1"),
    (checks.loose_schemas, "a.py", "@dataclass\nclass AConfig:\n    x: int = 1"),
    (
        checks.loose_schemas,
        "a.py",
        "@dataclass(kw_only=True, slots=True)\nclass AConfig:\n    x: Literal['a'] = 'a'",
    ),
]


@pytest.mark.parametrize(("check", "path", "text"), BAD)
def test_the_rule_rejects_its_bad_example(check: Check, path: str, text: str) -> None:
    assert len(check(path, text)) >= 1


GOOD: list[tuple[Check, str, str]] = [
    (checks.long_file, "omni_train/a.py", "x = 1\n" * 500),
    (checks.long_functions, "a.py", LONG_FUNCTION.replace("    x = 1\n", "", 1)),
    (checks.wrong_arrows, "recipes/a.py", "from omni_train.engine.fit import fit"),
    (checks.wrong_arrows, "launch/a.py", "from data_pipelines.corpus import x"),
    (checks.wrong_arrows, "data_pipelines/a.py", "from omni_train.data.index import x"),
    (checks.wrong_arrows, "omni_train/a.py", "import recipes_of_someone_else"),
    (checks.unsafe_code, "a.py", "torch.load(p, weights_only=True)"),
    (checks.forbidden_text, "a.py", "num_target_tokens = 1"),
    (checks.unsafe_code, "a.py", '"""Nothing is instantiated."""'),
    (checks.deepspeed_launcher, "a.py", "import deepspeed\nengine, *_ = deepspeed.initialize()"),
    (checks.absolute_paths, "a.py", "x = root / 'home' / 'tmp/x' + 'a/tmp/b'"),
    (checks.environment_reads, "a.py", "import os\nos.environ['RANK']\nos.environ['X'] = '1'"),
    (
        checks.loose_schemas,
        "a.py",
        "@dataclass(kw_only=True, slots=True)\nclass AConfig:\n    x: int = 1",
    ),
]


@pytest.mark.parametrize(("check", "path", "text"), GOOD)
def test_the_rule_accepts_its_good_example(check: Check, path: str, text: str) -> None:
    assert check(path, text) == []


def test_torch_is_pinned_without_a_local_build() -> None:
    lines = (REPO / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert "torch==2.13.0" in pins
    assert all("==" in pin and not set(pin) & set("+@ /") for pin in pins)


@pytest.mark.parametrize("name", ["run", ".ci/run"])
def test_scripts_are_executable_bash(name: str) -> None:
    path = REPO / name
    assert path.stat().st_mode & 0o111
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    assert len(path.read_text().splitlines()) <= 60
