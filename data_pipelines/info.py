"""How much of what is in a set: hours, tokens and samples, from the indexes alone.

Tokens are what `measure` counts, which is what encoding gives; no medium is opened. One shard's
index is in memory at a time, and one length per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_pipelines.lint import Encoding, open_set
from omni_train.data.index import index_path, read_index
from omni_train.data.measure import measure
from omni_train.data.skiplist import read_skip_list
from omni_train.data.types import IndexRow, MediaKind

GROUPS = ("modality", "task", "language", "speaker", "source")
_SECONDS_PER_HOUR = 3600
_BAR_WIDTH = 40


@dataclass(slots=True)
class Totals:
    """Sums over some samples.

    Args:
        samples: how many.
        tokens: of the packed sequence, media included.
        target_tokens: the supervised ones among them.
        media_us: microseconds of sound and video; a clip's sound counts with its picture.
    """

    samples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    media_us: int = 0

    @property
    def hours(self) -> float:
        """Length of all sound and video."""
        return self.media_us / 1e6 / _SECONDS_PER_HOUR

    def add(self, row: IndexRow, num_tokens: int) -> None:
        """Count one sample."""
        self.samples += 1
        self.tokens += num_tokens
        self.target_tokens += row.num_target_tokens
        self.media_us += sum(info.duration_us for info in row.media)

    def as_dict(self) -> dict[str, Any]:
        """The same with hours, for JSON."""
        values = asdict(self)
        del values["media_us"]
        return {**values, "hours": round(self.hours, 6)}


@dataclass(slots=True)
class Info:
    """What several sets hold together.

    Args:
        total: of all samples.
        groups: group name -> value of the group -> its totals; "" where a sample says nothing.
        lengths: int64 [samples], tokens of each.
        num_skipped: samples that a skip list leaves out; they are counted in all else.
    """

    total: Totals = field(default_factory=Totals)
    groups: dict[str, dict[str, Totals]] = field(default_factory=lambda: {g: {} for g in GROUPS})
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    num_skipped: int = 0

    def histogram(self) -> list[tuple[int, int, int]]:
        """Samples by length, as (from, up to but without, samples); bounds are powers of two."""
        if not len(self.lengths):
            return []
        low = int(np.log2(max(1, self.lengths.min())))
        high = int(np.log2(max(1, self.lengths.max()))) + 1
        edges = [2**power for power in range(low, high + 1)]
        counts, _ = np.histogram(self.lengths, bins=[*edges[:-1], edges[-1] - 0.5])
        return list(zip(edges, edges[1:], map(int, counts), strict=False))

    def as_dict(self) -> dict[str, Any]:
        """The same, for JSON."""
        return {
            "total": self.total.as_dict(),
            "skipped": self.num_skipped,
            **{
                f"by_{group}": {value: totals.as_dict() for value, totals in _sorted(values)}
                for group, values in self.groups.items()
            },
            "length_quantiles": self.quantiles(),
            "length_histogram": [
                {"from": low, "below": high, "samples": samples}
                for low, high, samples in self.histogram()
            ],
        }

    def quantiles(self) -> dict[str, int]:
        """Token lengths at the median, 95 %, 99 % and the longest."""
        if not len(self.lengths):
            return {}
        names = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
        return {n: int(np.quantile(self.lengths, q, method="higher")) for n, q in names.items()}


def collect_info(roots: Sequence[str | Path], encoding: Encoding) -> Info:
    """Sum up sets.

    Raises:
        FileNotFoundError, DataError, ConfigError, RunError: as `lint.open_set` and `read_index` do.
    """
    info = Info()
    lengths: list[NDArray[np.int64]] = []
    for path in roots:
        root, manifest = open_set(path, encoding.tokenizer)
        skip = read_skip_list(root)
        for shard in manifest.shards:
            url = root.url_of(index_path(shard.name).name)
            rows = read_index(url, xxh3=shard.index_xxh3, store=root.store)
            tokens = measure(rows, encoding.config, encoding.spec).num_tokens
            lengths.append(tokens)
            skipped = skip.get(shard.name, {})
            info.num_skipped += sum(row.key in skipped for row in rows)
            for row, num_tokens in zip(rows, tokens.tolist(), strict=True):
                info.total.add(row, num_tokens)
                for group, values in info.groups.items():
                    value = modality(row) if group == "modality" else getattr(row, group)
                    values.setdefault(value, Totals()).add(row, num_tokens)
    if lengths:
        info.lengths = np.concatenate(lengths)
    return info


def modality(row: IndexRow) -> str:
    """Name what a sample holds: text, image, audio, video, audio-video; several joined by `+`."""
    names = set()
    for info in row.media:
        with_sound = info.kind is MediaKind.video and info.has_audio and info.use_audio
        names.add("audio-video" if with_sound else info.kind.value)
    return "+".join(sorted(names)) or "text"


def _sorted(values: dict[str, Totals]) -> list[tuple[str, Totals]]:
    """Most tokens first."""
    return sorted(values.items(), key=lambda item: (-item[1].tokens, item[0]))


def print_info(info: Info, console: Console, *, rows_per_group: int = 12) -> None:
    """Print tables by group and the histogram of lengths."""
    _print_table(console, "all", [("all samples", info.total)], info.total.tokens)
    for group, values in info.groups.items():
        rows = _sorted(values)
        if [value for value, _ in rows] == [""]:
            continue
        shown, rest = rows[:rows_per_group], rows[rows_per_group:]
        if rest:
            others = Totals()
            for _, totals in rest:
                others.samples += totals.samples
                others.tokens += totals.tokens
                others.target_tokens += totals.target_tokens
                others.media_us += totals.media_us
            shown = [*shown, (f"({len(rest)} more, see --json)", others)]
        _print_table(console, group, shown, info.total.tokens)
    if info.num_skipped:
        console.print(f"{info.num_skipped:,} samples are left out by skip.json", highlight=False)
    _print_histogram(info, console)


def _print_table(
    console: Console, title: str, rows: list[tuple[str, Totals]], all_tokens: int
) -> None:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column(title, min_width=24, overflow="fold")
    for name in ("samples", "tokens", "share", "supervised", "hours"):
        table.add_column(name, justify="right", no_wrap=True)
    for value, totals in rows:
        table.add_row(
            Text(value or "(none)"),
            f"{totals.samples:,}",
            f"{totals.tokens:,}",
            f"{100 * totals.tokens / max(1, all_tokens):.1f} %",
            f"{totals.target_tokens:,}",
            f"{totals.hours:,.3f}",
        )
    console.print(table)
    console.print()


def _print_histogram(info: Info, console: Console) -> None:
    bins = info.histogram()
    if not bins:
        return
    most = max(samples for _, _, samples in bins)
    console.print("samples by length in tokens", highlight=False)
    for low, high, samples in bins:
        bar = "#" * max(1 if samples else 0, round(_BAR_WIDTH * samples / most))
        console.print(f"{low:>9,} - {high - 1:<9,} {samples:>9,} {bar}", highlight=False)
    text = ", ".join(f"{name} {value:,}" for name, value in info.quantiles().items())
    console.print(text, highlight=False)
