"""`omni-train report`: which runs go on the page, and a picture of what each was trained on.

The page itself is omni_train/tracking/report.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.failures import check_writable, guarded
from omni_train.config.errors import ConfigError, DataError

if TYPE_CHECKING:
    from launch.pipeline import Node
    from omni_train.tracking.report import GraphNode
    from omni_train.tracking.report_data import RunFacts

Add = Callable[..., argparse.ArgumentParser]
REPORT_NAME = "report.html"


def add_report(add: Add) -> None:
    """Add the command.

    Args:
        add: (name, summary, *examples) -> parser.
    """
    report = add(
        "report",
        "Write one self-contained page: curves, stages, graph, samples, faults, settings.",
        "omni-train report runs/demo",
        "omni-train report runs/audio --against runs/audio-before",
        "omni-train report demo --out demo.html",
    )
    report.add_argument("what", help="run directory, directory of runs, or name of a pipeline")
    report.add_argument("--out", type=Path, help="file; the default is report.html beside the runs")
    report.add_argument("--against", type=Path, help="run whose settings are compared")
    report.add_argument(
        "--no-pictures", action="store_true", help="leave out the timelines of training samples"
    )
    report.add_argument("--json", action="store_true", help="print JSON")


@guarded
def run_report(args: argparse.Namespace) -> int:
    """Write the page and return the exit code."""
    import json

    out, names = write_page(
        args.what, out=args.out, against=args.against, pictures=not args.no_pictures
    )
    if args.json:
        print(json.dumps({"page": str(out), "runs": names}))
    else:
        print(
            f"{out}: {len(names)} run{'s' * (len(names) != 1)}, {out.stat().st_size / 1e6:.1f} MB"
        )
    return 0


def write_page(
    what: str, *, out: Path | None = None, against: Path | None = None, pictures: bool = True
) -> tuple[Path, list[str]]:
    """Write the page; return its file and the names of its runs.

    Args:
        what: run directory, directory of runs, or name of a pipeline.
        out: file; None is report.html beside the runs.
        against: run whose settings are compared.
        pictures: whether a sample of each training source is drawn.

    Raises:
        ConfigError, FileNotFoundError: there is no such run, or it cannot be written.
    """
    from omni_train.engine.run import write_text_atomically
    from omni_train.tracking.report import report_page

    root, folders, nodes = _runs(what)
    facts, graph = _read(folders, nodes, against=against)
    _add_pairs(facts, folders)
    if pictures:
        _add_pictures(facts, folders)
    page = out or root / REPORT_NAME
    check_writable(page.resolve().parent, remedy="give another file by --out")
    write_text_atomically(page, report_page(what, facts, graph))
    return page, [run.name for run in facts]


def _runs(what: str) -> tuple[Path, list[Path], list[Node]]:
    """Return where the page belongs, the run directories, and the nodes of a pipeline."""
    from launch.pipeline import load_pipeline, nodes_of, pipeline_names
    from launch.stages import REPO

    path = Path(what)
    if (path / "events.jsonl").is_file():
        return path, [path], []
    if path.is_dir():
        found = [log.parent for log in path.glob("*/events.jsonl")]
        if not found:
            raise FileNotFoundError(f"there is no run in {path}; give a run directory")
        return path, sorted(found, key=_started), []
    if what not in pipeline_names():
        raise ConfigError(
            key="report",
            value=what,
            rule="no such run directory, and no such pipeline",
            remedy=f"give a directory, or one of: {', '.join(pipeline_names())}",
        )
    config = load_pipeline(what)
    nodes = list(nodes_of(config).values())
    root = REPO / "runs" / config.experiment
    folders = [node.run_dir for node in nodes if (node.run_dir / "events.jsonl").is_file()]
    if not folders:
        raise FileNotFoundError(f"nothing of {what} has run: there is no run in {root}")
    return root, folders, nodes


def _started(folder: Path) -> float:
    from omni_train.tracking.events import read_jsonl

    return float(next((e["time"] for e in read_jsonl(folder / "events.jsonl")), 0.0))


def _read(
    folders: Sequence[Path], nodes: Sequence[Node], *, against: Path | None
) -> tuple[list[RunFacts], list[GraphNode]]:
    """Return the runs and the graph; each run is compared with the one that it starts from."""
    from omni_train.tracking.report import GraphNode
    from omni_train.tracking.report_data import read_run, settings_of

    by_name = {folder.name: folder for folder in folders}
    before: dict[str, list[str]] = {}
    for folder in folders:
        values = [str(value).rstrip("/") for value in settings_of(folder).values()]
        named = [value.split("/") for value in values]
        before[folder.name] = [
            name
            for name in by_name
            if name != folder.name and any(name in parts for parts in named)
        ]
    facts = []
    for folder in folders:
        first = by_name[before[folder.name][0]] if before[folder.name] else None
        facts.append(read_run(folder, against=against or first))
    if nodes:
        return facts, [GraphNode(n.name, n.state.value, n.config.parents) for n in nodes]
    seen: set[str] = set()
    graph = []
    for run in facts:
        graph.append(GraphNode(run.name, run.state, [n for n in before[run.name] if n in seen]))
        seen.add(run.name)
    return facts, graph if len(graph) > 1 else []


def _new_sources(
    facts: Sequence[RunFacts], folders: Sequence[Path]
) -> Iterator[tuple[RunFacts, str, dict[str, object]]]:
    """Yield each training source once: the first run that reads it, its path, and the settings."""
    from omni_train.tracking.report_data import settings_of

    seen: set[str] = set()
    for run, folder in zip(facts, folders, strict=True):
        settings = settings_of(folder)
        for key, value in settings.items():
            source = str(value)
            is_source = key.startswith("data.sources.") and key.endswith(".path")
            if is_source and source not in seen:
                seen.add(source)
                yield run, source, settings


def _add_pairs(facts: Sequence[RunFacts], folders: Sequence[Path]) -> None:
    """Put pairs to listen to with the first run that learnt from them."""
    from launch.stages import REPO
    from omni_train.tracking.report_data import heard_pairs

    for run, source, _ in _new_sources(facts, folders):
        run.pairs += heard_pairs(REPO / source)


def _add_pictures(facts: Sequence[RunFacts], folders: Sequence[Path]) -> None:
    """Draw the timeline of the first sample of every training source, each source once."""
    from omni_train.tracking.report_data import data_uri

    for run, source, settings in _new_sources(facts, folders):
        try:
            key, content = _draw(source, settings)
        except (ConfigError, DataError, OSError) as error:
            print(f"no picture of {source}: {error}", file=sys.stderr)
            continue
        run.pictures.append((f"{source}: {key}", data_uri(content, "image/png")))


def _draw(source: str, settings: dict[str, object]) -> tuple[str, bytes]:
    """Return the first sample's key and its timeline as PNG."""
    from data_pipelines.lint import Encoding
    from data_pipelines.show import show_sample
    from launch.inspection import parse_processing
    from launch.stages import REPO
    from omni_train.data.index import read_index, read_manifest
    from omni_train.data.tokenizer import load_tokenizer
    from omni_train.models.config import ModelPreset
    from omni_train.models.presets import build_config, model_spec

    folder = REPO / source
    tokenizer = load_tokenizer(str(REPO / str(settings["model.tokenizer"])))
    config = build_config(ModelPreset[str(settings["model.preset"])], tokenizer)
    given = {
        key.removeprefix("data.processing."): str(value).lower()
        for key, value in settings.items()
        if key.startswith("data.processing.")
    }
    encoding = Encoding(
        tokenizer,
        parse_processing([f"{key}={value}" for key, value in given.items()]),
        model_spec(config.thinker_config, tokenizer),
    )
    shard = read_manifest(folder).shards[0].name
    key = read_index(folder / Path(shard).with_suffix(".parquet").name)[0].key
    with tempfile.TemporaryDirectory() as out:
        shown = show_sample(f"{folder}/{shard}:{key}", encoding, out)
        return key, shown.png.read_bytes()
