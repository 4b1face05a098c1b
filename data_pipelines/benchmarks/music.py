"""Music: GiantSteps tempo, MusicCaps."""

from __future__ import annotations

from data_pipelines.benchmarks.base import Question, Row
from omni_train.data.types import MediaKind

TEMPO = "What is the tempo of this music in beats per minute? Give the number alone."
DESCRIBE = "Describe this music."


def giantsteps(row: Row) -> Question:
    """`id` and `tempo` of an annotation; the sound is `audio/<id>.mp3`.

    These are the owner's first annotations, with one tempo for every track.
    """
    tempo = row.text("tempo")
    try:
        known = float(tempo) > 0
    except ValueError as error:
        raise row.wrong("bad_field", f"field 'tempo' is {tempo!r}, no number") from error
    if not known:
        raise row.wrong("bad_field", f"field 'tempo' is {tempo!r}: the track has no tempo")
    return Question([(MediaKind.audio, f"audio/{row.text('id')}.mp3"), TEMPO], [tempo])


def musiccaps(row: Row) -> Question:
    """`ytid` and `caption`; the ten seconds from `start_s` on are cut into `<ytid>.wav`."""
    sound = (MediaKind.audio, f"{row.text('ytid')}.wav")
    return Question([sound, DESCRIBE], [row.text("caption")])
