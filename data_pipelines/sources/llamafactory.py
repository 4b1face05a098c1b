"""LLaMA-Factory's multimodal `sharegpt` format, as a JSON list or JSON Lines.

    {"messages": [{"role": "user", "content": "<image>What is it?"}, ...], "images": ["a.png"]}
    {"conversations": [{"from": "human", "value": "<audio>..."}, ...], "audios": ["a.wav"],
     "system": "..."}

Columns and tags go by the names of its `dataset_info.json`: `messages`, `system`, `images`,
`videos`, `audios`, `role_tag`, `content_tag`, `user_tag`, `assistant_tag`, `system_tag`. Tool turns
are rejected: the chat format here has none.
"""

from __future__ import annotations

from typing import Any

from data_pipelines.sources.base import KINDS, Draft, Gathered, Row, make_draft
from data_pipelines.sources.lines import LinesSource
from data_pipelines.sources.placeholders import as_list, fill
from omni_train.config.errors import DataError

# Name of a tag -> its value where the turns are `messages`, and where they are `conversations`.
_TAGS = {
    "role_tag": ("role", "from"),
    "content_tag": ("content", "value"),
    "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt"),
    "system_tag": ("system", "system"),
}


class LlamaFactorySource(LinesSource):
    """Dialogues with placeholders, and lists of media beside them."""

    def draft(self, row: Row) -> Draft:
        """Return the sample of a row."""
        values, options = self.values(row), self.options
        default = "messages" if "messages" in values else "conversations"
        name = options.column("messages", default)
        style = int(name != "messages")
        tags = {tag: options.column(tag, names[style]) for tag, names in _TAGS.items()}
        turns = _turns(values.pop(name, None), tags)
        system = values.pop(options.column("system"), None)
        if system and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": _text(system)})
        elif system:
            # The turn goes before the column, which is kept all the same.
            values[options.column("system")] = system
        media = {kind: as_list(values.pop(options.column(f"{kind.name}s"), None)) for kind in KINDS}
        gathered = Gathered(self.root)
        messages = fill(turns, media, gathered)
        return make_draft(self, row, messages=messages, gathered=gathered, fields=values)


def _turns(given: Any, tags: dict[str, str]) -> list[dict[str, Any]]:
    """Return turns with our names; other fields of a turn stay in it."""
    if not isinstance(given, list) or not given:
        raise DataError("bad_messages", "the row has no list of turns")
    roles = {tags[f"{role}_tag"]: role for role in ("user", "assistant", "system")}
    turns = []
    for turn in given:
        if not isinstance(turn, dict):
            raise DataError("bad_messages", f"a turn is {type(turn).__name__}, not an object")
        rest = dict(turn)
        role, content = rest.pop(tags["role_tag"], None), rest.pop(tags["content_tag"], None)
        if role not in roles:
            raise DataError("unsupported_role", f"a turn has role {role!r}; known: {list(roles)}")
        turns.append({"role": roles[role], "content": _text(content), **rest})
    return turns


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise DataError("bad_messages", f"a turn's content is {type(value).__name__}, not a text")
    return value
