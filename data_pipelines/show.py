"""One sample for people: its token timeline as PNG and as a page, its ids in the terminal.

    SHARD:KEY -> fetch -> encode -> timeline_data.py -> timeline.py -> PNG, HTML

The page is one file: pictures and sound are inside it, it runs no script and asks for no address.
"""

from __future__ import annotations

import html
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from data_pipelines.lint import Encoding, open_set
from data_pipelines.timeline import draw_timeline, text_color
from data_pipelines.timeline_data import Timeline, build_timeline
from data_pipelines.timeline_draw import data_uri, to_png, to_svg
from data_pipelines.timeline_style import COLORS
from omni_train.config.errors import ConfigError, DataError
from omni_train.data.encode import encode
from omni_train.data.fetch import fetch
from omni_train.data.index import index_path, read_index, write_atomically
from omni_train.speech.mel import SAMPLE_RATE_HZ

# The page carries its sound; an hour of it would make a page that no browser opens.
MAX_PAGE_SOUND_S = 120
_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
_STYLE = (
    "body{font-family:sans-serif;margin:16px;color:#1f2933;background:#fff}"
    "p,h2,.ids{margin-left:24px}svg{max-width:100%;height:auto}"
    ".ids span{display:inline-block;margin:1px;padding:1px 4px;font-family:monospace}"
    ".on{border-bottom:3px solid #1b9e5a}"
    ".off{border-bottom:3px solid #e3e7eb}"
)


@dataclass(frozen=True, slots=True)
class Shown:
    """Where the two pictures were written, and what they show."""

    png: Path
    page: Path
    timeline: Timeline


def show_sample(place: str, encoding: Encoding, out_dir: str | Path) -> Shown:
    """Draw one sample.

    Args:
        place: `SHARD:KEY`, path or URL of a tar (its suffix may be left out) and a key in it.
        encoding: how the sample becomes tokens.
        out_dir: gets `<key>.png` and `<key>.html`; made if it is not there.

    Raises:
        ConfigError: `place` has another form.
        DataError: `unknown_key`, or the reason why the sample cannot be encoded.
    """
    folder, name, key = split_place(place)
    root, _ = open_set(folder, encoding.tokenizer)
    shard = root.url_of(name)
    rows = read_index(root.url_of(index_path(name).name), store=root.store)
    row = next((row for row in rows if row.key == key), None)
    if row is None:
        there = f"{rows[0].key} to {rows[-1].key}" if rows else "none"
        raise DataError("unknown_key", f"no such sample; it has {there}", shard=shard, key=key)
    raw = fetch(shard, row, root.store)
    try:
        sample = encode(raw, encoding.tokenizer, encoding.config, encoding.spec)
    except DataError as error:
        raise error.at(shard=shard, key=key) from error
    timeline = build_timeline(name, raw, sample, encoding)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    drawing = draw_timeline(timeline)
    png, page = out / f"{key}.png", out / f"{key}.html"
    write_atomically(png, to_png(drawing))
    write_atomically(page, page_of(timeline, to_svg(drawing)).encode())
    return Shown(png, page, timeline)


def split_place(place: str) -> tuple[str | Path, str, str]:
    """Split `SHARD:KEY` into the set's directory or URL, the name of the tar, and the key."""
    shard, _, key = place.rpartition(":")
    folder, _, name = shard.rpartition("/")
    if not name or not key or key.startswith("//"):
        raise ConfigError(
            key="SHARD:KEY",
            value=place,
            rule="the path of a shard, a colon, and the key of a sample in it",
            remedy="for example shards/shard-000000.tar:sample-000012",
        )
    name = name if name.endswith(".tar") else f"{name}.tar"
    return (folder if "://" in folder else Path(shard).parent), name, key


def page_of(timeline: Timeline, svg: str) -> str:
    """Return the whole page; all texts of the sample are escaped."""
    title = html.escape(f"{timeline.shard}:{timeline.key}")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body>",
        svg,
        *_players(timeline),
        f"<h2>Every id ({timeline.num_tokens:,})</h2>",
        f'<div class="ids">{_id_cells(timeline)}</div>',
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _players(timeline: Timeline) -> list[str]:
    players = []
    for view in timeline.media:
        if not len(view.wave):
            continue
        kept = view.wave[: MAX_PAGE_SOUND_S * SAMPLE_RATE_HZ]
        cut = f", the first {MAX_PAGE_SOUND_S} s of it" if len(kept) < len(view.wave) else ""
        name = html.escape(f"sound of {view.info.member} as the model hears it{cut}")
        source = data_uri(_wav(kept), "audio/wav")
        players.append(f'<p>{name}<br><audio controls src="{source}"></audio></p>')
    return players


def _wav(wave: NDArray[np.float32]) -> bytes:
    sink = io.BytesIO()
    soundfile.write(sink, wave.clip(-1, 1), SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    return sink.getvalue()


def _id_cells(timeline: Timeline) -> str:
    cells = []
    for at, (token, kind) in enumerate(zip(timeline.ids.tolist(), timeline.kinds, strict=True)):
        color = COLORS[kind]
        shown = html.escape(timeline.pieces[at] or kind.value)
        side = "on" if timeline.supervised[at] else "off"
        style = f"background:{color};color:{text_color(color)}"
        title = f"token {at}, positions {timeline.positions[:, at].tolist()}"
        cells.append(f'<span class="{side}" style="{style}" title="{title}">{token} {shown}</span>')
    return "".join(cells)


def print_ids(timeline: Timeline, console: Console) -> None:
    """Print the ids: green and underlined where the loss reads them, placeholders as runs."""
    line = Text()
    for start, end in timeline.runs():
        style = "bold green underline" if timeline.supervised[start] else "dim"
        if not any(timeline.pieces[start:end]) and end - start > 1:
            line.append(f"{timeline.ids[start]}x{end - start}", style)
        else:
            line.append(" ".join(str(token) for token in timeline.ids[start:end]), style)
        line.append(" ")
    console.print(line)
    supervised = int(timeline.supervised.sum())
    console.print(
        f"{timeline.num_tokens:,} ids, the loss reads {supervised:,} of them; "
        "NxM is the placeholder N, M times",
        highlight=False,
    )


def summary(shown: Shown) -> dict[str, Any]:
    """The same for JSON, ids and loss mask in full."""
    timeline = shown.timeline
    return {
        "shard": timeline.shard,
        "key": timeline.key,
        **timeline.facts,
        "num_tokens": timeline.num_tokens,
        "num_target_tokens": int(timeline.supervised.sum()),
        "ids": timeline.ids.tolist(),
        "supervised": timeline.supervised.astype(int).tolist(),
        "position_ids": timeline.positions.tolist(),
        "png": str(shown.png),
        "html": str(shown.page),
    }
