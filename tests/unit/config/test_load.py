from __future__ import annotations

import os
import random
import string
import subprocess
import sys
from pathlib import Path

import pytest

from omni_train.config.errors import ConfigError
from omni_train.config.keys import dotted_keys
from omni_train.config.load import compose_config
from omni_train.config.recipe import check_arguments
from omni_train.config.register import Root, register_root


def refuse(root: Root, conf_dir: Path, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        compose_config(root, overrides, conf_dir=conf_dir)
    error = caught.value
    assert error.key
    assert error.rule
    assert error.remedy
    assert "+" not in error.remedy or "to add it" in error.remedy
    return error


def test_composes_to_typed_objects(root: Root, conf_dir: Path) -> None:
    cfg = compose_config(root, ["optim.warmup_steps=3"], conf_dir=conf_dir)
    assert type(cfg) is root.schema
    assert (cfg.model.hidden_size, cfg.num_steps, cfg.optim.warmup_steps) == (8, 4, 3)
    assert cfg.data.sources["demo"].path == "shards"
    assert cfg.data.sources["demo"].weight == 1.0


def test_experiment_overrides_a_group(root: Root, conf_dir: Path) -> None:
    cfg = compose_config(root, ["experiment=toy/debug"], conf_dir=conf_dir)
    assert (cfg.model.hidden_size, cfg.model.precision.name, cfg.num_steps) == (64, "bf16", 2)


def test_a_second_directory_goes_first(root: Root, conf_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "own.yaml").write_text("hidden_size: 77\n")
    cfg = compose_config(root, ["model=own"], conf_dir=conf_dir, extra_dir=tmp_path / "mine")
    assert cfg.model.hidden_size == 77


def test_mapping_takes_new_names(root: Root, conf_dir: Path) -> None:
    overrides = ["+optim.group_rates.llm=2e-4", "+data.sources={more: {path: x}}"]
    cfg = compose_config(root, overrides, conf_dir=conf_dir)
    assert cfg.optim.group_rates == {"llm": 2e-4}
    assert cfg.data.sources["more"].path == "x"
    assert cfg.data.sources["more"].weight == 1.0


@pytest.mark.parametrize(
    ("override", "key", "in_message"),
    [
        ("optim.learning_rte=1", "optim.learning_rte", "did you mean optim.learning_rate?"),
        ("learning_rate=1", "learning_rate", "did you mean optim.learning_rate?"),
        ("mdoel=tiny", "mdoel", "did you mean model?"),
        ("+extra=1", "extra", "no such key"),
        ("+model.extra=1", "model.extra", "no such key"),
        ("++model.extra=1", "model.extra", "no such key"),
        ("+data.sources.demo.wieght=2", "data.sources.demo.wieght", "did you mean"),
        ("data.sources.new.path=x", "data.sources.new.path", "'+data.sources={new: {path: "),
        ("+data.sources.new.path=x", "data.sources.new.path", "'+data.sources={new: {path: x}}'"),
        ("optim.group_rates.llm=1", "optim.group_rates.llm", "write +optim.group_rates.llm="),
        ("+num_steps=3", "+num_steps", "write num_steps=3"),
        ("~optim", "optim", "cannot be deleted"),
        ("model=lage", "model", "did you mean large?"),
        ("experiment=nope", "experiment", "toy/debug"),
        ("model.hidden_size=abc", "model.hidden_size", "type int"),
        ("model.precision=fp8", "model.precision", "use one of: bf16, fp32"),
        ("num_steps=null", "num_steps", "type int"),
        ("num_steps=???", "num_steps", "required"),
        ("model.hidden_size=0", "model.hidden_size", "must be at least 1"),
        ("optim={learning_rat: 3}", "optim.learning_rat", "did you mean optim.learning_rate?"),
        ("model.names=[{a: 1}]", "model.names.0", "must be of type str"),
        ("num_steps===", "num_steps", "not an override"),
        ("no_equals_sign", "no_equals_sign", "not an override"),
        ("model@data=tiny", "model@data", "no such key"),
        ("note='${oc.env:HOME}'", "note", "environment"),
        ("model.names=['${oc.env:HOME}']", "model.names.0", "environment"),
        ("hydra.job_logging=x", "hydra.job_logging", "cannot be set"),
        ("hydra/launcher=x", "hydra/launcher", "cannot be set"),
    ],
)
def test_each_mistake_names_key_rule_and_remedy(
    root: Root, conf_dir: Path, override: str, key: str, in_message: str
) -> None:
    error = refuse(root, conf_dir, override)
    assert error.key == key
    assert in_message in str(error)


@pytest.mark.parametrize(
    "override",
    [
        "+_target_=os.system",
        "+model._target_=os.system",
        "++optim._target_=logging.os.system",
        "model={_target_: os.system}",
        "+optim.group_rates._target_=3",
        "model.names=[{_target_: os.system}]",
        "hydra.sweeper._target_=os.system",
        "+optim._partial_=true",
    ],
)
def test_naming_code_is_refused(root: Root, conf_dir: Path, override: str) -> None:
    assert "code is never chosen" in refuse(root, conf_dir, override).rule


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model/evil.yaml", "_target_: os.system\n"),
        ("model/evil.yaml", '"\\x5ftarget_": os.system\n'),
        ("model/evil.yaml", "hidden_size: !!python/object/apply:os.getpid []\n"),
        ("model/evil.yaml", "names: &a [x]\nnote: *a\n"),
        ("experiment/evil.yaml", "# @package hydra.callbacks\nx:\n  y: 1\n"),
        ("experiment/evil.yaml", "# @package hydra.job_logging\nhandlers: {x: {class: a.B}}\n"),
    ],
)
def test_files_that_name_code_are_refused(root: Root, conf_dir: Path, name: str, text: str) -> None:
    (conf_dir / name).write_text(text)
    group, _, option = name.removesuffix(".yaml").partition("/")
    error = refuse(root, conf_dir, f"{group}={option}")
    assert any(word in error.rule for word in ("code", "alias", "tags", "plugins"))


def test_unknown_key_in_a_group_file_is_found(root: Root, conf_dir: Path) -> None:
    (conf_dir / "model" / "bad.yaml").write_text("hiden_size: 8\n")
    error = refuse(root, conf_dir, "model=bad")
    assert error.key == "model.hiden_size"
    assert "did you mean model.hidden_size?" in str(error)


def test_a_required_key_of_a_section_that_no_file_names(root: Root, conf_dir: Path) -> None:
    (conf_dir / "toy.yaml").write_text("defaults:\n  - toy_schema\n  - _self_\nnum_steps: 1\n")
    error = refuse(root, conf_dir)
    assert (error.key, error.value) == ("run.dir", "???")
    assert compose_config(root, ["run.dir=here"], conf_dir=conf_dir).run.dir == "here"


def test_every_missing_key_is_named_and_showing_needs_none(root: Root, conf_dir: Path) -> None:
    (conf_dir / "toy.yaml").write_text("defaults:\n  - toy_schema\n  - _self_\n")
    both = "add num_steps=VALUE run.dir=VALUE"
    assert refuse(root, conf_dir).remedy == both
    with pytest.raises(ConfigError, match=both):
        check_arguments(root, ["--cfg", "job", "--resolve"], conf_dir)
    assert check_arguments(root, ["--cfg", "job"], conf_dir) is None
    with pytest.raises(ConfigError, match="did you mean num_steps"):
        check_arguments(root, ["--cfg", "job", "num_step=1"], conf_dir)


def test_missing_file(root: Root, conf_dir: Path) -> None:
    (conf_dir / "toy.yaml").write_text("defaults: [toy_schema, {model: gone}, _self_]\n")
    assert "no such configuration file" in refuse(root, conf_dir).rule


def test_a_root_without_schema_is_refused(root: Root, conf_dir: Path) -> None:
    (conf_dir / "toy.yaml").write_text("num_steps: 1\n")
    assert "toy_schema" in refuse(root, conf_dir).remedy


def test_schema_without_slots_is_refused() -> None:
    from dataclasses import dataclass

    @dataclass(kw_only=True)
    class Loose:
        size: int = 1

    with pytest.raises(TypeError, match="slots"):
        register_root("loose", Loose)


def typo(rng: random.Random, key: str) -> str:
    """Return `key` with one mistake of the kinds that fingers make."""
    at = rng.randrange(len(key))
    while not key[at].isalpha():
        at = rng.randrange(len(key))
    kind = rng.choice(["drop", "double", "swap", "wrong", "dash", "upper"])
    if kind == "drop":
        return key[:at] + key[at + 1 :]
    if kind == "double":
        return key[:at] + key[at] + key[at:]
    if kind == "swap" and at + 1 < len(key) and key[at + 1].isalpha():
        return key[:at] + key[at + 1] + key[at] + key[at + 2 :]
    if kind == "dash" and "_" in key:
        return key.replace("_", "-", 1)
    if kind == "upper":
        return key[:at] + key[at].upper() + key[at + 1 :]
    return key[:at] + rng.choice(string.ascii_lowercase) + key[at + 1 :]


def test_fifty_typos_get_the_right_suggestion(root: Root, conf_dir: Path) -> None:
    rng = random.Random(7)
    known = [key for key in dotted_keys(root.schema) if "*" not in key]
    right, made = 0, 0
    while made < 50:
        real = rng.choice(known)
        wrong = typo(rng, real)
        if wrong in known:
            continue
        made += 1
        error = refuse(root, conf_dir, f"{wrong}=1")
        right += f"did you mean {real}?" in str(error)
    assert right >= 48, f"{right} of 50"


APP = """
from __future__ import annotations
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
import conftest
from omegaconf import DictConfig, OmegaConf
from omni_train.config.recipe import recipe_main

@recipe_main(conftest.ToyConfig, "toy", conftest._validate, conf_dir=Path("conf").resolve())
def main(raw: DictConfig) -> None:
    cfg = OmegaConf.to_object(raw)
    if cfg.note == "crash":
        raise RuntimeError("boom")
    if cfg.note == "missing":
        raise FileNotFoundError("gone")
    print("ran", cfg.num_steps, cfg.model.hidden_size)

if __name__ == "__main__":
    main()
"""


def start(app_dir: Path, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    repo = Path(__file__).parents[3]
    return subprocess.run(
        [sys.executable, "app.py", *arguments],
        cwd=app_dir,
        env={**os.environ, "PYTHONPATH": str(repo), "WORLD_SIZE": str(ranks)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def app_dir(conf_dir: Path) -> Path:
    here = conf_dir.parent
    (here / "app.py").write_text(APP)
    (here / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    return here


def test_recipe_runs_and_leaves_no_litter(app_dir: Path) -> None:
    before = {path.name for path in app_dir.iterdir()}
    done = start(app_dir, "num_steps=6", "model=large")
    assert (done.returncode, done.stdout) == (0, "ran 6 64\n"), done.stderr
    assert {path.name for path in app_dir.iterdir()} - before <= {"__pycache__"}


def test_recipe_shows_its_config(app_dir: Path) -> None:
    done = start(app_dir, "--cfg", "job", "num_steps=6")
    assert done.returncode == 0, done.stderr
    assert "num_steps: 6" in done.stdout


def test_recipe_sweeps(app_dir: Path) -> None:
    done = start(app_dir, "--multirun", "num_steps=1,2", "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ran") == 2
    assert "ran 2 8" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "ranks", "code", "message"),
    [
        (("num_stps=6",), 1, 2, "did you mean num_steps?"),
        (("num_steps=3",), 2, 2, "multiple of the 2 ranks"),
        (("--cfg", "job", "num_stps=6"), 1, 2, "did you mean num_steps?"),
        (("--multirun", "model.hidden_size=0,1"), 1, 2, "must be at least 1"),
        (("note=missing",), 1, 66, "gone"),
        (("note=crash",), 1, 70, "boom"),
    ],
)
def test_recipe_ends_with_the_right_code(
    app_dir: Path, arguments: tuple[str, ...], ranks: int, code: int, message: str
) -> None:
    done = start(app_dir, *arguments, ranks=ranks)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert ("Traceback" in done.stderr) == (code in {66, 70})
