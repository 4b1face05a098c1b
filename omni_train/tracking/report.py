"""One page that shows a run, or all stages of a pipeline; a view of their directories.

    run directories --report_data.py--> RunFacts --this module--> HTML

Self-contained: curves, sound and pictures are inside, nothing is fetched. Everything that comes
from a run is escaped; the policy lets no script run but the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omni_train.tracking.report_assets import COLORS, SCRIPT, STYLE
from omni_train.tracking.report_data import FIRST, Medium, RunFacts, Sound
from omni_train.tracking.samples import MediaType

_BOX_WIDTH, _BOX_HEIGHT, _GAP_X, _GAP_Y = 190, 40, 40, 14
_FILLS = {
    "done": "#e3f4ea",
    "stale": "#fde8e6",
    "failed": "#fde8e6",
    "preempted": "#fff3d6",
    "running": "#fff3d6",
}


@dataclass(frozen=True, slots=True)
class GraphNode:
    """A box of the graph.

    Args:
        name: of the node.
        state: how it stands, in a word.
        after: names of nodes that stand before it.
    """

    name: str
    state: str
    after: Sequence[str]


def report_page(title: str, runs: Sequence[RunFacts], graph: Sequence[GraphNode] = ()) -> str:
    """Return the page.

    Args:
        title: heading.
        runs: in the order in which they are shown.
        graph: of a pipeline; empty for one run.
    """
    charts: list[dict[str, Any]] = []
    body = [f"<h1>{_text(title)}</h1>", _intro(runs)]
    if graph:
        body += ["<h2>Graph</h2>", f'<div class="wide">{_graph(graph)}</div>']
    body += ["<h2>Stages</h2>", _stage_table(runs)]
    body += _side_by_side(runs)
    for run in runs:
        body += _run_section(run, charts)
    data = json.dumps(charts, allow_nan=False).replace("<", "\\u003c")
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>",
        *body,
        f'<script id="curves" type="application/json">{data}</script>',
        f"<script>{SCRIPT}</script></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _text(value: object) -> str:
    return html.escape(str(value))


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if value != "" else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int = 0) -> str:
    """Cells are HTML already; the last `numbers` columns are right-aligned."""
    first = len(head) - numbers

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = (' class="number"' if n >= first else "" for n in range(len(row)))
        return "".join(f"<{tag}{k}>{cell}</{tag}>" for k, cell in zip(kinds, row, strict=True))

    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells("th", head)}</tr>{lines}</table></div>'


def _intro(runs: Sequence[RunFacts]) -> str:
    seconds = sum(run.seconds for run in runs)
    versions = next((run.versions for run in reversed(runs) if run.versions), {})
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f'<p class="soft">{len(runs)} run{"s" * (len(runs) != 1)}, {seconds / 60:.1f} minutes. '
        f"{_text(listed)}</p>"
    )


def _state(word: str) -> str:
    return f'<span class="{_text(word.split()[0])}">{_text(word)}</span>'


def _stage_table(runs: Sequence[RunFacts]) -> str:
    head = ["run", "stage", "state", "steps", "minutes", "tokens", "loss first", "loss last"]
    rows = [
        [
            f'<a href="#{_text(run.anchor)}">{_text(run.name)}</a>',
            _text(run.stage),
            _state(run.state),
            *(_number(v) for v in (run.steps or "", round(run.seconds / 60, 2), run.tokens or "")),
            *(_number(v) for v in (run.loss_first, run.loss_last)),
        ]
        for run in runs
    ]
    return _table(head, rows, numbers=5)


def _run_section(run: RunFacts, charts: list[dict[str, Any]]) -> list[str]:
    parts = [f'<h2 id="{_text(run.anchor)}">{_text(run.name)} {_state(run.state)}</h2>']
    if run.reason:
        parts.append(f'<p class="failed">{_text(run.reason)}</p>')
    parts += _curves(run, charts)
    if run.evaluations:
        head = ["task", "metric", "value", "samples"]
        rows = [[_text(e[k]) for k in ("task", "metric")] + [_number(e["value"]), _number(e["n"])]
                for e in run.evaluations]  # fmt: skip
        parts += ["<h3>Evaluation</h3>", _table(head, rows, numbers=2)]
    parts += _samples(run)
    parts += _faults(run)
    if run.changes:
        rows = [[f"<code>{_text(cell)}</code>" for cell in change] for change in run.changes]
        table = _table(["key", f"before ({_text(run.before)})", "here"], rows)
        parts.append(f"<details><summary>Settings that differ ({len(rows)})</summary>{table}"
                     "</details>")  # fmt: skip
    return parts


def _curves(run: RunFacts, charts: list[dict[str, Any]]) -> list[str]:
    """Figures of a run, those that nobody looks at first folded; their data go into `charts`."""
    figures: dict[bool, list[str]] = {True: [], False: []}
    for title, series in run.charts.items():
        figures[title in FIRST].append(_figure(len(charts), title, list(series)))
        charts.append(
            {"title": title, "series": [{"name": n, "points": p} for n, p in series.items()]}
        )
    parts = [f'<div class="charts">{"".join(figures[True])}</div>'] if figures[True] else []
    if figures[False]:
        rest = f'<div class="charts">{"".join(figures[False])}</div>'
        parts.append(f"<details><summary>More curves</summary>{rest}</details>")
    return parts


def _figure(number: int, title: str, names: list[str]) -> str:
    legend = "".join(
        f'<span style="color:{COLORS[n % len(COLORS)]}">{_text(name)}</span>'
        for n, name in enumerate(names)
        if len(names) > 1
    )
    return (
        f'<figure data-chart="{number}"><figcaption><b>{_text(title)}</b>{legend}'
        '<span class="readout soft"></span><button type="button" hidden>whole run</button>'
        f'</figcaption><canvas role="img" aria-label="{_text(title)} by step"></canvas></figure>'
    )


def _player(sound: Sound | Medium) -> str:
    return f'<audio controls preload="metadata" src="{sound.uri}"></audio>'


def _asked(sound: Sound) -> str:
    return f'{_text(sound.text)} <small class="soft">{_text(sound.speaker)}</small>'


def _heard(sound: Sound) -> str:
    said = f"{_text(sound.heard)} <small>WER {_number(sound.wer)}</small>"
    return f"{_player(sound)}{said}"


def _side_by_side(runs: Sequence[RunFacts]) -> list[str]:
    """The same texts as several runs spoke them, one column a run, in the order of the runs."""
    spoken: dict[str, dict[str, Sound]] = {}
    for run in runs:
        for sound in run.sounds:
            spoken.setdefault(sound.name, {})[run.name] = sound
    shared = {name: by_run for name, by_run in spoken.items() if name and len(by_run) > 1}
    if not shared:
        return []
    columns = [run.name for run in runs if any(run.name in by_run for by_run in shared.values())]
    rows = []
    for by_run in shared.values():
        one = next(iter(by_run.values()))
        cells = [_heard(by_run[name]) if name in by_run else "" for name in columns]
        rows.append([_asked(one), *cells])
    head = ["text", *(_text(name) for name in columns)]
    return ["<h2>The same texts, spoken by each</h2>", _table(head, rows)]


def _cell(cell: str | float | Medium | None) -> str:
    """A cell of a sample as HTML."""
    if not isinstance(cell, Medium):
        return "" if cell is None else _text(cell) if isinstance(cell, str) else _number(cell)
    return {
        MediaType.audio: _player(cell),
        MediaType.image: f'<img class="sample" src="{cell.uri}" alt="">',
        MediaType.video: f'<video class="sample" controls preload="metadata" src="{cell.uri}">'
        "</video>",
    }[cell.kind]


def _samples(run: RunFacts) -> list[str]:
    parts = []
    if run.pairs:
        rows = [
            [
                _asked(pair.chosen),
                _heard(pair.chosen),
                _heard(pair.rejected),
                _number(pair.gap),
            ]
            for pair in run.pairs
        ]
        head = ["text", "chosen", "rejected", "gap"]
        parts += ["<h3>Preference pairs</h3>", _table(head, rows, numbers=1)]
    if run.sounds:
        rows = [
            [
                _player(sound),
                _text(sound.text),
                _text(sound.heard),
                _number(sound.wer),
                _text(sound.speaker),
            ]
            for sound in run.sounds
        ]
        parts += ["<h3>Speech</h3>", _table(["", "text", "heard", "WER", "voice"], rows)]
    for task, (columns, sampled) in run.samples.items():
        table = _table([_text(name) for name in columns], [list(map(_cell, r)) for r in sampled])
        parts += [f"<h3>Samples: {_text(task)}</h3>", table]
    for task, replies in run.replies.items():
        rows = [[_text(a), _text(b), "" if a == b else "&ne;"] for a, b in replies]
        table = _table(["reference", "reply", ""], rows)
        parts.append(f"<details><summary>Replies: {_text(task)}</summary>{table}</details>")
    for caption, uri in run.pictures:
        parts.append(
            f'<details><summary>{_text(caption)}</summary><div class="wide">'
            f'<img src="{uri}" alt="{_text(caption)}"></div></details>'
        )
    return parts


def _faults(run: RunFacts) -> list[str]:
    parts = []
    if run.faults:
        rows = [[_number(f.step), _text(f.kind), _text(f.detail)] for f in run.faults]
        parts += ["<h3>Faults and resumes</h3>", _table(["step", "what", ""], rows)]
    if run.unused:
        rows = [[_text(source), _text(reason), _number(n)] for (source, reason), n in run.unused]
        parts += ["<h3>Unusable samples</h3>", _table(["source", "reason", "count"], rows)]
    else:
        parts.append('<p class="soft">No unusable sample.</p>')
    return parts


def _graph(nodes: Sequence[GraphNode]) -> str:
    """Boxes in columns by distance from the start, arrows from left to right."""
    column: dict[str, int] = {}
    for node in nodes:
        column[node.name] = 1 + max((column[name] for name in node.after), default=-1)
    rows: dict[int, int] = {}
    place: dict[str, tuple[int, int]] = {}
    for node in nodes:
        row = rows.get(column[node.name], 0)
        rows[column[node.name]] = row + 1
        place[node.name] = (
            column[node.name] * (_BOX_WIDTH + _GAP_X),
            row * (_BOX_HEIGHT + _GAP_Y),
        )
    width = (max(column.values()) + 1) * (_BOX_WIDTH + _GAP_X) - _GAP_X + 2
    height = max(rows.values()) * (_BOX_HEIGHT + _GAP_Y) - _GAP_Y + 2
    size = f'width="{width}" height="{height}" viewBox="-1 -1 {width} {height}"'
    parts = [f'<svg {size} role="img" aria-label="graph of the pipeline">']
    for node in nodes:
        x, y = place[node.name]
        for name in node.after:
            a, b = place[name]
            start, end, middle = a + _BOX_WIDTH, x, y + _BOX_HEIGHT // 2
            parts.append(
                f'<path d="M{start} {b + _BOX_HEIGHT // 2} C{start + 20} {b + _BOX_HEIGHT // 2} '
                f'{end - 20} {middle} {end} {middle}" fill="none" stroke="#9aa5b1"/>'
            )
    for node in nodes:
        x, y = place[node.name]
        fill = _FILLS.get(node.state, "#f5f7fa")
        parts.append(
            f'<rect x="{x}" y="{y}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="5" '
            f'fill="{fill}" stroke="#9aa5b1"/><text x="{x + 8}" y="{y + 17}" font-size="13">'
            f'{_text(node.name[:26])}</text><text x="{x + 8}" y="{y + 33}" font-size="11" '
            f'fill="#616e7c">{_text(node.state)}</text>'
        )
    return "".join([*parts, "</svg>"])
