"""`omni-train data lint | info | fix | show`: looking at sets of shards, never changing them.

Done here: arguments, the tokenizer that belongs to a set, the model's sizes, exit codes. Not done
here: the work (data_pipelines/{lint,info,fix,show}.py).
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.failures import check_writable
from omni_train.config.errors import ConfigError
from omni_train.engine.exit_codes import ExitCode

if TYPE_CHECKING:
    from data_pipelines.lint import Encoding
    from omni_train.data.types import ProcessingConfig

Add = Callable[..., argparse.ArgumentParser]
ACTIONS = ("lint", "info", "fix", "show")
# A set lies in the directory of its tokenizer or a few levels below: corpus/train/asr.
_LEVELS_UP = 3
_PRESETS = ("tiny", "qwen2_5_omni_3b", "qwen2_5_omni_7b")


def add_inspection(add: Add) -> None:
    """Add the four commands.

    Args:
        add: (name, summary, *examples) -> parser.
    """
    lint = add(
        "lint",
        "Verify hashes and decode every sample; exit 65 if anything is wrong.",
        "omni-train data lint shards/librispeech --workers 8",
        "omni-train data lint runs/demo/corpus/train/asr --json",
        "omni-train data lint s3://bucket/shards --tokenizer TOKENIZER --report lint.json",
    )
    lint.add_argument("path", help="directory or URL with shards and a manifest")
    lint.add_argument("--report", type=Path, help="its file; the default is lint.json in the set")
    lint.add_argument("--workers", type=int, help="processes; the default is one per core")
    info = add(
        "info",
        "Hours, tokens and samples by modality, task, language, speaker; from the index alone.",
        "omni-train data info shards/librispeech shards/coco",
        "omni-train data info runs/demo/corpus/train/av --processing video_fps=4 --json",
    )
    info.add_argument("path", nargs="+", help="directories or URLs with shards and a manifest")
    fix = add(
        "fix",
        "Write skip.json from lint's findings; the data are never edited.",
        "omni-train data lint shards/mine; omni-train data fix shards/mine",
        "omni-train data fix s3://bucket/shards --report lint.json --out skip.json",
    )
    fix.add_argument("path", help="directory or URL that lint has checked")
    fix.add_argument("--report", type=Path, help="of lint; the default is lint.json in the set")
    fix.add_argument("--out", type=Path, help="skip list; the default is skip.json in the set")
    show = add(
        "show",
        "Draw one sample's token timeline (PNG and HTML) and print its ids.",
        "omni-train data show runs/demo/corpus/train/av/shard-000000.tar:av-train-000768",
    )
    show.add_argument(
        "place", metavar="SHARD:KEY", help="path or URL of a tar, a colon, a key in it"
    )
    show.add_argument("--out", default=".", help="directory for the pictures; the default is here")
    for command in (lint, info, fix, show):
        command.add_argument("--json", action="store_true", help="print JSON")
    for command in (lint, info, show):
        command.add_argument(
            "--tokenizer",
            help="directory of the set's tokenizer; the default is tokenizer/ beside or above it",
        )
        command.add_argument(
            "--preset", choices=_PRESETS, default="tiny", help="sizes of the model"
        )
        command.add_argument(
            "--processing",
            nargs="+",
            default=[],
            metavar="KEY=VALUE",
            help="how media become tokens, as under data.processing: video_fps=4",
        )


def run_inspection(args: argparse.Namespace) -> int:
    """Run one of the four and return its exit code; errors are the caller's to report."""
    return {"lint": _lint, "info": _info, "fix": _fix, "show": _show}[args.action](args)


def _lint(args: argparse.Namespace) -> int:
    from rich.console import Console

    from data_pipelines.lint import LINT_NAME, lint_set, print_report

    workers = (os.cpu_count() or 1) if args.workers is None else args.workers
    place = _place(args.path)
    local = place / LINT_NAME if isinstance(place, Path) else None
    encoding = _encoding(args, place)
    written = args.report or local
    if written:
        check_writable(written.parent, remedy="give another file by --report")
    report = lint_set(place, encoding, num_workers=workers, report_path=written)
    if args.json:
        print(json.dumps(report.as_dict(), indent=1))
    else:
        print_report(args.path, report, Console(), written=written)
    return int(ExitCode.bad_data if report.failed else ExitCode.done)


def _info(args: argparse.Namespace) -> int:
    from rich.console import Console

    from data_pipelines.info import collect_info, print_info

    places = [_place(path) for path in args.path]
    info = collect_info(places, _encoding(args, places[0]))
    if args.json:
        print(json.dumps(info.as_dict(), indent=1))
    else:
        print_info(info, Console())
    return int(ExitCode.done)


def _fix(args: argparse.Namespace) -> int:
    from rich.console import Console

    from data_pipelines.fix import fix_set, print_report

    place = _place(args.path)
    written = args.out or (place if isinstance(place, Path) else None)
    if written and (args.out or written.is_dir()):
        folder = written.parent if args.out else written
        check_writable(folder, remedy="give another file by --out")
    report = fix_set(place, report_path=args.report, out=args.out)
    if args.json:
        print(json.dumps(report.as_dict(), indent=1))
    else:
        print_report(report, Console())
    return int(ExitCode.bad_data if report.left else ExitCode.done)


def _show(args: argparse.Namespace) -> int:
    from rich.console import Console

    from data_pipelines.show import print_ids, show_sample, split_place, summary

    folder, _, _ = split_place(args.place)
    encoding = _encoding(args, folder)
    check_writable(Path(args.out), remedy="give another directory by --out")
    shown = show_sample(args.place, encoding, args.out)
    if args.json:
        print(json.dumps(summary(shown), indent=1))
    else:
        print_ids(shown.timeline, Console())
        print(f"{shown.png}\n{shown.page}")
    return int(ExitCode.done)


def _place(text: str) -> str | Path:
    """Return a URL as it is, anything else as a path."""
    return text if "://" in text else Path(text)


def _encoding(args: argparse.Namespace, root: str | Path) -> Encoding:
    """Return the tokenizer, the processing and the model's sizes that the arguments ask for."""
    from data_pipelines.lint import Encoding
    from omni_train.data.stores import open_root
    from omni_train.data.tokenizer import load_tokenizer
    from omni_train.models.config import ModelPreset
    from omni_train.models.presets import build_config, model_spec

    folder = open_root(root).folder
    if folder and not folder.is_dir():
        raise FileNotFoundError(f"there is no directory {root}; give one with a manifest.json")
    tokenizer = load_tokenizer(args.tokenizer or find_tokenizer(root))
    config = build_config(ModelPreset[args.preset], tokenizer)
    return Encoding(
        tokenizer, parse_processing(args.processing), model_spec(config.thinker_config, tokenizer)
    )


def find_tokenizer(root: str | Path) -> Path:
    """Return the `tokenizer` directory in a set's directory or one of a few above it.

    Raises:
        ConfigError: there is none, or the set is in an object store.
    """
    if not isinstance(root, Path):
        raise ConfigError(
            key="--tokenizer",
            value="",
            rule="a set in an object store has no tokenizer beside it",
            remedy="give the directory of the tokenizer that the set was indexed with",
        )
    for folder in [root.resolve(), *root.resolve().parents][: _LEVELS_UP + 1]:
        if (folder / "tokenizer" / "tokenizer.json").is_file():
            return folder / "tokenizer"
    raise ConfigError(
        key="--tokenizer",
        value="",
        rule=f"there is no tokenizer/ in {root} or in the {_LEVELS_UP} directories above it",
        remedy="give the directory of the tokenizer that the set was indexed with",
    )


def parse_processing(pairs: Sequence[str]) -> ProcessingConfig:
    """Return the default processing with some fields set by `KEY=VALUE`.

    Raises:
        ConfigError: an unknown field, or a value of another type.
    """
    from omni_train.config.keys import field_types
    from omni_train.data.types import ProcessingConfig

    types = field_types(ProcessingConfig)
    values: dict[str, Any] = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        if key not in types:
            near = difflib.get_close_matches(key, types, n=1)
            raise ConfigError(
                key="--processing",
                value=pair,
                rule=f"there is no field {key!r}",
                remedy=f"did you mean {near[0]}?" if near else f"one of {', '.join(types)}",
            )
        try:
            values[key] = _parse(types[key], text)
        except (KeyError, ValueError) as error:
            raise ConfigError(
                key="--processing",
                value=pair,
                rule=f"{key} is of type {types[key].__name__}",
                remedy="give such a value",
            ) from error
    return ProcessingConfig(**values)


def _parse(kind: Any, text: str) -> Any:
    if issubclass(kind, Enum):
        return kind[text]
    if kind is bool:
        return {"true": True, "false": False}[text]
    return kind(text)
