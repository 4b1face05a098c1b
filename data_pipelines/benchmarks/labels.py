"""Emotions and sounds: MELD, VocalSound."""

from __future__ import annotations

from data_pipelines.benchmarks.base import Question, Row
from omni_train.data.types import MediaKind

EMOTIONS = ["anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise"]
# Label of AudioSet's ontology -> word.
SOUNDS = {
    "/m/01j3sz": "laughter",
    "/m/07plz5l": "sigh",
    "/m/01b_21": "cough",
    "/m/0dl9sf8": "throat clearing",
    "/m/01hsr_": "sneeze",
    "/m/07ppn3j": "sniff",
}


def meld(row: Row) -> Question:
    """`Emotion`, `Dialogue_ID`, `Utterance_ID`; the clip is `dia<D>_utt<U>.mp4`."""
    clip = f"dia{row.text('Dialogue_ID')}_utt{row.text('Utterance_ID')}.mp4"
    return _named(row, (MediaKind.video, clip), "emotion", row.text("Emotion"), EMOTIONS)


def vocalsound(row: Row) -> Question:
    """`wav` and `labels`, an id of AudioSet's ontology."""
    label = row.text("labels")
    if label not in SOUNDS:
        raise row.wrong("bad_field", f"field 'labels' is {label!r}, none of {', '.join(SOUNDS)}")
    # The owner's files have the paths of the owner's machine; the name is what counts.
    name = row.text("wav").rsplit("/", 1)[-1]
    sound = (MediaKind.audio, f"audio_16k/{name}")
    return _named(row, sound, "vocal sound", SOUNDS[label], list(SOUNDS.values()))


def _named(
    row: Row, medium: tuple[MediaKind, str], what: str, label: str, labels: list[str]
) -> Question:
    if label not in labels:
        raise row.wrong("bad_field", f"{label!r} is no {what} of {', '.join(labels)}")
    asked = f"Which {what} is it? Answer with one of: {', '.join(labels)}."
    return Question([medium, asked], [label], labels, label)
