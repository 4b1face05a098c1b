"""Pipelines: files that hold together, states by fingerprint, and a run from any node on."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from launch import demo, pipeline, starting
from launch.cli import main
from launch.pipeline import Kind, load_pipeline, nodes_of, picture, pipeline_names
from omni_train.config.errors import ConfigError
from omni_train.config.load import CONF_DIR, check_overrides, compose_config
from omni_train.config.register import find_root

NAMES = ["controls", "demo", "full_3b", "full_7b", "sft_only", "talker_dpo_released"]
CHAIN = """
about: three stages
experiment: chain
nodes:
  one: {recipe: text_lm, experiment: demo/text_lm}
  two: {recipe: stage1_audio, overrides: [phase=adapter], inputs: {model.init_from: one}}
  three: {recipe: evaluate, inputs: {model.init_from: two/checkpoints}, after: [one]}
  four: {recipe: talker_icl, after: [one]}
"""


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline of four nodes whose runs lie below the returned directory."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "chain.yaml").write_text(CHAIN)
    load, nodes = load_pipeline, nodes_of
    root = tmp_path / "runs" / "chain"
    for module in (pipeline, starting):
        monkeypatch.setattr(module, "load_pipeline", lambda n: load(n, tmp_path / "conf"))
        monkeypatch.setattr(module, "nodes_of", lambda config: nodes(config, root))
    return root


def states(root: Path) -> dict[str, str]:
    config = pipeline.load_pipeline("chain")
    return {name: node.state.value for name, node in pipeline.nodes_of(config).items()}


def test_what_is_shipped() -> None:
    assert pipeline_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_node_s_settings_exist(name: str) -> None:
    config = load_pipeline(name)
    for node in nodes_of(config).values():
        if node.config.kind is not Kind.recipe:
            continue
        importlib.import_module(f"recipes.{node.config.recipe}")
        root = find_root(node.config.recipe)
        overrides = [*node.overrides(config.experiment), f'run.dir="{node.run_dir}"']
        check_overrides(root, overrides, [CONF_DIR])
        if node.config.experiment:
            assert compose_config(root, overrides).run.experiment == config.experiment


def test_the_demo_s_pipelines_are_its_stages_in_order() -> None:
    names = [*load_pipeline("demo").nodes, *load_pipeline("controls").nodes]
    assert set(names) - {"corpus"} == {step.name for step in demo.ALL}
    for step in demo.ALL:
        config = (load_pipeline("demo").nodes | load_pipeline("controls").nodes)[step.name]
        if isinstance(step, demo.Stage):
            assert config.recipe == step.recipe
            assert config.experiment == f"demo/{step.experiment or step.name}"


def test_the_picture_names_every_node_with_its_state_and_needs() -> None:
    config = load_pipeline("full_7b")
    shown = picture(config, nodes_of(config))
    for name in config.nodes:
        assert f"- {name}  " in shown
    assert "no public source provides" in shown
    assert max(map(len, shown.splitlines())) <= 100


def finish(config: Any, node: Any, *, ranks: int | None) -> int:
    """What a recipe leaves."""
    node.run_dir.mkdir(parents=True, exist_ok=True)
    (node.run_dir / "state.json").write_text(json.dumps({"status": "done"}))
    return 0


def test_a_chain_is_run_restarted_and_found_stale(
    chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(config: Any, node: Any, *, ranks: int | None) -> int:
        ran.append(node.name)
        return finish(config, node, ranks=ranks) if node.name != "three" else 65

    monkeypatch.setattr(starting, "_run_node", run)
    assert set(states(chain).values()) == {"to do"}
    assert main(["pipeline", "run", "chain", "--from", "two"]) == 2
    assert "it needs one" in capsys.readouterr().err
    # A failing node stops the chain; the same command goes on from it.
    assert main(["pipeline", "run", "chain"]) == 65
    assert ran == ["one", "two", "three"]
    monkeypatch.setattr(
        starting, "_run_node", lambda c, n, ranks: ran.append(n.name) or finish(c, n, ranks=ranks)
    )
    assert main(["pipeline", "run", "chain", "--to", "three"]) == 0
    assert ran[3:] == ["three"]
    assert states(chain) == {"one": "done", "two": "done", "three": "done", "four": "to do"}
    # A setting of `two` changes: it and what follows are stale, the rest is not.
    path = chain.parents[1] / "conf" / "chain.yaml"
    path.write_text(CHAIN.replace("phase=adapter", "phase=encoder") + "# a comment\n")
    assert states(chain) == {"one": "done", "two": "stale", "three": "stale", "four": "to do"}
    assert main(["pipeline", "run", "chain", "--dry-run", "--from", "two", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))["nodes"]
    assert [row["name"] for row in rows] == ["two", "three"]
    assert main(["pipeline", "run", "chain", "--from", "two"]) == 0
    assert ran[4:] == ["two", "three"]
    # Nothing is deleted.
    assert sorted(p.name for p in (chain / "stale").iterdir()) == ["three-0", "two-0"]
    assert states(chain)["three"] == "done"
    # A run that was killed says that it runs, but nobody owns it.
    (chain / "two" / "state.json").write_text('{"status": "running"}')
    assert states(chain)["two"] == "died"
    (chain / "two" / "state.json").write_text('{"status": "done"}')
    # Whoever asks once more is told that there was nothing to do.
    capsys.readouterr()
    assert main(["pipeline", "run", "chain", "--from", "two"]) == 0
    assert capsys.readouterr().out == "0 run, 2 were done already\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("recipe: text_lm", "recipe: text_lmm"), "no such recipe"),
        (("inputs: {model.init_from: one}", "inputs: {model.init_from: three}"), "comes after"),
        (("experiment: demo/text_lm", "experimant: demo/text_lm"), "did you mean"),
        (("experiment: chain", "experiment: ../chain"), "a name is 1 to 63 letters"),
        (("about: three stages", "about: &a three\nx: *a"), "aliases are refused"),
        (("after: [one]}\n  four", "after: {a: b}}\n  four"), "chain"),
        (("recipe: talker_icl, after", "kind: command, args: [demo], after"), "talker group"),
    ],
)
def test_a_file_that_does_not_hold_together_is_refused(
    tmp_path: Path, change: tuple[str, str], said: str
) -> None:
    (tmp_path / "chain.yaml").write_text(CHAIN.replace(*change))
    with pytest.raises(ConfigError, match=said):
        load_pipeline("chain", tmp_path)


def test_unknown_names_are_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["pipeline", "show", "demmo"]) == 2
    assert main(["pipeline", "run", "demo", "--from", "text_ml"]) == 2
    said = capsys.readouterr().err
    assert "did you mean demo?" in said
    assert "did you mean text_lm?" in said
