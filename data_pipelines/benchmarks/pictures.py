"""Pictures: MMBench, MMStar, RealWorldQA, MME, MMMU-Pro, MuirBench, MathVista, MathVision."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from data_pipelines.benchmarks.base import CHOICE_PROMPT, LETTERS, Question, Row, choice
from data_pipelines.benchmarks.choices import listed, numbered_pictures
from omni_train.data.types import MediaKind

VALUE_PROMPT = "Give the final answer alone."
_PLACE = "<image>"
_MMBENCH_OPTIONS = "ABCDE"


def mmbench(row: Row) -> Question:
    """`image` (base64), `hint`, `question`, `A` to `E`, `answer` (a letter), `category`.

    The owner's TSV; `hint` and the later options may be empty. Each row counts by itself: circular
    evaluation, over copies of a question with its options rotated, is not done.
    """
    # Rows of one question may have fewer options than there are columns.
    found = [str(row.values.get(letter) or "").strip() for letter in _MMBENCH_OPTIONS]
    count = next((i for i, option in enumerate(found) if not option), len(found))
    if count < 2:
        raise row.wrong("missing_field", "field 'A' or 'B' is missing")
    hint = str(row.values.get("hint") or "").strip()
    question = "\n".join(text for text in (hint, row.text("question")) if text)
    answer, group = row.text("answer"), row.text("category")
    if answer not in tuple(LETTERS[:count]):
        raise row.wrong("bad_field", f"field 'answer' is {answer!r}, none of {LETTERS[:count]}")
    # By its text: an option may read like another one's letter.
    right = found[LETTERS.index(answer)]
    return choice(row, [_picture(row)], question, found[:count], right, group)


def _picture(row: Row) -> tuple[MediaKind, Any]:
    text = row.text("image")
    if text.isdigit():
        raise row.wrong("bad_field", f"field 'image' is {text}, the number of another row")
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise row.wrong("bad_field", f"field 'image' is no base64 ({error})") from error
    return MediaKind.image, {"bytes": data, "path": None}


def mmstar(row: Row) -> Question:
    """`image`, `question` with its options in it, `answer` (a letter), `category`."""
    asked = f"{row.text('question')}\n{CHOICE_PROMPT}"
    picture = (MediaKind.image, row.get("image"))
    return Question([picture, asked], [row.text("answer")], group=row.text("category"))


def realworldqa(row: Row) -> Question:
    """`image`, `question` that says how to reply, `answer` (a letter, a word or a number)."""
    picture = (MediaKind.image, row.get("image"))
    return Question([picture, row.text("question")], [row.text("answer")])


def mme(row: Row) -> Question:
    """`image`, `question` that asks for yes or no, `answer`, `category`.

    The figure is accuracy over questions; the owner's sum also has accuracy over picture pairs.
    """
    picture = (MediaKind.image, row.get("image"))
    content: list[Any] = [picture, row.text("question")]
    return Question(content, [row.text("answer")], group=row.text("category"))


def mmmu_pro(row: Row) -> Question:
    """`question` with `<image i>`, `options` (a list in text), `answer`, `image_1` to `image_7`.

    The standard configurations, of 4 and of 10 options; `subject` is the group.
    """
    options, media = listed(row, "options"), numbered_pictures(row)
    group = row.text("subject")
    return choice(row, media, row.text("question"), options, row.text("answer"), group)


def muirbench(row: Row) -> Question:
    """`question` and `options` with `<image>`, `image_list`, `answer` (a letter), `task`.

    Pictures stand where the texts have their places, in order.
    """
    pictures = row.get("image_list")
    if not isinstance(pictures, list):
        raise row.wrong("bad_field", f"field 'image_list' is {type(pictures).__name__}, no list")
    made = choice(
        row, [], row.text("question"), row.texts("options"), row.text("answer"), row.text("task")
    )
    texts = str(made.content[0]).split(_PLACE)
    if len(texts) != len(pictures) + 1:
        places = f"{len(texts) - 1} places for {len(pictures)} pictures"
        raise row.wrong("bad_field", f"field 'image_list': the texts have {places}")
    made.content = [texts[0]] if texts[0] else []
    for picture, text in zip(pictures, texts[1:], strict=True):
        made.content += [(MediaKind.image, picture), *([text] if text else [])]
    return made


def mathvista(row: Row) -> Question:
    """`decoded_image`, `question`, `question_type`, `choices`, `unit`, `precision`, `answer`.

    The owner reads the answer out of a long reply with a model; here the reply is the answer alone.
    """
    picture = (MediaKind.image, row.get("decoded_image"))
    answer = row.text("answer")
    if row.text("question_type") == "multi_choice":
        options = row.texts("choices")
        return _closed(row, picture, options, answer, "")
    unit = str(row.values.get("unit") or "").strip()
    asked = [row.text("question"), f"Unit: {unit}." if unit else "", VALUE_PROMPT]
    precision = row.values.get("precision")
    if isinstance(precision, int | float) and precision > 0:
        asked.insert(-1, f"Round it to {int(precision)} decimal places.")
    return Question([picture, "\n".join(filter(None, asked))], [answer])


def mathvision(row: Row) -> Question:
    """`decoded_image`, `question`, `options` (may be none), `answer`, `subject`.

    `answer` is an option's letter, or a value in LaTeX, which must be met to the sign.
    """
    picture = (MediaKind.image, row.get("decoded_image"))
    answer, group = row.text("answer"), row.text("subject")
    if row.values.get("options"):
        return _closed(row, picture, row.texts("options"), answer, group)
    asked = f"{row.text('question')}\n{VALUE_PROMPT}"
    return Question([picture, asked], [answer], group=group)


def _closed(
    row: Row, picture: tuple[MediaKind, Any], options: list[str], answer: str, group: str
) -> Question:
    """A choice in a set that has open questions too: the letter or the text is right."""
    made = choice(row, [picture], row.text("question"), options, answer, group)
    text = options[LETTERS.index(made.references[0])]
    made.references = list(dict.fromkeys([made.references[0], text]))
    return made
