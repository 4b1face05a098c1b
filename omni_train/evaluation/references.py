"""Reference speech for spoken replies: another utterance of the same voice, which they continue.

What seed-tts-eval calls zero-shot. Which one it is follows from the sample's key alone.
"""

from __future__ import annotations

import xxhash

from omni_train.config.errors import DataError
from omni_train.data.fetch import fetch
from omni_train.data.source import ShardSet
from omni_train.data.speech import ReferenceSpeech, read_codes
from omni_train.data.types import IndexRow


class References:
    """Spoken replies with codes, by voice.

    Args:
        path: directory of shards.
        num_codes: size of the model's codebook.
    """

    def __init__(self, path: str, num_codes: int) -> None:
        self._source, self._num_codes = ShardSet("references", path), num_codes
        self._voices: dict[str, list[tuple[int, IndexRow]]] = {}
        for shard in range(len(self._source.counts)):
            for row in self._source.rows(shard):
                if row.speech is not None and row.speech.num_codes:
                    self._voices.setdefault(row.speaker, []).append((shard, row))

    def choose(self, row: IndexRow) -> ReferenceSpeech:
        """Return an utterance of the row's voice that says something else.

        Raises:
            DataError: `no_reference` where the voice has none; what reading the codes finds.
        """
        asked = row.speech.text if row.speech else ""
        fit = [(s, r) for s, r in self._voices.get(row.speaker, []) if _text(r) != asked]
        if not fit:
            raise DataError("no_reference", f"no other speech of {row.speaker!r}", key=row.key)
        shard, chosen = fit[xxhash.xxh3_64_intdigest(row.key.encode()) % len(fit)]
        raw = fetch(self._source.path_of(shard), chosen, codes=True)
        return ReferenceSpeech(_text(chosen), read_codes(raw, self._num_codes))


def _text(row: IndexRow) -> str:
    return row.speech.text if row.speech else ""
