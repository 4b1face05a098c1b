"""Multiple choice: OmniBench, MMAU, MMMU, MMLU and its kin, GPQA, clips, AI2D."""

from __future__ import annotations

import ast
import re
from typing import Any

import xxhash

from data_pipelines.benchmarks.base import LETTERS, Question, Row, choice
from omni_train.data.types import MediaKind

_LETTERED = re.compile(r"^\(?[A-Z][.):]\s*")
_MAX_PICTURES = 7


def omnibench(row: Row) -> Question:
    """`image_path`, `audio_path`, `question`, `options` (list), `answer` (an option's text)."""
    media: list[tuple[MediaKind, Any]] = [
        (MediaKind.image, f"mm_data/image/{row.text('image_path')}"),
        (MediaKind.audio, f"mm_data/audio/{row.text('audio_path')}"),
    ]
    options, group = row.texts("options"), row.text("audio type")
    return choice(row, media, row.text("question"), options, row.text("answer"), group)


def mmau(row: Row) -> Question:
    """`audio_id` (a path), `question`, `choices`, `answer` (a choice's text), `task`."""
    sound = (MediaKind.audio, row.text("audio_id"))
    options = row.texts("choices")
    return choice(row, [sound], row.text("question"), options, row.text("answer"), row.text("task"))


def mmmu(row: Row) -> Question:
    """`question` with `<image i>`, `options` (a list in text), `answer`, `image_1` to `image_7`.

    Only rows of `question_type` multiple-choice; open ones are refused.
    """
    if row.text("question_type") != "multiple-choice":
        raise row.wrong("bad_field", "field 'question_type' is not 'multiple-choice'")
    options, media = listed(row, "options"), numbered_pictures(row)
    group = str(row.values.get("subfield") or "")
    return choice(row, media, row.text("question"), options, row.text("answer"), group)


def listed(row: Row, name: str) -> list[str]:
    """Return a field that is a Python list in a text."""
    try:
        return [str(option) for option in ast.literal_eval(row.text(name))]
    except (ValueError, SyntaxError, TypeError) as error:
        raise row.wrong("bad_field", f"field {name!r} is no list ({error})") from error


def numbered_pictures(row: Row) -> list[tuple[MediaKind, Any]]:
    """Return `image_1` to `image_7`, those that there are."""
    pictures = [row.values.get(f"image_{i}") for i in range(1, _MAX_PICTURES + 1)]
    return [(MediaKind.image, picture) for picture in pictures if picture is not None]


def mmlu(row: Row) -> Question:
    """`question`, `choices`, `answer` (a number from 0), `subject`."""
    return _numbered(row, row.text("subject"))


def mmlu_redux(row: Row) -> Question:
    """`question`, `choices`, `answer` (MMLU's, a number from 0), `error_type`.

    The score of the group `ok` is that of the questions whose answer was found right.
    """
    return _numbered(row, row.text("error_type"))


def _numbered(row: Row, group: str) -> Question:
    options, answer = row.texts("choices"), row.get("answer")
    if not isinstance(answer, int) or not 0 <= answer < len(options):
        raise row.wrong("bad_field", f"field 'answer' is {answer!r}, no number of a choice")
    return choice(row, [], row.text("question"), options, LETTERS[answer], group)


def gpqa(row: Row) -> Question:
    """`Question`, `Correct Answer`, `Incorrect Answer 1` to `3`, `High-level domain`.

    The right answer's place is drawn from the question's text, so it is the same in every run.
    """
    question, right = row.text("Question"), row.text("Correct Answer")
    options = [row.text(f"Incorrect Answer {i}") for i in (1, 2, 3)]
    place = xxhash.xxh3_64_intdigest(question.encode()) % (len(options) + 1)
    options.insert(place, right)
    return choice(row, [], question, options, LETTERS[place], row.text("High-level domain"))


def mmlu_pro(row: Row) -> Question:
    """`question`, `options`, `answer` (a letter), `category`."""
    options = row.texts("options")
    return choice(row, [], row.text("question"), options, row.text("answer"), row.text("category"))


def video_mme(row: Row) -> Question:
    """`videoID`, `question`, `options` (with their letters), `answer` (a letter), `duration`."""
    clip = (MediaKind.video, f"{row.text('videoID')}.mp4")
    options = [_LETTERED.sub("", option) for option in row.texts("options")]
    return choice(
        row, [clip], row.text("question"), options, row.text("answer"), row.text("duration")
    )


def mvbench(row: Row) -> Question:
    """`video` (a path), `question`, `candidates`, `answer` (a candidate's text)."""
    clip = (MediaKind.video, row.text("video"))
    return choice(row, [clip], row.text("question"), row.texts("candidates"), row.text("answer"))


def egoschema(row: Row) -> Question:
    """`video_idx`, `question`, `option`, `answer` (a number from 0, in text).

    The subset whose answers are public; clips are `videos/<video_idx>.mp4`.
    """
    clip = (MediaKind.video, f"videos/{row.text('video_idx')}.mp4")
    options, answer = row.texts("option"), row.text("answer")
    if not answer.isdigit() or int(answer) >= len(options):
        raise row.wrong("bad_field", f"field 'answer' is {answer!r}, no number of an option")
    options = [_LETTERED.sub("", option) for option in options]
    return choice(row, [clip], row.text("question"), options, LETTERS[int(answer)])


def ai2d(row: Row) -> Question:
    """`image`, `question`, `options`, `answer` (a number from 0, in text)."""
    options, answer = row.texts("options"), row.text("answer")
    if not answer.isdigit() or int(answer) >= len(options):
        raise row.wrong("bad_field", f"field 'answer' is {answer!r}, no number of an option")
    picture = (MediaKind.image, row.get("image"))
    return choice(row, [picture], row.text("question"), options, LETTERS[int(answer)])
