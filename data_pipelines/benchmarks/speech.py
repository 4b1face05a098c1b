"""Speech recognition and translation: LibriSpeech, Common Voice, WenetSpeech, CoVoST 2 and others.

`*.trans.txt` of LibriSpeech; Common Voice's and CoVoST 2's TSV, media under `clips/`; FLEURS and
VoxPopuli as datasets with a column of sound.
"""

from __future__ import annotations

from data_pipelines.benchmarks.base import Question, Row
from omni_train.data.types import MediaKind

TRANSCRIBE = "Transcribe the speech into text."
TRANSLATE = "Translate the speech into {language}. Give the translation alone."


def librispeech(row: Row) -> Question:
    """`id` and `text`; the sound is `<id>.flac` beside the transcript."""
    return _transcript(f"{row.text('id')}.flac", row.text("text"))


def common_voice(row: Row) -> Question:
    """`path` below `clips/`, and `sentence`."""
    return _transcript(f"clips/{row.text('path')}", row.text("sentence"))


def fleurs(row: Row) -> Question:
    """`audio` and `transcription`; `raw_transcription` has case and punctuation."""
    return _transcript(row.get("audio"), row.text("transcription"))


def voxpopuli(row: Row) -> Question:
    """`audio` and `normalized_text`."""
    return _transcript(row.get("audio"), row.text("normalized_text"))


def wenetspeech(row: Row) -> Question:
    """`sid` and `text` of a segment of Test_Net or Test_Meeting, and `audio`, its sound.

    The owner's JSON has `begin_time` and `end_time` in a long recording: cut it first.
    """
    row.text("sid")
    return _transcript(row.get("audio"), row.text("text"))


def covost2(row: Row) -> Question:
    """`path` below `clips/`, `translation`; `split` of the name says the pair, such as `en_de`."""
    asked = TRANSLATE.format(language=row.values.get("target_language") or "the target language")
    sound = (MediaKind.audio, f"clips/{row.text('path')}")
    return Question([sound, asked], [row.text("translation")])


def _transcript(sound: object, text: str) -> Question:
    return Question([(MediaKind.audio, sound), TRANSCRIBE], [text])
