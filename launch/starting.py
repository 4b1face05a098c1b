"""What `omni-train launch` and `omni-train pipeline` do (their arguments: launch/jobs.py).

Reads the words, finds the stages, hands them to what starts them: local.py, slurm.py,
kubernetes.py. Nothing is sent to a cluster without --submit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import textwrap

from launch.cluster import ClusterConfig, Target, job_name, parse_words
from launch.local import child_environment
from launch.pipeline import (
    DONE_NAME,
    Kind,
    Node,
    PipelineConfig,
    State,
    as_dict,
    chosen,
    load_pipeline,
    nodes_of,
    picture,
    pipeline_names,
    record,
    set_aside,
)
from launch.slurm import StageJob
from launch.stages import REPO, recipe_names
from omni_train.config.errors import ConfigError
from omni_train.engine.exit_codes import ExitCode, RunError


def run_launch(args: argparse.Namespace) -> int:
    """Show or send a stage or a pipeline; return the exit code."""
    words = parse_words(args.overrides)
    size = words.cluster
    if words.target is Target.local and size != ClusterConfig():
        raise ConfigError(
            key="cluster",
            value="(given)",
            rule="it says what a job asks of a cluster, and target=local has none",
            remedy="leave it out, or choose target=slurm or target=kubernetes",
        )
    if args.what in pipeline_names():
        jobs = _jobs_of_pipeline(args.what, words.overrides)
    else:
        jobs = [_job_of_stage(args.what, words.overrides, size.nodes * size.ranks)]
    if words.target is Target.local:
        return _here(jobs, submit=args.submit)
    if words.target is Target.slurm:
        from launch import slurm

        if args.submit:
            slurm.submit(jobs, size)
        else:
            slurm.show(jobs, size)
        return 0
    from launch import kubernetes

    return kubernetes.send(jobs, size, name=job_name(args.what), submit=args.submit)


def _here(jobs: list[StageJob], *, submit: bool) -> int:
    from launch.local import count_gpus, run_recipe

    ranks = max(1, count_gpus())
    for job in jobs:
        if not submit:
            print(f"omni-train train {job.recipe} {' '.join(job.overrides)} run.dir={job.run_dir}")
            continue
        code = run_recipe(job.recipe, job.overrides, ranks=ranks, run_dir=job.run_dir)
        if code:
            return code
    return 0


def _job_of_stage(name: str, overrides: list[str], ranks: int) -> StageJob:
    from launch.local import check

    if name not in recipe_names():
        known = ", ".join([*recipe_names(), *pipeline_names()])
        raise ConfigError(
            key="launch", value=name, rule="there is no such stage", remedy=f"one of: {known}"
        )
    checked = check(name, overrides, ranks=ranks)
    if checked.code:
        raise RunError(ExitCode(checked.code), checked.text)
    run_dir = REPO / str(checked.values()["run"]["dir"])
    rest = [word for word in overrides if not word.startswith("run.dir=")]
    return StageJob(run_dir.name, name, rest, run_dir)


def _jobs_of_pipeline(name: str, overrides: list[str]) -> list[StageJob]:
    config = load_pipeline(name)
    nodes = nodes_of(config)
    first = [n for n in nodes.values() if n.config.kind is not Kind.recipe]
    if left := [node.name for node in first if node.state is not State.done]:
        raise ConfigError(
            key=name,
            value=", ".join(left),
            rule="data steps run here, not as jobs",
            remedy=f"omni-train pipeline run {name} --to {left[-1]}",
        )
    return [
        StageJob(
            node.name,
            node.config.recipe,
            [*node.overrides(config.experiment), *overrides],
            node.run_dir,
            tuple(p for p in node.config.parents if nodes[p].config.kind is Kind.recipe),
        )
        for node in nodes.values()
        if node.config.kind is Kind.recipe
    ]


def run_pipeline(args: argparse.Namespace) -> int:
    """List, show or run pipelines; return the exit code."""
    if args.action == "list":
        about = {name: load_pipeline(name).about for name in pipeline_names()}
        width = max(map(len, about))
        rows = [f"{name.ljust(width)}  {text}" for name, text in about.items()]
        print(json.dumps(about, indent=1) if args.json else "\n".join(rows))
        return 0
    config = load_pipeline(args.name or "")
    nodes = nodes_of(config)
    picked = chosen(nodes, first=args.first, last=args.last)
    shown = {node.name: nodes[node.name] for node in picked}
    if args.action == "show" or args.dry_run:
        if args.json:
            print(json.dumps(as_dict(config, shown), indent=1))
        else:
            print(picture(config, nodes))
            todo = [node.name for node in picked if node.state is not State.done]
            text = f"would run: {', '.join(todo) or 'nothing, all is done'}"
            print(f"\n{textwrap.fill(text, 78, subsequent_indent='  ')}")
        return 0
    return _run(config, picked, nodes, ranks=args.ranks)


def _run(
    config: PipelineConfig, picked: list[Node], nodes: dict[str, Node], *, ranks: int | None
) -> int:
    todo = [node for node in picked if node.state is not State.done]
    inside = {node.name for node in picked}
    for node in picked:
        for parent in node.config.parents:
            if parent not in inside and nodes[parent].state is not State.done:
                raise ConfigError(
                    key="--from",
                    value=node.name,
                    rule=f"it needs {parent}, which is {nodes[parent].state.value}",
                    remedy=f"start with --from {parent}",
                )
    for number, node in enumerate(todo, 1):
        print(f"[{number}/{len(todo)}] {node.name}", flush=True)
        if node.state is State.stale:
            print(f"  what it left lies in {set_aside(node)}")
        # Written first: a node that is stopped goes on only with the settings it began with.
        record(node)
        code = _run_node(config, node, ranks=ranks)
        if code:
            print(f"{node.name} ended with status {code}; the same command goes on from it")
            return code
    print(f"{len(todo)} run, {len(picked) - len(todo)} were done already")
    return 0


def _run_node(config: PipelineConfig, node: Node, *, ranks: int | None) -> int:
    from launch.local import count_gpus, run_recipe

    root = REPO / "runs" / config.experiment
    if node.config.kind is Kind.corpus:
        from launch.data import make_corpus

        return make_corpus(node.run_dir, seed=None, quick=False)
    if node.config.kind is Kind.command:
        return _run_command(config, node)
    if node.config.kind is not Kind.recipe:
        from launch.demo_work import Codes, Pairs, Ranking, Work

        works: dict[Kind, Work] = {
            Kind.codes: Codes(node.config.subset),
            Kind.ranking: Ranking(),
            Kind.pairs: Pairs(),
        }
        print(works[node.config.kind](root, print, quick=False))
        return 0
    return run_recipe(
        node.config.recipe,
        node.overrides(config.experiment),
        ranks=ranks or max(1, count_gpus()),
        run_dir=node.run_dir,
    )


def _run_command(config: PipelineConfig, node: Node) -> int:
    """Run a command of ours in a process of its own."""
    place = f"runs/{config.experiment}"
    words = [word.replace("{root}", place) for word in node.config.args]
    command = [sys.executable, "-m", "launch", *words]
    code = subprocess.run(command, cwd=REPO, env=child_environment(), check=False).returncode
    if code == 0:
        (node.run_dir / DONE_NAME).touch()
    return code
