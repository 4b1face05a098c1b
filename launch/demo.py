"""`omni-train demo`: corpus, text LM, both stage-1 towers in two phases, and their evaluation.

`--thinker` goes on with stages 2 to 4, `--talker` with the codec and the Talker, `--preferences`
from there with DPO and a new voice, `--controls` with the comparisons behind the claims, each from
the checkpoints of what came before.

Every stage is the recipe that a cluster would run, on two ZeRO-3 CPU ranks, with settings from
`conf/experiment/demo/`. A stage that is done is not run again, so the same command continues where
it was stopped. This module starts stages, follows their event logs and judges the outcome.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from launch.data import make_corpus
from launch.demo_report import keep_audio, print_summary, summarise, write_summary
from launch.demo_work import Codes, Pairs, Ranking, Work
from launch.local import run_recipe
from launch.report import write_page
from launch.stages import REPO
from omni_train.config.errors import ConfigError, DataError
from omni_train.config.names import NAME
from omni_train.engine.exit_codes import ExitCode
from omni_train.tracking.events import read_new

RANKS = 2
_NEEDED = ("espeakng_loader", "pocketsphinx")


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the demo.

    Args:
        name: of its run directory, its experiment file and its row in the tables.
        recipe: script under `recipes/`.
        quick_steps: global steps under `--quick`; 0 for what has none.
        quick_overrides: what differs under `--quick` besides.
        experiment: file, where it is another stage's.
        overrides: what differs from that file.
    """

    name: str
    recipe: str
    quick_steps: int = 0
    experiment: str = ""
    overrides: tuple[str, ...] = ()
    quick_overrides: tuple[str, ...] = ()


def _speech_of(name: str) -> Stage:
    """The evaluation of another stage's Talker, on the same requests with the same seeds."""
    return Stage(
        f"evaluate_{name}",
        "evaluate",
        experiment="evaluate_talker_icl",
        overrides=(f"model.init_from=runs/${{run.experiment}}/{name}",),
    )


# What starts from what stands in the experiments, as `model.init_from`.
STAGES: tuple[Stage | Work, ...] = (
    Stage("text_lm", "text_lm", quick_steps=8),
    Stage("stage1_audio_adapter", "stage1_audio", quick_steps=4),
    Stage("stage1_audio_encoder", "stage1_audio", quick_steps=6),
    Stage("stage1_vision_adapter", "stage1_vision", quick_steps=4),
    Stage("stage1_vision_encoder", "stage1_vision", quick_steps=6),
    Stage("evaluate_audio_adapter", "evaluate"),
    Stage("evaluate_audio_encoder", "evaluate"),
    Stage("evaluate_vision_encoder", "evaluate"),
)
# The whole Thinker: pretraining on all kinds of data, then dialogues.
THINKER: tuple[Stage | Work, ...] = (
    Stage("stage2_multimodal", "stage2_multimodal", quick_steps=4),
    Stage("stage3_long", "stage3_long", quick_steps=4),
    Stage("evaluate_stage3", "evaluate"),
    Stage("thinker_sft", "thinker_sft", quick_steps=4),
    Stage("evaluate_thinker_sft", "evaluate"),
)
TALKER: tuple[Stage | Work, ...] = (
    Stage("speech_codec", "speech_codec"),
    Codes("train/speech_noisy"),
    Stage("talker_icl", "talker_icl", quick_steps=6),
    Stage("evaluate_talker_icl", "evaluate"),
)
# Candidates, their ranking, pairs, DPO and what it is compared with, and a new voice.
PREFERENCES: tuple[Stage | Work, ...] = (
    Stage(
        "talker_candidates",
        "talker_candidates",
        quick_overrides=(
            "requests.path=runs/${run.experiment}/codes/train/speech_noisy",
            "requests.recordings=true",
            "requests.sampling.num_samples=2",
            "requests.limit=8",
        ),
    ),
    Ranking(),
    Pairs(),
    Stage("talker_dpo", "talker_dpo", quick_steps=4),
    Stage(
        "talker_sft_control",
        "talker_dpo",
        quick_steps=4,
        experiment="talker_dpo",
        overrides=(
            "preference.loss=sft",
            "preference.sft_weight=0",
            "reference_dir=runs/${run.experiment}/talker_dpo/reference",
        ),
    ),
    _speech_of("talker_dpo"),
    _speech_of("talker_sft_control"),
    Codes("train/speaker"),
    Stage("talker_speaker_sft", "talker_speaker_sft", quick_steps=4),
    Stage(
        "evaluate_talker_speaker",
        "evaluate",
        # The small corpus has three recordings of a voice.
        quick_overrides=("speech.new.voices.per_voice=1",),
    ),
)


def _alignment(arm: str) -> Stage:
    return Stage(
        f"alignment_{arm}",
        "alignment_probe",
        quick_steps=4,
        experiment="alignment_probe",
        overrides=(f"arm={arm}",),
        quick_overrides=("heldout.every_steps=2",),
    )


# What is on screen while a word is heard, with three kinds of order and positions; then the same
# Talker on the same speech with the right texts.
CONTROLS: tuple[Stage | Work, ...] = (
    *map(_alignment, ("tmrope", "interleaved_1d", "video_first_1d")),
    Codes("train/speech"),
    Stage(
        "talker_icl_clean",
        "talker_icl",
        quick_steps=6,
        experiment="talker_icl",
        overrides=("data.sources.speech.path=runs/${run.experiment}/codes/train/speech",),
    ),
    _speech_of("talker_icl_clean"),
)


ALL = STAGES + THINKER + TALKER + PREFERENCES + CONTROLS


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
            detail = f"loss {float(last['loss']):.3f}"
            if "tokens_per_s" in last:
                detail += f"  {last['tokens_per_s']:.0f} tok/s"
            self.progress.update(self.task, total=total, completed=last["step"], detail=detail)
        elif "evaluation" in self.shown:
            last = self.shown["evaluation"]
            detail = f"{last['task']} {last['metric']} {float(last['value']):.3f}"
            self.progress.update(self.task, total=1, completed=1, detail=detail)


def run_demo(
    *,
    quick: bool,
    thinker: bool = False,
    talker: bool = False,
    preferences: bool = False,
    controls: bool = False,
    fresh: bool = False,
    name: str | None = None,
    seed: int | None = None,
) -> int:
    """Run the demo and return the exit code; `summary.json` holds the figures.

    Args:
        quick: few steps on a small corpus, and only the structural checks.
        thinker: go on with stages 2 and 3 and the dialogues.
        talker: go on with the codec and the Talker; what the demo has done is not done again.
        preferences: go on from there with preference training and a new voice.
        controls: then run the comparisons too.
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
    # The name becomes a path and a Hydra value.
    if not NAME.fullmatch(root.name):
        console.print(f"--name={name}: letters, digits, . _ and - make a name")
        return int(ExitCode.usage)
    steps = STAGES + (THINKER if thinker else ())
    steps += TALKER if talker or preferences or controls else ()
    steps += (PREFERENCES if preferences else ()) + (CONTROLS if controls else ())
    for folder in [*(step.name for step in ALL), "codes"] if fresh else ():
        shutil.rmtree(root / folder, ignore_errors=True)
    started = time.monotonic()
    with _bars(console) as progress:
        code = _make_corpus(root, progress, quick=quick, seed=seed)
        for step in steps if code == 0 else ():
            if isinstance(step, Stage):
                code = _run_stage(step, root, progress, quick=quick, seed=seed)
            else:
                code = _do_work(step, root, progress, quick=quick)
            if code != 0:
                break
    if code != 0:
        return code
    summary = summarise(root, stages=_trained(root), seconds=time.monotonic() - started)
    write_summary(root, summary)
    keep_audio(root)
    # Of what a quick run was trained on, a few samples, a picture would say little.
    page, _ = write_page(str(root), pictures=not quick)
    console.print(f"curves, tables and sound: {page}")
    return print_summary(console, summary, root, quick=quick)


def _trained(root: Path) -> list[str]:
    """Training stages that are done; what an earlier call added stays in the summary."""
    names = [s.name for s in ALL if isinstance(s, Stage) and s.quick_steps]
    states = {name: root / name / "state.json" for name in names}
    return [
        name
        for name, path in states.items()
        if path.exists() and json.loads(path.read_bytes())["status"] == "done"
    ]


def _bars(console: Console) -> Progress:
    """A line for each stage."""
    columns = (
        TextColumn("{task.description}", table_column=Column(min_width=25, no_wrap=True)),
        BarColumn(bar_width=10),
        TextColumn("{task.completed:.0f}", table_column=Column(min_width=4, justify="right")),
        TimeElapsedColumn(table_column=Column(min_width=7)),
        TextColumn("{task.fields[detail]}", table_column=Column(no_wrap=True)),
    )
    return Progress(*columns, console=console, refresh_per_second=4)


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


def _do_work(step: Work, root: Path, progress: Progress, *, quick: bool) -> int:
    """Do what no recipe does, or find it done."""
    from launch.failures import describe

    task = progress.add_task(step.name, total=None, detail="")
    try:
        detail = step(root, lambda line: progress.update(task, detail=line), quick=quick)
    except (ConfigError, DataError, OSError) as error:
        code, text = describe(error)
        progress.console.print(text)
        return int(code)
    progress.update(task, total=1, completed=1, detail=detail)
    return 0


def overrides_of(stage: Stage, root: Path, *, quick: bool, seed: int | None) -> list[str]:
    """Return what a stage's command line says; the directory is known by the experiment's name."""
    overrides = [f"experiment=demo/{stage.experiment or stage.name}"]
    overrides += [f"run.experiment={root.name}", *stage.overrides]
    if quick and stage.quick_steps:
        overrides.append(f"fit.max_steps={stage.quick_steps}")
    overrides += stage.quick_overrides if quick else ()
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
    # A stage without a known number of steps never fills its bar.
    progress.stop_task(follow.task)
    if code != 0:
        log = run_dir / "logs" / "rank-00000.out"
        if log.exists():
            progress.console.print(log.read_text(encoding="utf-8", errors="replace")[-3000:])
    return code
