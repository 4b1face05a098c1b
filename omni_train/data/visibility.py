"""Which tokens of a pack see which: segments of tokens in a row, some of which see another one.

Done here: lengths, parents, and the offsets that attention kernels want. Not done here: attention
(`omni_train.models.attention`), positions, labels.

Letters: T tokens of the pack, S segments, K keys that all segments see, added up.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

NO_PARENT = -1


@dataclass(slots=True)
class Segments:
    """A pack's segments, in the order of their tokens.

    A token sees the tokens of its own segment up to itself, and all tokens of the segment's parent
    and of the parent's ancestors. A packed document is one segment without a parent; a prompt with
    two answers is a segment with two children, which see the prompt and not each other. Positions
    are the caller's: those of a child go on where its parent's end.

    Args:
        lengths: tokens of each segment, at least 1; they add up to T.
        parents: for each segment the number of an earlier one, or NO_PARENT; empty where none has
            a parent.
    """

    lengths: list[int]
    parents: list[int] = field(default_factory=list)
    # int32 [S + 1] each: where queries and keys of a segment begin.
    query_starts: Tensor = field(init=False, repr=False)
    key_starts: Tensor = field(init=False, repr=False)
    # int64 [K], the keys of all segments one after the other; None where they are the pack itself.
    key_index: Tensor | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        assert min(self.lengths, default=0) > 0, f"segments of {self.lengths} tokens"
        self.parents = self.parents or [NO_PARENT] * len(self.lengths)
        assert len(self.parents) == len(self.lengths), f"{self.parents} for {self.lengths}"
        for number, parent in enumerate(self.parents):
            assert NO_PARENT <= parent < number, f"segment {number} has the parent {parent}"
        self.query_starts = _starts(self.lengths)
        self.key_starts = self.query_starts
        if self.has_parents:
            seen = [[*self.ancestors(number), number] for number in range(len(self.lengths))]
            self.key_starts = _starts([sum(self.lengths[n] for n in numbers) for numbers in seen])
            tokens = torch.arange(self.num_tokens).split(self.lengths)
            self.key_index = torch.cat([tokens[n] for numbers in seen for n in numbers])

    @property
    def num_tokens(self) -> int:
        """Tokens T of the pack."""
        return sum(self.lengths)

    @property
    def has_parents(self) -> bool:
        """Whether any segment sees another one."""
        return any(parent != NO_PARENT for parent in self.parents)

    @property
    def documents(self) -> list[int]:
        """For each segment the number of its document, counted from 0: a root and all below it."""
        numbers: list[int] = []
        count = 0
        for parent in self.parents:
            numbers.append(count if parent == NO_PARENT else numbers[parent])
            count += parent == NO_PARENT
        return numbers

    def ancestors(self, number: int) -> list[int]:
        """Return the segments that segment `number` sees whole, the first of them first."""
        found: list[int] = []
        while (number := self.parents[number]) != NO_PARENT:
            found.append(number)
        return found[::-1]

    @property
    def max_query_length(self) -> int:
        """Tokens of the longest segment."""
        return max(self.lengths)

    @property
    def max_key_length(self) -> int:
        """Most keys that a segment sees."""
        if not self.has_parents:
            return self.max_query_length
        return max(
            sum(self.lengths[n] for n in (*self.ancestors(number), number))
            for number in range(len(self.lengths))
        )

    def slices(self) -> list[slice]:
        """Return where each segment's tokens lie in the pack."""
        return [slice(start, end) for start, end in pairwise(accumulate(self.lengths, initial=0))]

    def to(self, device: torch.device) -> Segments:
        """Return the same with its offsets on `device`."""
        moved = copy.copy(self)
        moved.query_starts = self.query_starts.to(device, non_blocking=True)
        moved.key_starts = self.key_starts.to(device, non_blocking=True)
        if self.key_index is not None:
            moved.key_index = self.key_index.to(device, non_blocking=True)
        return moved


def _starts(lengths: list[int]) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
