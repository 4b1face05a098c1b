"""A dataset of the `datasets` library, as `save_to_disk` leaves it.

Rows with `messages` are read as ms-swift's are, others as pairs of media and text. Audio, Image and
Video columns are taken as they are stored, bytes or path, without decoding; where there is only one
of a kind its name does not matter.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from dataclasses import replace
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from data_pipelines.sources.base import (
    KINDS,
    Draft,
    Gathered,
    Row,
    Source,
    SourceOptions,
    make_pair,
)
from data_pipelines.sources.ms_swift import placeholder_draft
from omni_train.config.errors import ConfigError
from omni_train.data.types import MediaKind

_FEATURES = {
    MediaKind.image: datasets.Image,
    MediaKind.audio: datasets.Audio,
    MediaKind.video: datasets.Video,
}


class HfDatasetsSource(Source):
    """Rows of one split.

    Args:
        options: where it lies and how it is read.
    """

    def __init__(self, options: SourceOptions) -> None:
        super().__init__(options)
        self._root = Path(options.media_root or options.path)
        self._rows = _load(options)
        self._media: dict[str, MediaKind] = {}
        for name, feature in self._rows.features.items():
            stored, kind = _undecoded(feature)
            if kind is not None:
                self._media[name] = kind
                self._rows = self._rows.cast_column(name, stored)
        self._renamed = self._usual_names()

    @property
    def num_rows(self) -> int:
        """Rows of the split."""
        return len(self._rows)

    def rows(self, chunk: int) -> Iterator[Row]:
        """Yield the rows of one chunk."""
        size = self.options.rows_per_chunk
        for number in range(chunk * size, min((chunk + 1) * size, self.num_rows)):
            yield Row(self.options.split or "dataset", number + 1, self._rows[number])

    def draft(self, row: Row) -> Draft:
        """Return the sample of a row."""
        values = {
            self._renamed.get(name, name): value if name in self._media else as_json(value)
            for name, value in row.data.items()
        }
        if self.options.column("messages") in values:
            return placeholder_draft(self, row, values, Gathered(self._root))
        return make_pair(self, row, values, self._root)

    def _usual_names(self) -> dict[str, str]:
        """The only column of a kind -> the usual name of that kind, unless a name was given."""
        plural = "s" if self.options.column("messages") in self._rows.column_names else ""
        renamed = {}
        for kind in KINDS:
            names = [name for name, found in self._media.items() if found is kind]
            wanted = self.options.column(f"{kind.name}{plural}")
            if len(names) == 1 and wanted not in self._rows.column_names:
                renamed[names[0]] = wanted
        return renamed


def _load(options: SourceOptions) -> datasets.Dataset:
    try:
        loaded = datasets.load_from_disk(options.path)
    except FileNotFoundError as error:
        remedy = "give what save_to_disk of the library wrote"
        raise FileNotFoundError(f"{options.path} holds no dataset; {remedy}") from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if options.split not in loaded:
        raise ConfigError(
            key="--split",
            value=options.split,
            rule=f"the dataset has the splits {', '.join(loaded)}",
            remedy="name one of them",
        )
    return loaded[options.split]


def _undecoded(feature: Any) -> tuple[Any, MediaKind | None]:
    """Return the feature as it is stored, and the kind of media it holds, if any."""
    for kind, known in _FEATURES.items():
        if isinstance(feature, known):
            return replace(feature, decode=False), kind
    if isinstance(feature, datasets.List):
        inner, found = _undecoded(feature.feature)
        return datasets.List(inner, length=feature.length), found
    return feature, None


def as_json(value: Any) -> Any:
    """Return a value that JSON can hold: times as ISO text, bytes as base64, NaN as text."""
    if isinstance(value, dict):
        return {str(name): as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return as_json(value.tolist())
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode("ascii")}
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value)
