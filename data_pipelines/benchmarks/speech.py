"""Speech recognition and translation: LibriSpeech, Common Voice, WenetSpeech, CoVoST 2 and others.

`*.trans.txt` of LibriSpeech; Common Voice's and CoVoST 2's TSV, media under `clips/`; FLEURS and
VoxPopuli as datasets with a column of sound.
"""

from __future__ import annotations

import io

import soundfile

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
    """`path` of a recording, `begin_time` and `end_time` (seconds), `text` and `sid`.

    A segment of the owner's `WenetSpeech.json`; `--split` is one of its `subsets`. The segment is
    cut out of the long recording.
    """
    name = f"{row.text('sid')}.flac"
    return _transcript({"bytes": _segment(row), "path": name}, row.text("text"))


def _segment(row: Row) -> bytes:
    path = row.root / row.text("path")
    times = [row.get(name) for name in ("begin_time", "end_time")]
    if not all(isinstance(time, int | float) for time in times) or not 0 <= times[0] < times[1]:
        raise row.wrong("bad_field", f"fields 'begin_time' and 'end_time' are {times}")
    if not path.is_file():
        raise row.wrong("missing_media", f"there is no file {row.text('path')}")
    try:
        with soundfile.SoundFile(path) as recording:
            rate = recording.samplerate
            first, last = (round(time * rate) for time in times)
            recording.seek(min(first, recording.frames))
            samples = recording.read(last - first)
    except soundfile.LibsndfileError as error:
        raise row.wrong("bad_media", f"{row.text('path')}: {error}") from error
    # Times are rounded, so the last segment may end a little behind the recording.
    if len(samples) < (last - first) // 2:
        raise row.wrong("bad_field", f"fields 'begin_time' and 'end_time' are {times}: no sound")
    sink = io.BytesIO()
    soundfile.write(sink, samples, rate, format="FLAC")
    return sink.getvalue()


def covost2(row: Row) -> Question:
    """`path` below `clips/`, `translation`; `split` of the name says the pair, such as `en_de`."""
    asked = TRANSLATE.format(language=row.values.get("target_language") or "the target language")
    sound = (MediaKind.audio, f"clips/{row.text('path')}")
    return Question([sound, asked], [row.text("translation")])


def _transcript(sound: object, text: str) -> Question:
    return Question([(MediaKind.audio, sound), TRANSCRIBE], [text])
