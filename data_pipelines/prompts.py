"""What a user asks for, in words: several wordings per task and kind of medium.

Tasks are told apart by natural language, never by tags such as `<|transcribe|>` or `[ASR]`, so a
model trained on them needs no tag later. A sample's wording follows from its key alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from string import Formatter

from data_pipelines.demo_content import pick
from omni_train.config.errors import DataError
from omni_train.data.types import MediaKind


class Task(Enum):
    """Tasks that have wordings here."""

    asr = "asr"
    translation = "translation"
    caption = "caption"
    qa = "qa"
    sound_classification = "sound_classification"
    emotion = "emotion"
    grounding = "grounding"
    ocr = "ocr"


_PICTURE_QA = (
    "{question}",
    "Look at the picture and answer: {question}",
    "{question} Answer from the picture.",
)
_SOUND_QA = (
    "{question}",
    "Listen and answer: {question}",
    "{question} Answer from what you hear.",
)
_CLIP_QA = (
    "{question}",
    "Watch the clip and answer: {question}",
    "{question} Answer from the video.",
)
_EMOTION = (
    "How does the speaker feel?",
    "Which emotion is in the voice?",
    "Name the emotion of the person who speaks.",
    "What mood does the speaker seem to be in?",
)
_TRANSLATION = (
    "Translate the speech into {target_language}.",
    "What is said here, in {target_language}?",
    "Listen, then write in {target_language} what the speaker says.",
    "Give a {target_language} translation of what you hear.",
)
_TRANSCRIPT = (
    "Write down what is said.",
    "Transcribe the speech.",
    "What does the speaker say?",
    "Please turn this recording into text.",
    "Listen and write every word you hear.",
)

# Fields in braces are filled from the sample; one that the sample lacks is an error.
PROMPTS: dict[Task, dict[MediaKind, tuple[str, ...]]] = {
    Task.asr: {MediaKind.audio: _TRANSCRIPT, MediaKind.video: _TRANSCRIPT},
    Task.translation: {MediaKind.audio: _TRANSLATION, MediaKind.video: _TRANSLATION},
    Task.caption: {
        MediaKind.image: (
            "Describe the picture.",
            "What does this picture show?",
            "Write a caption for the image.",
            "What can you see here?",
        ),
        MediaKind.audio: (
            "Describe what you hear.",
            "What happens in this recording?",
            "Write a caption for the sound.",
            "What can be heard here?",
        ),
        MediaKind.video: (
            "Describe the video.",
            "What happens in this clip?",
            "Write a caption for the video.",
            "Tell me what the clip shows.",
        ),
    },
    Task.qa: {
        MediaKind.image: _PICTURE_QA,
        MediaKind.audio: _SOUND_QA,
        MediaKind.video: _CLIP_QA,
    },
    Task.sound_classification: {
        MediaKind.audio: (
            "What kind of sound is this?",
            "Name the sound.",
            "What makes the sound in this recording?",
            "Which sound event do you hear?",
        ),
    },
    Task.emotion: {MediaKind.audio: _EMOTION, MediaKind.video: _EMOTION},
    Task.grounding: {
        MediaKind.image: (
            "Where is {phrase}? Give its bounding box.",
            "Find {phrase} in the picture and give its box.",
            "Locate {phrase}.",
        ),
        MediaKind.video: (
            "When does this happen: {phrase}? Give the start and the end.",
            "From when to when can this be seen: {phrase}?",
            "Find the moment of {phrase} in the video.",
        ),
    },
    Task.ocr: {
        MediaKind.image: (
            "Read the text in the picture.",
            "Which text does the image contain?",
            "Write down all text that you can see.",
        ),
    },
}

_LANGUAGES = """
ar Arabic, cs Czech, da Danish, de German, el Greek, en English, es Spanish, fa Persian, fi Finnish,
fr French, he Hebrew, hi Hindi, hu Hungarian, id Indonesian, it Italian, ja Japanese, ko Korean,
ms Malay, nl Dutch, no Norwegian, pl Polish, pt Portuguese, ro Romanian, ru Russian, sv Swedish,
th Thai, tr Turkish, uk Ukrainian, vi Vietnamese, yue Cantonese, zh Chinese
"""
LANGUAGES: dict[str, str] = dict(entry.split() for entry in _LANGUAGES.split(","))

_TASK_TAGS = (
    *(task.name for task in Task),
    *("aac", "aed", "asr", "ast", "lid", "s2t", "s2tt", "sec", "ser", "st", "tts", "vad", "vqa"),
    *("transcribe", "translate", "transcription", "notimestamps", "itn", "woitn", "withitn"),
)
_NAMES = "|".join(sorted({*_TASK_TAGS, *LANGUAGES}, key=len, reverse=True))
# Special tokens anywhere; a task or language name in brackets where a tag would stand.
_TAG = re.compile(
    rf"<\|[^|<>\s]{{1,40}}\|>|^\s*(?:<(?:{_NAMES})>|\[(?:{_NAMES})\]|\{{(?:{_NAMES})\}})",
    re.IGNORECASE,
)


def find_tag(text: str) -> str:
    """Return the first hierarchical tag of a text, such as `<|en|>` or a leading `[ASR]`, or ''."""
    found = _TAG.search(text)
    return found.group().strip() if found else ""


def prompt_for(task: str, kind: MediaKind, *, key: str, fields: Mapping[str, str]) -> str:
    """Return the wording of a task for one sample.

    Args:
        task: name of a `Task`.
        kind: what the task is about.
        key: of the sample; decides the wording.
        fields: what the wording may name, such as `question`; a language code in
            `target_language` is spelt out.

    Raises:
        DataError: `unknown_task` where there is no wording, `missing_field` where one is not given.
    """
    wordings = PROMPTS[Task[task]] if task in Task.__members__ else {}
    if kind not in wordings:
        known = ", ".join(t.name for t, kinds in PROMPTS.items() if kind in kinds)
        raise DataError("unknown_task", f"no wording for {task!r} with {kind.name}; known: {known}")
    template = pick(wordings[kind], key)
    values = dict(fields)
    code = values.get("target_language", "")
    values["target_language"] = LANGUAGES.get(code.lower(), code)
    for _, name, _, _ in Formatter().parse(template):
        if name is not None and not values.get(name):
            raise DataError("missing_field", f"the task {task} needs a value for {name}")
    return template.format_map(values)
