"""JSON Lines in our own form.

    {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}, ...]}, ...]}
    {"audio": "a.wav", "text": "what is said", "task": "asr",
     "segments": [{"start_s": 0.4, "end_s": 1.1, "text": "what"}, ...]}

`segments` may be left out; long recordings are cut between them. Media are paths relative to the
file. The second form gets its prompt in words; the fields' names may be given as columns.
"""

from __future__ import annotations

from typing import Any

from data_pipelines.sources.base import Draft, Gathered, Row, make_draft, make_pair
from data_pipelines.sources.lines import LinesSource
from omni_train.config.errors import DataError
from omni_train.data.types import MediaKind


class JsonlSource(LinesSource):
    """Dialogues with media paths, or pairs of media and text."""

    def draft(self, row: Row) -> Draft:
        """Return the sample of a row."""
        values = self.values(row)
        name = self.options.column("messages")
        if name not in values:
            return make_pair(self, row, values, self.root)
        gathered = Gathered(self.root)
        messages = place_media(values.pop(name), gathered)
        return make_draft(self, row, messages=messages, gathered=gathered, fields=values)


def place_media(turns: Any, gathered: Gathered) -> list[dict[str, Any]]:
    """Return the dialogue with member names in place of paths; all else stays as it is.

    Raises:
        DataError: `bad_messages`, and those of `Gathered.add`.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError("bad_messages", "messages is not a list of turns")
    placed = []
    for turn in turns:
        content = turn.get("content")
        if isinstance(content, list):
            content = [_placed(item, gathered) for item in content]
        placed.append({**turn, "content": content})
    return placed


def _placed(item: Any, gathered: Gathered) -> Any:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "speech":
        return {**item, kind: gathered.add(MediaKind.audio, item.get(kind))}
    if not isinstance(kind, str) or kind not in MediaKind.__members__:
        return item
    value = item.get(kind)
    if kind != "video" or not isinstance(value, list):
        return {**item, kind: gathered.add(MediaKind[kind], value)}
    # A clip given as pictures, and its sound.
    placed = {**item, "video": [gathered.add(MediaKind.image, picture) for picture in value]}
    if item.get("audio"):
        placed["audio"] = gathered.add(MediaKind.audio, item["audio"])
    return placed
