"""`omni-train demo`: corpus, text LM, both stage-1 towers in two phases each, and their evaluation.

Every stage is the recipe that a cluster would run, on two ZeRO-3 CPU ranks, with settings from
`conf/experiment/demo/`. A stage that is done is not run again, so the same command continues where
it was stopped. This module starts stages, follows their event logs and judges the outcome.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from launch.data import make_corpus
from launch.demo_report import print_summary, summarise, write_summary
from launch.local import run_recipe
from launch.stages import REPO
from omni_train.engine.exit_codes import ExitCode
from omni_train.tracking.events import read_new

RANKS = 2
# The name becomes a path and a Hydra value.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_NEEDED = ("espeakng_loader", "pocketsphinx")


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the demo.

    Args:
        name: of its run directory, its experiment file and its row in the tables.
        recipe: script under `recipes/`.
        quick_steps: global steps under `--quick`; 0 for an evaluation.
    """

    name: str
    recipe: str
    quick_steps: int = 0


# What starts from what stands in the experiments, as `model.init_from`.
STAGES = (
    Stage("text_lm", "text_lm", quick_steps=8),
    Stage("stage1_audio_adapter", "stage1_audio", quick_steps=4),
    Stage("stage1_audio_encoder", "stage1_audio", quick_steps=6),
    Stage("stage1_vision_adapter", "stage1_vision", quick_steps=4),
    Stage("stage1_vision_encoder", "stage1_vision", quick_steps=6),
    Stage("evaluate_audio_adapter", "evaluate"),
    Stage("evaluate_audio_encoder", "evaluate"),
    Stage("evaluate_vision_encoder", "evaluate"),
)


@dataclass(slots=True)
class _Follower:
    """Shows a running stage as one line, from what is new in its event log."""

    stage: Stage
    run_dir: Path
    progress: Progress
    task: Any = None
    seen: int = 0
    shown: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> None:
        if self.task is None:
            self.task = self.progress.add_task(self.stage.name, total=None, detail="starting")
        events, self.seen = read_new(self.run_dir / "events.jsonl", self.seen)
        if not events:
            return
        self.shown |= {event["kind"]: event for event in events}
        if "step" in self.shown:
            last = self.shown["step"]
            total = self.shown.get("fit_start", {}).get("max_steps")
            detail = f"loss {float(last['loss']):.3f}  {last['tokens_per_s']:.0f} tok/s"
            self.progress.update(self.task, total=total, completed=last["step"], detail=detail)
        elif "evaluation" in self.shown:
            last = self.shown["evaluation"]
            detail = f"{last['task']} {last['metric']} {float(last['value']):.3f}"
            self.progress.update(self.task, total=1, completed=1, detail=detail)


def run_demo(
    *, quick: bool, fresh: bool = False, name: str | None = None, seed: int | None = None
) -> int:
    """Run the demo and return the exit code; `summary.json` holds the figures.

    Args:
        quick: few steps on a small corpus, and only the structural checks.
        fresh: remove what an earlier demo trained; its corpus is kept where it still fits.
        name: directory under `runs/`; where it is None, `demo` or `demo-quick`, and the seed.
        seed: of the corpus, its split into train and held-out, and the weights; None is 0, on
            whose held-out content the settings were chosen.
    """
    console = Console()
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        console.print(f"the demo needs {', '.join(missing)}: pip install 'omni-train[demo]'")
        return int(ExitCode.missing_input)
    usual = ("demo-quick" if quick else "demo") + ("" if seed is None else f"-seed{seed}")
    root = REPO / "runs" / (name or usual)
    if not _NAME.fullmatch(root.name):
        console.print(f"--name={name}: letters, digits, . _ and - make a name")
        return int(ExitCode.usage)
    for stage in STAGES if fresh else ():
        shutil.rmtree(root / stage.name, ignore_errors=True)
    started = time.monotonic()
    columns = (
        TextColumn("{task.description}", table_column=Column(min_width=23, no_wrap=True)),
        BarColumn(bar_width=10),
        TextColumn("{task.completed:.0f}", table_column=Column(min_width=4, justify="right")),
        TimeElapsedColumn(table_column=Column(min_width=7)),
        TextColumn("{task.fields[detail]}", table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        code = _make_corpus(root, progress, quick=quick, seed=seed)
        for stage in STAGES if code == 0 else ():
            code = _run_stage(stage, root, progress, quick=quick, seed=seed)
            if code != 0:
                break
    if code != 0:
        return code
    summary = summarise(
        root,
        stages=[stage.name for stage in STAGES if stage.recipe != "evaluate"],
        evaluations=[stage.name for stage in STAGES if stage.recipe == "evaluate"],
        seconds=time.monotonic() - started,
    )
    write_summary(root, summary)
    return print_summary(console, summary, root, quick=quick)


def _make_corpus(root: Path, progress: Progress, *, quick: bool, seed: int | None) -> int:
    """Generate the corpus, or find it finished."""
    task = progress.add_task("corpus", total=None, detail="speech, pictures, clips, text")
    folder, log = root / "corpus", root / "corpus.log"
    root.mkdir(parents=True, exist_ok=True)
    code = make_corpus(folder, seed=seed, quick=quick, log=log)
    if code != 0:
        progress.console.print(log.read_text(encoding="utf-8", errors="replace")[-2000:])
        return code
    facts = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    kept = [name for name, voice in facts["voices"].items() if voice["kept"]]
    detail = f"{len(kept)} of {len(facts['voices'])} voices understood"
    progress.update(task, total=1, completed=1, detail=detail)
    return 0


def overrides_of(stage: Stage, root: Path, *, quick: bool, seed: int | None) -> list[str]:
    """Return what a stage's command line says; the directory is known by the experiment's name."""
    overrides = [f"experiment=demo/{stage.name}", f"run.experiment={root.name}"]
    if quick and stage.quick_steps:
        overrides.append(f"fit.max_steps={stage.quick_steps}")
    if seed is not None:
        overrides.append(f"run.seed={seed}")
    return overrides


def _run_stage(
    stage: Stage, root: Path, progress: Progress, *, quick: bool, seed: int | None
) -> int:
    run_dir = root / stage.name
    follow = _Follower(stage, run_dir, progress)
    code = run_recipe(
        stage.recipe,
        overrides_of(stage, root, quick=quick, seed=seed),
        ranks=RANKS,
        run_dir=run_dir,
        follow=follow,
    )
    follow()
    if code != 0:
        log = run_dir / "logs" / "rank-00000.out"
        if log.exists():
            progress.console.print(log.read_text(encoding="utf-8", errors="replace")[-3000:])
    return code
