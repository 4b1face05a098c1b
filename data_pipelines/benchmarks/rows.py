"""Rows of a benchmark's files: JSON, JSON Lines, CSV, TSV, Parquet, LibriSpeech, `datasets`.

A JSON file is a list of rows, an object with the list under `data`, or WenetSpeech's: recordings
under `audios`, rows under the `segments` of each. A directory is what `datasets` saved, Parquet
files, LibriSpeech's tree of `*.trans.txt`, or GiantSteps' with `annotations/giantsteps/*.bpm`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.benchmarks.base import Row
from omni_train.config.errors import DataError


def read_rows(
    path: Path, *, root: Path | None = None, split: str = "", quoted: bool = False
) -> Iterator[Row]:
    """Yield every row of a file or directory.

    Args:
        path: what the benchmark's owner gives out.
        root: directory of the media; that of the file where left out.
        split: of a saved `DatasetDict`, or one of WenetSpeech's `subsets`.
        quoted: whether texts of a TSV stand in quotes where they hold tabs or several lines.

    Raises:
        DataError: `corrupt_source` with file and row; `unknown_source` for another kind of file.
        FileNotFoundError: there is nothing.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or directory")
    home = root or (path if path.is_dir() else path.parent)
    found = _of_directory(path, split) if path.is_dir() else _of_file(path, split, quoted)
    for file, number, values in found:
        if not isinstance(values, dict):
            raise DataError("corrupt_source", f"{file}, row {number}: {values!r} is no row")
        yield Row(file, number, values, home if root or not path.is_dir() else _home(home, file))


def _home(folder: Path, file: str) -> Path:
    """LibriSpeech's sounds lie beside their transcripts; all else starts at the directory."""
    return (folder / file).parent if file.endswith(".trans.txt") else folder


_MAX_FIELD = 2**31 - 1
Found = Iterator[tuple[str, int, Any]]


def _of_file(path: Path, split: str, quoted: bool) -> Found:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield path.name, number, _parsed(line, path.name, number)
    elif suffix == ".json":
        rows = _parsed(path.read_text(encoding="utf-8"), path.name, 1)
        if isinstance(rows, dict) and isinstance(rows.get("audios"), list):
            yield from _of_recordings(path.name, rows["audios"], split)
            return
        if isinstance(rows, dict):
            rows = rows.get("data")
        if not isinstance(rows, list):
            raise DataError(
                "corrupt_source", f"{path.name}: neither a list nor an object of `data`"
            )
        for number, values in enumerate(rows, 1):
            yield path.name, number, values
    elif suffix in (".csv", ".tsv"):
        yield from _of_table(path, "," if suffix == ".csv" else "\t", quoted or suffix == ".csv")
    elif suffix == ".parquet":
        yield from _of_parquet(path)
    else:
        raise DataError("unknown_source", f"{path.name} is none of .jsonl .json .csv .tsv .parquet")


def _of_table(path: Path, delimiter: str, quoted: bool) -> Found:
    # A picture in base64 is longer than a field of this module may be at first.
    csv.field_size_limit(_MAX_FIELD)
    number = 0
    with path.open(encoding="utf-8", newline="") as file:
        try:
            for values in csv.DictReader(
                file, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
            ):
                number += 1
                yield path.name, number, values
        except csv.Error as error:
            raise DataError("corrupt_source", f"{path.name}, row {number + 1}: {error}") from error


def _of_recordings(file: str, recordings: list[Any], subset: str) -> Found:
    number = 0
    for recording in recordings:
        segments = recording.get("segments") if isinstance(recording, dict) else None
        if not isinstance(segments, list) or not all(isinstance(one, dict) for one in segments):
            raise DataError("corrupt_source", f"{file}, row {number + 1}: no list of `segments`")
        for segment in segments:
            number += 1
            if not subset or subset in (segment.get("subsets") or []):
                yield file, number, {"path": recording.get("path"), **segment}


def _of_annotations(files: list[Path], folder: Path) -> Found:
    """A file has a comment and `tempo <from second> <beats per minute>`."""
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [line.split() for line in lines if line.split()[:1] == ["tempo"]]
        values = {"id": path.stem, "tempo": found[0][2]} if found and len(found[0]) == 3 else {}
        yield path.relative_to(folder).as_posix(), 1, values


def _parsed(text: str, file: str, number: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError("corrupt_source", f"{file}, row {number}: no JSON: {error}") from error


def _of_parquet(path: Path) -> Found:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for values in batch.to_pylist():
                    number += 1
                    yield path.name, number, values
    except (pa.ArrowException, OSError) as error:
        raise DataError("corrupt_source", f"{path.name}: {error}") from error


def _of_directory(folder: Path, split: str) -> Found:
    transcripts = sorted(folder.rglob("*.trans.txt"))
    tables = sorted(folder.glob("*.parquet"))
    tempos = sorted(folder.glob("annotations/giantsteps/*.bpm"))
    if transcripts:
        for path in transcripts:
            name = path.relative_to(folder).as_posix()
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                utterance, _, text = line.partition(" ")
                yield name, number, {"id": utterance, "text": text}
    elif tempos:
        yield from _of_annotations(tempos, folder)
    elif tables:
        for path in tables:
            yield from _of_parquet(path)
    else:
        yield from _of_dataset(folder, split)


def _of_dataset(folder: Path, split: str) -> Found:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except FileNotFoundError as error:
        raise DataError(
            "unknown_source", f"{folder} holds no saved dataset, Parquet or *.trans.txt"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError("unknown_source", f"{folder} has the splits {', '.join(loaded)}")
        loaded = loaded[split]
    for name, feature in loaded.features.items():
        # Media stay the bytes or the path that they are stored as.
        if isinstance(feature, datasets.Audio | datasets.Image):
            loaded = loaded.cast_column(name, type(feature)(decode=False))
    for number, values in enumerate(loaded, 1):
        yield split or "dataset", number, values
