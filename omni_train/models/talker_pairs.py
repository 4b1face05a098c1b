"""Two spoken answers to one prompt as a pack: the prompt runs once, both answers see it.

    segment           positions        parent
    prompt            0 .. P+A+1       -            up to and with the codec bos
    chosen codes      K_w              prompt       positions go on from the prompt's end
    rejected codes    K_l              prompt       the same positions again

The bos predicts the first code of both answers, so it stands twice among the targets. Everything
else is as in talker_layout.py. Letters: M pairs of a pack, N targets.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from omni_train.config.errors import DataError
from omni_train.data.visibility import NO_PARENT, Segments
from omni_train.models.talker_layout import (
    SpeechBatch,
    TalkerBatch,
    TalkerLayout,
    TalkerSpec,
    absolute_index,
    consumed,
    dummy_batch,
)
from omni_train.objectives.preference import PairTargets


@dataclass(slots=True)
class PairBatch(SpeechBatch):
    """One micro-batch of pairs; the unit that losses are divided by is the pair.

    Args:
        pairs: whose targets are whose, and the reference's log-probabilities.
    """

    pairs: PairTargets = field(kw_only=True)

    @property
    def num_target_tokens(self) -> int:
        """Pairs."""
        return self.pairs.num_pairs

    def to(self, device: torch.device) -> PairBatch:
        """Return the batch with every tensor on `device`."""
        values: dict[str, Any] = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        for name in ("talker", "thinker", "pairs"):
            values[name] = values[name].to(device)
        return PairBatch(**values)


@dataclass(slots=True)
class PairLayout:
    """A prompt with two answers.

    Args:
        prompt: laid out, with the codes of the chosen answer.
        rejected: codes int64 [K_l] of the other one.
    """

    prompt: TalkerLayout
    rejected: Tensor

    @property
    def num_positions(self) -> int:
        """Talker positions of prompt and both answers."""
        return self.prompt.num_positions + int(self.rejected.numel())


def pack_pairs(
    layouts: list[PairLayout], document_lengths: list[int], spec: TalkerSpec
) -> tuple[TalkerBatch, Tensor]:
    """Pack pairs whose prompts are the documents of a Thinker pack.

    Args:
        layouts: one for each document of the pack.
        document_lengths: Thinker tokens of each document; they add up to T.
        spec: ids.

    Returns:
        The batch, and int64 [N]: the answer of each target, as `PairTargets` numbers them.

    Raises:
        DataError: `empty_speech` where an answer has no code.
    """
    if not layouts:
        return dummy_batch(spec), torch.zeros(1, dtype=torch.long)
    total, starts = sum(document_lengths), accumulate(document_lengths, initial=0)
    pairs = [_lay_out_pair(*of, total, spec) for of in zip(layouts, starts, strict=False)]
    sizes = [pair.text_index.numel() for pair in pairs]
    offsets = list(accumulate(sizes, initial=0))[:-1]
    codec = torch.cat([pair.codec_ids for pair in pairs])
    codec_index = torch.nonzero(codec >= 0).squeeze(1)
    target_ids = torch.cat([pair.target_ids for pair in pairs])
    roots = range(0, 3 * len(pairs), 3)
    batch = TalkerBatch(
        text_index=torch.cat([pair.text_index for pair in pairs]),
        codec_index=codec_index,
        codec_ids=codec[codec_index],
        position_ids=torch.cat([pair.position_ids for pair in pairs], dim=1)[:, None, :],
        segments=Segments(
            [length for pair in pairs for length in pair.lengths],
            [parent for root in roots for parent in (NO_PARENT, root, root)],
        ),
        target_index=torch.cat(
            [pair.target_index + at for pair, at in zip(pairs, offsets, strict=True)]
        ),
        target_ids=target_ids,
        target_weights=torch.ones(target_ids.numel()),
        num_target_tokens=target_ids.numel(),
    )
    # An answer has a target for each code and one for the eos.
    counts = torch.tensor([length + 1 for pair in pairs for length in pair.lengths[1:]])
    return batch, torch.arange(len(counts)).repeat_interleave(counts)


@dataclass(slots=True)
class _PairParts:
    """A pair's positions S: its prompt, the chosen answer, the rejected one.

    Args:
        text_index, codec_ids: int64 [S]; no codec id is -1.
        position_ids: int64 [4, S].
        lengths: of the three segments.
        target_index, target_ids: int64 [K_w + K_l + 2], counted from the pair's first position.
    """

    text_index: Tensor
    codec_ids: Tensor
    position_ids: Tensor
    lengths: list[int]
    target_index: Tensor
    target_ids: Tensor


def _lay_out_pair(layout: PairLayout, start: int, total: int, spec: TalkerSpec) -> _PairParts:
    """Lay out one pair; `start` is its document's first token among `total` of the pack."""
    prompt = layout.prompt
    size = prompt.text_index.numel()
    text, codec = [prompt.text_index], [prompt.codec_ids]
    positions = [torch.cat([torch.arange(size)[None], prompt.position_ids])]
    lengths, index, targets = [size], [], []
    for codes in (prompt.codes, layout.rejected):
        count = codes.numel()
        if not count:
            raise DataError("empty_speech", "an answer of a pair has codes")
        steps = torch.arange(1, count + 1)
        text.append(consumed(prompt.stream_index, count))
        codec.append(codes)
        positions.append(positions[0][:, -1:] + steps)
        # The bos, then the answer's own positions.
        index.append(torch.cat([torch.tensor([size - 1]), sum(lengths) - 1 + steps]))
        targets.append(torch.cat([codes, torch.tensor([spec.codec_eos])]))
        lengths.append(count)
    return _PairParts(
        text_index=absolute_index(torch.cat(text), start, total),
        codec_ids=torch.cat(codec),
        position_ids=torch.cat(positions, dim=1),
        lengths=lengths,
        target_index=torch.cat(index),
        target_ids=torch.cat(targets),
    )
