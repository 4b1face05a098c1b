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
    total, start, offset = sum(document_lengths), 0, 0
    text: list[Tensor] = []
    codec: list[Tensor] = []
    positions: list[Tensor] = []
    restart: list[Tensor] = []
    lengths: list[int] = []
    parents: list[int] = []
    index: list[Tensor] = []
    targets: list[Tensor] = []
    for layout, tokens in zip(layouts, document_lengths, strict=True):
        prompt = layout.prompt
        size, root = prompt.text_index.numel(), len(lengths)
        text.append(absolute_index(prompt.text_index, start, total))
        codec.append(prompt.codec_ids)
        positions.append(prompt.position_ids)
        restart.append(torch.arange(size))
        lengths.append(size)
        parents.append(NO_PARENT)
        bos, offset = offset + size - 1, offset + size
        for codes in (prompt.codes, layout.rejected):
            count = codes.numel()
            if not count:
                raise DataError("empty_speech", "an answer of a pair has codes")
            text.append(absolute_index(consumed(prompt.stream_index, count), start, total))
            codec.append(codes)
            positions.append(prompt.position_ids[:, -1:] + torch.arange(1, count + 1))
            restart.append(torch.arange(size, size + count))
            lengths.append(count)
            parents.append(root)
            index.append(torch.tensor([bos, *range(offset, offset + count)]))
            targets.append(torch.cat([codes, torch.tensor([spec.codec_eos])]))
            offset += count
        start += tokens
    joined = torch.cat(codec)
    codec_index = torch.nonzero(joined >= 0).squeeze(1)
    target_ids = torch.cat(targets)
    batch = TalkerBatch(
        text_index=torch.cat(text),
        codec_index=codec_index,
        codec_ids=joined[codec_index],
        position_ids=torch.cat([torch.cat(restart)[None], torch.cat(positions, 1)])[:, None, :],
        segments=Segments(lengths, parents),
        target_index=torch.cat(index),
        target_ids=target_ids,
        target_weights=torch.ones(target_ids.numel()),
        num_target_tokens=target_ids.numel(),
    )
    sizes = torch.tensor([answer.numel() for answer in targets])
    return batch, torch.arange(len(targets)).repeat_interleave(sizes)
