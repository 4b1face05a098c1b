"""ms-swift's standard format, as JSON Lines or a JSON list.

    {"messages": [{"role": "user", "content": "<image><audio>..."}, ...],
     "images": ["a.png"], "audios": ["a.wav"], "system": "..."}

As there, media that the texts do not name come before the first turn. What would change what is
learned and has no counterpart here is rejected: tool turns, `loss` of a turn, `<bbox>`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from data_pipelines.sources.base import KINDS, Draft, Gathered, Row, Source, make_draft
from data_pipelines.sources.lines import LinesSource
from data_pipelines.sources.placeholders import as_list, count, fill
from omni_train.config.errors import DataError
from omni_train.data.chatml import ROLES

_FILLED_LATER = re.compile(r"<bbox>|<ref-object>")


class MsSwiftSource(LinesSource):
    """Dialogues with placeholders, and lists of media beside them."""

    def draft(self, row: Row) -> Draft:
        """Return the sample of a row."""
        return placeholder_draft(self, row, self.values(row), Gathered(self.root))


def placeholder_draft(
    source: Source, row: Row, values: Mapping[str, Any], gathered: Gathered
) -> Draft:
    """Return the sample of a row with `messages` and lists of media.

    Raises:
        DataError: `bad_messages`, `unsupported_role`, `unsupported_loss`,
            `unsupported_placeholder`, and those of `fill`.
    """
    rest, options = dict(values), source.options
    turns = _turns(rest.pop(options.column("messages"), None))
    if turns[0]["role"] != "system" and isinstance(rest.get(options.column("system")), str):
        turns.insert(0, {"role": "system", "content": rest.pop(options.column("system"))})
    media = {kind: as_list(rest.pop(options.column(f"{kind.name}s"), None)) for kind in KINDS}
    named = count(turns)
    first = next((turn for turn in turns if turn["role"] != "system"), turns[0])
    missing = "".join(
        f"<{kind.name}>" * max(0, len(media[kind]) - found) for kind, found in named.items()
    )
    first["content"] = missing + first["content"]
    messages = fill(turns, media, gathered)
    return make_draft(source, row, messages=messages, gathered=gathered, fields=rest)


def _turns(given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise DataError("bad_messages", "the row has no list of messages")
    turns = []
    for turn in given:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise DataError("bad_messages", "a turn has no text as its content")
        if turn.get("role") not in ROLES:
            raise DataError("unsupported_role", f"a turn has role {turn.get('role')!r}")
        if turn["role"] == "assistant" and turn.get("loss") not in (None, True, 1, 1.0):
            raise DataError("unsupported_loss", "an assistant turn is excluded from the loss")
        found = _FILLED_LATER.search(turn["content"])
        if found:
            raise DataError(
                "unsupported_placeholder", f"{found.group()} must be replaced by coordinates first"
            )
        turns.append(dict(turn))
    return turns
