"""What the report shows of a run, read from its directory; nothing is computed again."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from omni_train.data.candidates import HEARD_PAIRS_FILE
from omni_train.engine.fingerprint import flatten as flatten_settings
from omni_train.tracking.curves import flatten
from omni_train.tracking.events import read_jsonl, read_steps
from omni_train.tracking.samples import Cell, MediaType, media_type, read_tables

MAX_POINTS = 1000
MAX_SOUNDS = 8
MAX_SOUND_BYTES = 2_000_000
MAX_REPLIES = 12
MAX_FAULTS = 200
MAX_SHOWN = 4
# Curves in the order of the page; what is not named here comes after them, folded.
FIRST = (
    *("loss", "loss_source", "loss_task", "loss_modality", "metrics"),
    *("grad_norm", "lr", "tokens_per_s", "seconds"),
)
_TYPES = {
    ".wav": "audio/wav",
    ".flac": "audio/flac",
    ".mp3": "audio/mpeg",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
}
_NO_CURVES = {"kind", "time", "elapsed_s", "step", "keys", "applied", "position"}
# Events that a reader looks for when something went wrong.
_FAULTS = {
    "non_finite",
    "checkpoint_bad",
    "checkpoint_leftover",
    "resume",
    "view_failed",
    "run_end",
}


@dataclass(frozen=True, slots=True)
class Sound:
    """A sampled wave with its text, what a recogniser heard, the word error rate and the voice.

    Args:
        name: of the dialogue and its task; the same where several runs spoke it.
    """

    uri: str
    text: str
    heard: str
    wer: float
    speaker: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class HeardPair:
    """A preference pair that can be listened to."""

    chosen: Sound
    rejected: Sound
    gap: float


@dataclass(frozen=True, slots=True)
class Medium:
    """A file of a sample: what it is shown as, and an address that holds it."""

    kind: MediaType
    uri: str


@dataclass(frozen=True, slots=True)
class Fault:
    """An event that is not plain progress."""

    step: int
    kind: str
    detail: str


@dataclass(slots=True)
class RunFacts:
    """A run for the report.

    Args:
        name: of its directory.
        stage: of the recipe.
        state: of `state.json`.
        reason: why it ended so.
        steps, tokens, seconds: done, over all attempts.
        loss_first, loss_last: of the first and last steps; empty where there is none.
        versions: by package.
        charts: title -> series -> [step, value] points.
        evaluations: task, metric, value, n.
        sounds, replies: samples; replies are (reference, reply) by task.
        samples: by task, columns and rows of those whose media were kept.
        pictures: (caption, data URI).
        pairs: some of the preference pairs that it learnt from.
        faults: in order.
        unused: ((source, reason), count) of the ledger.
        before: name of the run whose settings it is compared to.
        changes: (key, there, here).
    """

    name: str
    stage: str
    state: str
    reason: str
    steps: int
    tokens: int
    seconds: float
    loss_first: float | str
    loss_last: float | str
    versions: dict[str, str]
    charts: dict[str, dict[str, list[list[float]]]]
    evaluations: list[dict[str, Any]]
    sounds: list[Sound]
    replies: dict[str, list[tuple[str, str]]]
    samples: dict[str, tuple[list[str], list[list[Any]]]]
    faults: list[Fault]
    unused: list[tuple[tuple[str, str], int]]
    pictures: list[tuple[str, str]] = field(default_factory=list)
    pairs: list[HeardPair] = field(default_factory=list)
    before: str = ""
    changes: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """Of its section on the page."""
        return re.sub(r"[^A-Za-z0-9_-]", "-", self.name)


def read_run(run_dir: Path, *, against: Path | None = None) -> RunFacts:
    """Read one run directory.

    Args:
        run_dir: with `events.jsonl`.
        against: run whose settings are compared with this one's.

    Raises:
        FileNotFoundError: it is no run directory.
    """
    log = run_dir / "events.jsonl"
    if not log.is_file():
        raise FileNotFoundError(f"there is no run in {run_dir}; give a run directory or a pipeline")
    events, steps = list(read_jsonl(log)), read_steps(log)
    path = run_dir / "state.json"
    state: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    losses = [v for step in steps if isinstance(v := step.get("loss"), int | float)]
    count = min(5, max(1, len(losses) // 2))
    ledger = Counter(
        (str(row.get("source")), str(row.get("reason")))
        for row in read_jsonl(run_dir / "ledger.jsonl")
    )
    return RunFacts(
        name=run_dir.name,
        stage=str(next((e["stage"] for e in events if "stage" in e), "")),
        state=str(state.get("status", "running")),
        reason=str(state.get("reason", "")),
        steps=len(steps),
        tokens=sum(int(step.get("tokens", 0)) for step in steps),
        seconds=sum(float(e["elapsed_s"]) for e in events if e["kind"] == "run_end"),
        loss_first=sum(losses[:count]) / count if losses else "",
        loss_last=sum(losses[-count:]) / count if losses else "",
        versions=next((e["versions"] for e in events if "versions" in e), {}),
        charts=_charts(steps),
        evaluations=_evaluations(events),
        sounds=_sounds(run_dir, events),
        replies=_replies(run_dir),
        samples=_samples(run_dir, events),
        faults=_faults(events),
        unused=ledger.most_common(50),
        before=against.name if against else "",
        changes=_changes(against, run_dir) if against else [],
    )


def _charts(steps: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[list[float]]]]:
    found: dict[str, dict[str, list[list[float]]]] = {}
    for step in steps:
        numbers = flatten({k: v for k, v in step.items() if k not in _NO_CURVES})
        for name, value in numbers.items():
            # A group of metrics, such as loss_task/asr, has a picture of its own.
            inner = name.removeprefix("metrics/")
            title, _, series = (inner if "/" in inner else name).partition("/")
            points = found.setdefault(title, {}).setdefault(series or title, [])
            points.append([step["step"], value])
    order = {name: place for place, name in enumerate(FIRST)}
    titles = sorted(found, key=lambda title: order.get(title, len(order)))
    return {
        title: {name: thin(points) for name, points in found[title].items()} for title in titles
    }


def thin(points: list[list[float]], most: int = MAX_POINTS) -> list[list[float]]:
    """Return about `most` points: lowest and highest of each stretch, so that no spike is lost."""
    if len(points) <= most:
        return points
    size = -(-len(points) // (most // 2))
    kept: list[list[float]] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ends = [min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])]
        kept += sorted(ends)[: 1 if ends[0] is ends[1] else 2]
    return kept


def _evaluations(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    last: dict[tuple[str, str], dict[str, Any]] = {}
    for event in events:
        if event["kind"] == "evaluation" and isinstance(event.get("value"), int | float):
            key = str(event.get("task", "")), str(event.get("voice", ""))
            number = event.get("n", event.get("num_samples", ""))
            last[key] = {
                "task": " ".join(filter(None, key)),
                "metric": event.get("metric", ""),
                "value": float(event["value"]),
                "n": number if isinstance(number, int) else "",
            }
    return list(last.values())


def _sounds(run_dir: Path, events: Sequence[dict[str, Any]]) -> list[Sound]:
    kept = {(e["task"], e["wave"]): e for e in events if e["kind"] == "audio"}
    found: list[Sound] = []
    for event in kept.values():
        path = (run_dir / str(event["wave"])).resolve()
        inside = path.is_relative_to(run_dir.resolve()) and path.is_file()
        if inside and path.stat().st_size <= MAX_SOUND_BYTES and len(found) < MAX_SOUNDS:
            words = [str(event.get(key, "")) for key in ("text", "heard", "speaker")]
            found.append(
                Sound(
                    data_uri(path.read_bytes(), "audio/wav"),
                    text=words[0],
                    heard=words[1],
                    wer=float(event.get("wer", "nan")),
                    speaker=words[2],
                    name=f"{event['task']} {event['key']}",
                )
            )
    return found


def heard_pairs(folder: Path) -> list[HeardPair]:
    """Return what a directory of preference pairs has to listen to; nothing where it is not one."""
    path = folder / HEARD_PAIRS_FILE
    rows = read_jsonl(path) if path.is_file() else ()

    def sound(row: dict[str, Any], who: str) -> Sound:
        # Encoded anew, so that nothing but a wave can get onto the page.
        wave = base64.b64decode(row[who]["wave"])
        uri, wer = data_uri(wave, "audio/wav"), float(row[who]["wer"])
        return Sound(uri, row["text"], row[who]["heard"], wer, row["speaker"])

    return [
        HeardPair(sound(row, "chosen"), sound(row, "rejected"), float(row["gap"])) for row in rows
    ]


def data_uri(content: bytes, kind: str) -> str:
    """Return bytes as an address that holds them."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _samples(
    run_dir: Path, events: Sequence[dict[str, Any]]
) -> dict[str, tuple[list[str], list[list[Any]]]]:
    found: dict[str, tuple[list[str], list[list[Any]]]] = {}
    for title, table in read_tables(run_dir, events).items():
        group, _, task = title.partition("/")
        shown = table.rows[:MAX_SHOWN]
        if group == "samples" and any(isinstance(cell, Path) for row in shown for cell in row):
            found[task] = (table.columns, [[_inlined(cell) for cell in row] for row in shown])
    return found


def _inlined(cell: Cell) -> str | float | Medium | None:
    if not isinstance(cell, Path):
        return cell
    kind = media_type(cell)
    if kind is None or cell.stat().st_size > MAX_SOUND_BYTES:
        return None
    return Medium(kind, data_uri(cell.read_bytes(), _TYPES[cell.suffix.lower()]))


def _replies(run_dir: Path) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(run_dir.glob("predictions-*.jsonl")):
        rows = [
            (str(row["reference"]), str(row["prediction"]))
            for row, _ in zip(read_jsonl(path), range(MAX_REPLIES), strict=False)
            if "prediction" in row
        ]
        if rows:
            found[path.stem.removeprefix("predictions-")] = rows
    return found


def _faults(events: Sequence[dict[str, Any]]) -> list[Fault]:
    found: list[Fault] = []
    step = 0
    for event in events:
        step = int(event.get("step", step))
        if event["kind"] in _FAULTS and event.get("status") != "done":
            hidden = ("kind", "time", "elapsed_s", "step")
            detail = ", ".join(f"{k} {v}" for k, v in event.items() if k not in hidden)
            found.append(Fault(step, event["kind"], detail))
    return found[:MAX_FAULTS]


def settings_of(run_dir: Path) -> dict[str, Any]:
    """Return a run's settings by dotted key; secrets were redacted when it was written."""
    path = run_dir / "resolved.yaml"
    loaded = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    return flatten_settings(loaded)


def _changes(before: Path, here: Path) -> list[tuple[str, str, str]]:
    old, new = settings_of(before), settings_of(here)
    return [
        (key, str(old.get(key, "")), str(new.get(key, "")))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
