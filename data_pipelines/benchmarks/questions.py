"""Open questions (ChartQA, TextVQA, DocVQA, GSM8K, MATH), boxes (RefCOCO), VoiceBench."""

from __future__ import annotations

import re

from data_pipelines.benchmarks.base import Question, Row
from omni_train.data.types import MediaKind

SHORT = "Answer with a single word or number."
LOCATE = "Give the box of this as [x1, y1, x2, y2] in pixels: {phrase}"
_FINAL = re.compile(r"####\s*(-?[\d,.]+)\s*$")
_BOXED = "\\boxed{"


def chartqa(row: Row) -> Question:
    """`imgname` below `png/`, `query`, `label`."""
    picture = (MediaKind.image, f"png/{row.text('imgname')}")
    return Question([picture, f"{row.text('query')}\n{SHORT}"], [row.text("label")])


def textvqa(row: Row) -> Question:
    """`image_id`, `question`, `answers` (ten people's); the picture is `<image_id>.jpg`."""
    picture = (MediaKind.image, f"{row.text('image_id')}.jpg")
    # How many people say the same is what the score is made of; the most frequent comes first.
    answers = row.texts("answers")
    references = sorted(answers, key=lambda answer: -answers.count(answer))
    return Question([picture, f"{row.text('question')}\n{SHORT}"], references)


def docvqa(row: Row) -> Question:
    """`image` (a path), `question`, `answers`."""
    picture = (MediaKind.image, row.get("image"))
    references = list(dict.fromkeys(row.texts("answers")))
    return Question([picture, f"{row.text('question')}\n{SHORT}"], references)


def refcoco(row: Row) -> Question:
    """`image`, `answer` (list of phrases), `bbox` (x, y, width, height); also RefCOCO+ and g."""
    try:
        x, y, width, height = (float(number) for number in row.texts("bbox"))
    except ValueError as error:
        raise row.wrong("bad_field", f"field 'bbox' is {row.get('bbox')!r}") from error
    box = [round(value, 1) for value in (x, y, x + width, y + height)]
    picture = (MediaKind.image, row.get("image"))
    return Question([picture, LOCATE.format(phrase=row.texts("answer")[0])], [str(box)])


def voicebench(row: Row) -> Question:
    """`audio` and `reference`: the question is heard alone (SD-QA, OpenBookQA, MMSU)."""
    return Question([(MediaKind.audio, row.get("audio"))], [row.text("reference")], group="voice")


def voicebench_open(row: Row) -> Question:
    """`audio` and `prompt` (AlpacaEval, CommonEval, IFEval, AdvBench), which others judge.

    No reply is right; the reference is the question in writing, which the judge reads.
    """
    return Question([(MediaKind.audio, row.get("audio"))], [row.text("prompt")])


def voicebench_text(row: Row) -> Question:
    """The same in writing: `prompt` and `reference`."""
    return Question([row.text("prompt")], [row.text("reference")], group="text")


def gsm8k(row: Row) -> Question:
    """`question`, and `answer` that ends in `#### 42`."""
    found = _FINAL.search(row.text("answer"))
    if found is None:
        raise row.wrong("bad_field", "field 'answer' does not end in #### and a number")
    final = found[1].replace(",", "")
    return Question([f"{row.text('question')}\nGive the number alone."], [final])


def math(row: Row) -> Question:
    """`problem`, and `solution` whose last `\\boxed{...}` is the answer.

    Replies must be that LaTeX to the letter; equal values written in another way count as wrong.
    """
    solution = row.text("solution")
    start = solution.rfind(_BOXED)
    answer = _braced(solution, start + len(_BOXED)) if start >= 0 else ""
    if not answer:
        raise row.wrong("bad_field", "field 'solution' has no \\boxed{...}")
    return Question([f"{row.text('problem')}\nGive the final answer in LaTeX alone."], [answer])


def _braced(text: str, start: int) -> str:
    """The text from `start` to the brace that closes it; empty where none does."""
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end].strip()
    return ""
