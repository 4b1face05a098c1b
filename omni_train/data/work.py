"""One pack's work: offsets in, a batch out; runs in the data workers, or in the rank without them.

A sample that cannot be used leaves its pack shorter and is named in the batch; so does one that
needs more memory than a worker may have. Not done here: the parts (fetch.py, split.py, encode.py,
collate.py), and where it runs (worker.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from omni_train.config.errors import DataError
from omni_train.data.collate import collate
from omni_train.data.encode import encode
from omni_train.data.fetch import fetch
from omni_train.data.sequence import split
from omni_train.data.split import Part, cut
from omni_train.data.stores import Store
from omni_train.data.types import IndexRow, ModelSpec, ProcessingConfig

Bad = tuple[str, str, str, str]
# How torch and FFmpeg say it; all others raise MemoryError.
_OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory", "std::bad_alloc")
_MAX_NAMED = 20


class PlannedSample(NamedTuple):
    """Where a sample lies: source, path or URL of the shard, index row, and which part of it.

    Of a reply whose speech continues another, `reference` is the row of that one, in the same
    shard; `visit` is the sample's in `SampleRef`.
    """

    source: str
    shard: str
    row: IndexRow
    part: Part | None
    visit: int = 0
    reference: IndexRow | None = None

    @property
    def key(self) -> str:
        """Key of the sample; a part has its recording's key and a number."""
        return self.row.key if self.part is None else f"{self.row.key}-{self.part.number:04d}"


Work = list[PlannedSample]


@dataclass(slots=True)
class PackMaker:
    """Fetches, encodes and collates the samples of a pack.

    Args:
        tokenizer: the run's tokenizer.
        config: how media become tokens.
        spec: what the model expects.
        store: reads the shards.
        memory_bytes: cap under which it runs, for messages; None without one.
    """

    tokenizer: PreTrainedTokenizerFast
    config: ProcessingConfig
    spec: ModelSpec
    store: Store
    memory_bytes: int | None = None

    def __call__(self, work: Work, at: Callable[[int], None]) -> Any:
        """Return the batch of a pack; `at` is told the number of the sample in hands."""
        encoded: list[Any] = []
        bad: list[Bad] = []
        for number, sample in enumerate(work):
            at(number)
            try:
                encoded.append(self._encode(sample))
            except Exception as error:  # noqa: BLE001  raised again unless it is the sample's
                bad.append(self._bad(sample, error))
        try:
            return self._collate(encoded, bad)
        except Exception as error:
            if not _ran_out_of_memory(error):
                raise
            # No sample is to blame alone: all of them were too much for one pack.
            usable = {sample.key for sample in encoded}
            bad += [self._bad(sample, error) for sample in work if sample.key in usable]
        encoded.clear()
        return self._collate([], bad)

    def _collate(self, encoded: list[Any], bad: list[Bad]) -> Any:
        """Return the batch of what `_encode` gave; a subclass has its own of both."""
        batch = collate(encoded, self.spec, bad=bad)
        return split(batch, self.spec) if self.spec.sequence.size > 1 else batch

    def _encode(self, sample: PlannedSample) -> Any:
        raw = fetch(sample.shard, sample.row, self.store)
        if sample.part is not None:
            raw = cut(raw, sample.part)
        encoded = encode(raw, self.tokenizer, self.config, self.spec)
        encoded.source = sample.source
        return encoded

    def _bad(self, sample: PlannedSample, error: Exception) -> Bad:
        """Return the entry of a sample that cannot be used; raise what is no fault of a sample."""
        if _ran_out_of_memory(error):
            cap = self.memory_bytes
            limit = f"data.worker_memory_bytes={cap} leaves" if cap else "there is"
            error = DataError("over_memory", f"it needs more than {limit}: {error}")
        elif not isinstance(error, DataError):
            error.add_note(f"sample {sample.key} of {sample.source}, {sample.shard}")
            raise error
        return sample.source, shard_name(sample.shard), sample.key, str(error)


def describe(work: Work, number: int) -> str:
    """Name a sample of a pack, and the samples beside it."""
    sample = work[number]
    others = [f"{s.source} {shard_name(s.shard)}:{s.key}" for s in work if s is not sample]
    text = f"sample {sample.key} of source {sample.source}, shard {sample.shard}"
    if not others:
        return text
    more = f" and {len(others) - _MAX_NAMED} more" if len(others) > _MAX_NAMED else ""
    return f"{text} (in a pack with {', '.join(others[:_MAX_NAMED])}{more})"


def shard_name(shard: str) -> str:
    """Return the file name of a shard's path or URL."""
    return shard.rpartition("/")[2]


def _ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory is what an error, or the one that it was made of, comes from."""
    while error is not None:
        if isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY):
            return True
        error = error.__cause__
    return False
