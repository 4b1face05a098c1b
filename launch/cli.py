"""The command line: parses arguments and hands over. Commands import late, so that help is quick.

Exit codes are those of DESIGN.md section 5: 0 done, 2 usage, 65 bad data, 66 missing input, 70 bug,
73 locked, 74 disk, 75 preempted, 76 non-finite, 77 refused, 79 hang.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence

_USAGE = 2

Add = Callable[..., argparse.ArgumentParser]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    from launch.checkpoint import add_checkpoint
    from launch.tools import add_tools

    parser = argparse.ArgumentParser(
        prog="omni-train",
        description="Trains Qwen2.5-Omni stage by stage on DeepSpeed.",
        epilog=(
            "examples:\n"
            "  omni-train demo --quick                    the whole chain with few steps\n"
            "  omni-train stages                          what each stage trains, and from what\n"
            "  omni-train train stage1_audio run.dir=runs/audio --ranks 2\n"
            "exit codes: 0 done, 2 usage, 65 bad data, 66 missing input, 70 bug, 73 locked,\n"
            "            74 disk, 75 preempted, 76 non-finite, 77 refused, 79 hang"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, *examples: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog="\n  ".join(["examples:", *examples]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    _add_checks(add)
    _add_runs(add)
    add_tools(add)
    _add_export(add)
    _add_data(add)
    _add_talker(add)
    add_checkpoint(add)
    from launch.bench import add_bench
    from launch.chaos import add_chaos
    from launch.jobs import add_jobs
    from launch.report import add_report
    from launch.track import add_track

    add_bench(add)
    add_jobs(add)
    add_report(add)
    add_track(add)
    add_chaos(add)
    return parser


def _add_checks(add: Add) -> None:
    demo = add(
        "demo",
        "Make a small corpus and train the recipe on two CPU ranks; no GPU, no network.",
        "omni-train demo",
        "omni-train demo --quick",
        "omni-train demo --thinker",
        "omni-train demo --talker",
        "omni-train demo --preferences",
        "omni-train demo --fresh",
    )
    demo.add_argument("--quick", action="store_true", help="few steps, structural checks only")
    demo.add_argument(
        "--thinker", action="store_true", help="go on: pretraining stages 2 and 3, dialogues"
    )
    demo.add_argument(
        "--talker", action="store_true", help="go on: a codec, and a Talker that learns to speak"
    )
    demo.add_argument(
        "--preferences", action="store_true", help="go on from there: DPO, and a new voice"
    )
    demo.add_argument(
        "--controls", action="store_true", help="then the comparisons behind the claims"
    )
    demo.add_argument("--fresh", action="store_true", help="train anew instead of continuing")
    demo.add_argument("--name", help="directory under runs/; the default is demo or demo-quick")
    demo.add_argument("--seed", type=int, help="of corpus, split and weights; another world")
    test = add(
        "test",
        "Check formatting, lint, types and tests; with pytest arguments, run pytest alone.",
        "omni-train test",
        "omni-train test --full",
        "omni-train test tests/unit/config -k typo",
    )
    test.add_argument("--full", action="store_true", help="the long suites too")
    stages = add(
        "stages",
        "Show the stages of the recipe: what each starts from, trains and freezes.",
        "omni-train stages",
        "omni-train stages show stage1_audio",
    )
    stages.add_argument("action", nargs="?", choices=["list", "show"], default="list")
    stages.add_argument("stage", nargs="?", help="name of a stage, for show")
    stages.add_argument("--json", action="store_true", help="print JSON")


def _add_runs(add: Add) -> None:
    config = add(
        "config",
        "Print a stage's resolved configuration.",
        "omni-train config stage1_audio model=tiny optim.lr=1e-3",
        "omni-train config stage1_audio experiment=stage1_audio/debug --json",
    )
    train = add(
        "train",
        "Train a stage; the same command again resumes.",
        "omni-train train stage1_audio run.dir=runs/audio --ranks 2",
        "omni-train train stage1_audio phase=encoder experiment=stage1_audio/debug",
    )
    evaluate = add(
        "evaluate",
        "Measure a checkpoint on held-out data.",
        "omni-train evaluate experiment=demo/evaluate_audio_encoder",
        "omni-train evaluate run.dir=runs/scores model.init_from=runs/sft \\",
        "    model.tokenizer=TOKENIZER '+tasks={test: {path: shards/test, metric: wer}}'",
    )
    for command in (config, train):
        command.add_argument("stage", help="name of a stage; see omni-train stages")
    for command in (config, train, evaluate):
        command.add_argument("overrides", nargs="*", help="key=value or group=option")
    for command in (train, evaluate):
        command.add_argument("--ranks", type=int, help="processes; the default is one per GPU")
        command.add_argument(
            "--restarts", type=int, default=0, help="start ranks that died or hung again; default 0"
        )
        command.add_argument(
            "--stop-s", type=int, help="seconds to save in when asked to stop; default as measured"
        )
    config.add_argument("--json", action="store_true", help="print JSON")


def _add_export(add: Add) -> None:
    from launch.export import add_export

    add_export(
        add(
            "export",
            "Write a checkpoint as a complete Hugging Face directory.",
            "omni-train export runs/sft exports/sft --base Qwen2.5-Omni-7B --licence apache-2.0",
            "omni-train export runs/talker exports/talker --codec runs/codec",
        )
    )


def _add_data(add_command: Add) -> None:
    data = add_command(
        "data",
        "Make, index, check and look at sets of shards.",
        "omni-train data corpus runs/demo/corpus --seed 0",
        "omni-train data prepare talks.jsonl shards/talks --format jsonl --tokenizer TOKENIZER",
        "omni-train data lint runs/demo/corpus/train/asr",
        "omni-train data index shards/librispeech --tokenizer runs/demo/corpus/tokenizer",
    )
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = _adder(actions)
    corpus = add(
        "corpus",
        "Generate the demo corpus with real media.",
        "omni-train data corpus runs/demo/corpus --seed 0",
    )
    corpus.add_argument("path", help="directory to write")
    corpus.add_argument("--seed", type=int, help="of the whole corpus")
    corpus.add_argument("--quick", action="store_true", help="a small one")
    index = add(
        "index",
        "Write the Parquet index and the manifest of shards.",
        "omni-train data index shards/librispeech --tokenizer runs/demo/corpus/tokenizer",
    )
    index.add_argument("path", help="directory with the shards")
    index.add_argument("--tokenizer", required=True, help="directory of a saved tokenizer")
    benchmark = add(
        "benchmark",
        "Turn a public benchmark into shards.",
        "omni-train data benchmark librispeech LibriSpeech/test-clean shards/test --tokenizer T",
    )
    benchmark.add_argument("name", help="such as librispeech, omnibench or mmlu")
    benchmark.add_argument("path", help="the owner's file or directory")
    benchmark.add_argument("out", help="directory to make")
    benchmark.add_argument("--tokenizer", required=True, help="directory of a saved tokenizer")
    benchmark.add_argument("--media-root", default="", help="where its media paths start")
    benchmark.add_argument("--split", default="", help="of a saved dataset that has several")
    _add_data_tools(actions)


def _add_data_tools(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from launch.inspection import add_inspection
    from launch.preparing import add_preparing
    from launch.records import add_records

    add = _adder(actions)
    add_preparing(add)
    add_inspection(add)
    add_records(add)


def _add_talker(add: Add) -> None:
    from launch.talker import add_talker

    talker = add(
        "talker",
        "Rank sampled replies and make preference pairs of them.",
        "omni-train talker rank CANDIDATES OUT --asr pocketsphinx:apple,river",
        "omni-train talker pairs CANDIDATES RANKING OUT --tokenizer TOKENIZER",
    )
    actions = talker.add_subparsers(dest="action", required=True, metavar="ACTION")
    add_talker(_adder(actions))


def _adder(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> Add:
    """What adds one action."""

    def add(name: str, summary: str, *examples: str) -> argparse.ArgumentParser:
        return actions.add_parser(
            name,
            help=summary,
            description=summary,
            epilog="\n  ".join(["examples:", *examples]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    return add


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    # argparse gives up on positionals that follow an option; overrides may stand anywhere.
    flags = [word for word in rest if word.startswith("-")]
    if args.command == "test":
        from launch.testing import run_tests

        return run_tests(full=args.full, pytest_args=rest)
    if flags or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    try:
        code = _COMMANDS[args.command](args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads, such as `head`, has enough; Python would try again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _fail(message: str) -> int:
    print(f"omni-train: {message}", file=sys.stderr)
    return _USAGE


def _demo(args: argparse.Namespace) -> int:
    from launch.demo import run_demo

    return run_demo(
        quick=args.quick,
        thinker=args.thinker,
        talker=args.talker,
        preferences=args.preferences,
        controls=args.controls,
        fresh=args.fresh,
        name=args.name,
        seed=args.seed,
    )


def _stages(args: argparse.Namespace) -> int:
    from launch import stages

    chosen = list(stages.STAGES)
    if args.action == "show":
        chosen = stages.find_stages(args.stage or "")
        if not chosen:
            return _unknown_stage(args.stage or "", stages.recipe_names())
    if args.json:
        print(json.dumps([stage.as_dict() for stage in chosen], indent=1))
    elif args.action == "show":
        print("\n".join(stages.format_stage(stage) for stage in chosen))
    else:
        print(stages.format_table())
    return 0


def _unknown_stage(name: str, known: list[str]) -> int:
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"one of: {', '.join(known)}"
    return _fail(f"there is no stage {name!r}; {hint}")


def _refuse_stage(name: str) -> int:
    """Return 0 for a stage that can be started, else say why not and return the exit code."""
    from launch import stages

    if name not in stages.recipe_names():
        return _unknown_stage(name, stages.recipe_names())
    return 0


def _config(args: argparse.Namespace) -> int:
    refused = _refuse_stage(args.stage)
    if refused:
        return refused
    from launch.local import check

    checked = shown = check(args.stage, args.overrides)
    if checked.code == _USAGE and "='???'" in checked.text:
        # Whoever asks what can be set need not know first what must be.
        shown = check(args.stage, args.overrides, partial=True)
    if shown.code == 0 and args.json:
        print(json.dumps(shown.values(), indent=1))
    elif shown.code == 0:
        sys.stdout.write(shown.text)
    if checked.code != 0:
        sys.stdout.flush()
        sys.stderr.write(checked.text)
    return checked.code


def _plan(args: argparse.Namespace) -> int:
    refused = _refuse_stage(args.stage)
    if refused:
        return refused
    from launch.plan import run_plan

    return run_plan(args)


def _tool(args: argparse.Namespace) -> int:
    from launch.tools import run_tool

    return run_tool(args)


def _train(args: argparse.Namespace) -> int:
    stage = "evaluate" if args.command == "evaluate" else args.stage
    refused = _refuse_stage(stage)
    if refused:
        return refused
    if args.ranks is not None and args.ranks < 1:
        return _fail(f"--ranks={args.ranks}: at least one process is needed")
    if args.restarts < 0 or (args.stop_s is not None and args.stop_s < 1):
        return _fail("--restarts must not be negative, and --stop-s must be 1 or more")
    from launch.local import count_gpus, run_recipe

    return run_recipe(
        stage,
        args.overrides,
        ranks=args.ranks or max(1, count_gpus()),
        restarts=args.restarts,
        stop_s=args.stop_s,
    )


def _export(args: argparse.Namespace) -> int:
    from launch.export import run_export

    return run_export(args)


def _track(args: argparse.Namespace) -> int:
    from launch.track import run_track

    return run_track(args)


def _report(args: argparse.Namespace) -> int:
    from launch.report import run_report

    return run_report(args)


def _bench(args: argparse.Namespace) -> int:
    from launch.bench import run_bench

    return run_bench(args)


def _jobs(args: argparse.Namespace) -> int:
    from launch.jobs import run_jobs

    return run_jobs(args)


def _data(args: argparse.Namespace) -> int:
    from launch.data import run_data

    return run_data(args)


def _talker(args: argparse.Namespace) -> int:
    from launch.talker import run_talker

    return run_talker(args)


def _chaos(args: argparse.Namespace) -> int:
    from launch.chaos import run_chaos

    return run_chaos(args)


def _checkpoint(args: argparse.Namespace) -> int:
    from launch.checkpoint import run_checkpoint

    return run_checkpoint(args)


_COMMANDS = {
    "bench": _bench,
    "chaos": _chaos,
    "checkpoint": _checkpoint,
    "data": _data,
    "talker": _talker,
    "launch": _jobs,
    "pipeline": _jobs,
    "report": _report,
    "track": _track,
    "demo": _demo,
    "stages": _stages,
    "config": _config,
    "plan": _plan,
    "doctor": _tool,
    "runs": _tool,
    "completion": _tool,
    "train": _train,
    "evaluate": _train,
    "export": _export,
}
