"""What a converter gets and gives: a row whose missing fields are named, and a question.

    files -> Row -> converter (one small file per family) -> Question -> shards (make.py)

A converter reads the fields that the benchmark's owner documents and nothing else. Not done here:
reading files (rows.py), the table (table.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.sources.base import Gathered
from omni_train.config.errors import DataError
from omni_train.data.types import MediaKind

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHOICE_PROMPT = "Answer with the letter of the right option alone."


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a benchmark's file.

    Args:
        file: its name, for messages.
        number: of the row in it, from 1.
        values: its fields.
        root: directory that media paths start from.
    """

    file: str
    number: int
    values: Mapping[str, Any]
    root: Path

    def get(self, name: str) -> Any:
        """Return a field.

        Raises:
            DataError: `missing_field`, with file, row and field.
        """
        value = self.values.get(name)
        if value is None:
            raise self.wrong("missing_field", f"field {name!r} is missing")
        return value

    def text(self, name: str) -> str:
        """Return a field that is a text with something in it."""
        value = self.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong("bad_field", f"field {name!r} is {value!r}, not a text")
        return value.strip()

    def texts(self, name: str) -> list[str]:
        """Return a field that is a list of texts."""
        value = self.get(name)
        if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not len(value):
            raise self.wrong("bad_field", f"field {name!r} is {value!r}, not a list of texts")
        return [str(item) for item in value]

    def wrong(self, reason: str, detail: str) -> DataError:
        """Return an error that says where it was found."""
        return DataError(reason, f"{self.file}, row {self.number}: {detail}")


@dataclass(slots=True)
class Question:
    """A question and what answers it.

    Args:
        content: media, each (kind, path below the row's root or bytes of a dataset), and texts in
            the order in which the model reads them.
        references: texts that are right; the first is the assistant's turn.
        options: of a closed question.
        group: part of the benchmark that gets a score of its own.
        system: text of the system turn; empty leaves the usual one.
        facts: anything else that a reader of the predictions may want.
    """

    content: list[tuple[MediaKind, Any] | str]
    references: list[str]
    options: list[str] = field(default_factory=list)
    group: str = ""
    system: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


Convert = Callable[[Row], Question]


def choice(
    row: Row,
    media: list[tuple[MediaKind, Any]],
    question: str,
    options: list[str],
    answer: str,
    group: str = "",
) -> Question:
    """Return a multiple-choice question; `answer` is a letter, or the right option's text.

    Raises:
        DataError: `bad_field` where the answer names no option.
    """
    if answer in options:
        letter = LETTERS[options.index(answer)]
    elif len(answer) == 1 and answer.upper() in LETTERS[: len(options)]:
        letter = answer.upper()
    else:
        raise row.wrong("bad_field", f"answer {answer!r} is none of {options}")
    lines = [f"{LETTERS[i]}. {option}" for i, option in enumerate(options)]
    text = "\n".join([question, *lines, CHOICE_PROMPT])
    return Question([*media, text], [letter], options, group)


def record_of(row: Row, question: Question, task: str) -> tuple[dict[str, Any], Gathered]:
    """Return the record of a question, and its media.

    Raises:
        DataError: where a medium is missing or of another kind, with file and row.
    """
    gathered = Gathered(row.root)
    content: list[dict[str, Any]] = []
    for item in question.content:
        if isinstance(item, str):
            content.append({"type": "text", "text": item})
            continue
        kind, value = item
        try:
            content.append({"type": kind.name, kind.name: gathered.add(kind, value)})
        except DataError as error:
            raise row.wrong(error.reason, error.detail) from error
    messages: list[dict[str, Any]] = []
    if question.system:
        messages.append({"role": "system", "content": question.system})
    messages += [
        {"role": "user", "content": content},
        {"role": "assistant", "content": question.references[0]},
    ]
    meta: dict[str, Any] = {"group": question.group, "origin": f"{row.file}:{row.number}"}
    if len(question.references) > 1:
        meta["references"] = question.references
    if question.options:
        meta["options"] = question.options
    meta |= question.facts
    return {"messages": messages, "task": task, "meta": meta}, gathered
