"""One pack for several ranks: each gets a part of the tokens, and a part of the media.

    Batch of the whole pack -> split -> Batch of one rank, with what it sends and receives

Tokens, positions and labels are cut at equal lengths, wherever that is: through a document, through
a picture. Media are cut where the towers do not look across, between temporal patches of vision and
between 2 s chunks of sound, into about equal shares; the rank that runs a tower over a share sends
the embeddings to the ranks where their tokens are. Runs in the data worker. Not done here: the
exchange itself (`omni_train.models.sequence_parallel`).

Letters: T tokens of the pack, R ranks that share it, M embeddings of a tower.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import xxhash
from torch import Tensor

from omni_train.config.errors import DataError
from omni_train.data.collate import audio_kwargs, dummy_mel, dummy_vision, vision_kwargs
from omni_train.data.types import Batch, Exchange, ModelSpec, SequencePlace
from omni_train.data.visibility import NO_PARENT, Segments
from omni_train.engine.distributed import gather_json
from omni_train.speech.mel import num_audio_tokens


def split(batch: Batch, spec: ModelSpec) -> Batch:
    """Return what the rank at `spec.sequence` gets of a pack.

    Where R does not divide T, the pack ends in a document of fewer than R tokens without targets.
    Sample keys and bad samples stay with the first rank, so that they are counted once.

    Args:
        batch: the whole pack, as `collate` makes it.
        spec: the model's sizes and ids, and this rank's place.
    """
    place = spec.sequence
    read = f"{batch.keys} {batch.segments.lengths}"
    batch = _padded(batch, spec)
    local = batch.num_tokens // place.size
    first = place.rank * local
    tokens = slice(first, first + local)
    here = (batch.target_index >= first) & (batch.target_index < first + local)
    num_targets = int(here.sum()) if batch.num_target_tokens else 0
    if not num_targets:
        here = torch.arange(batch.target_index.numel()) < 1
    counts = torch.tensor(batch.document_targets, dtype=torch.long)
    document = torch.arange(len(counts)).repeat_interleave(counts)
    vision = _vision_share(batch, spec, local)
    audio = _audio_share(batch, spec, local)
    return replace(
        batch,
        keys=batch.keys if place.rank == 0 else [],
        input_ids=batch.input_ids[:, tokens],
        position_ids=batch.position_ids[:, :, tokens],
        target_index=(batch.target_index[here] - first) if num_targets else torch.zeros(1).long(),
        target_ids=batch.target_ids[here],
        target_weights=batch.target_weights[here] * float(num_targets > 0),
        num_target_tokens=num_targets,
        document_targets=_counts(document, here, len(batch.document_targets), num_targets),
        kind_targets=_counts(batch.target_kind, here, len(batch.kinds), num_targets),
        target_kind=batch.target_kind[here],
        vision_index=_local(batch.vision_index, first, local),
        audio_index=_local(batch.audio_index, first, local),
        bad=batch.bad if place.rank == 0 else [],
        pack_signature=xxhash.xxh3_64_hexdigest(read.encode()),
        **vision,
        **audio,
    )


def check_agreement(batches: Sequence[Batch], place: SequencePlace) -> None:
    """Hold the ranks that share packs to the same packs; all ranks of the run must call.

    They read each pack by themselves, so a read that fails on one of them alone would leave them
    with packs of other lengths, and waiting for each other.

    Raises:
        DataError: `unequal_packs`, on every rank.
    """
    seen = gather_json([batch.pack_signature for batch in batches])
    for first in range(0, len(seen), place.size):
        group = seen[first : first + place.size]
        if any(one != group[0] for one in group):
            ranks = f"{first} to {first + place.size - 1}"
            raise DataError(
                "unequal_packs",
                f"ranks {ranks} share a pack, and some could not read a sample that others could; "
                "their ledgers name it; the same command again resumes",
            )


def _padded(batch: Batch, spec: ModelSpec) -> Batch:
    """The pack with T a multiple of R."""
    missing = -batch.num_tokens % spec.sequence.size
    if not missing:
        return batch
    ids = torch.full((1, missing), spec.tokens.im_end)
    positions = torch.arange(missing).expand(4, 1, -1)
    segments = batch.segments
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, ids], dim=1),
        position_ids=torch.cat([batch.position_ids, positions], dim=2),
        segments=Segments([*segments.lengths, missing], [*segments.parents, NO_PARENT]),
    )


def _local(index: Tensor, first: int, local: int) -> Tensor:
    """The positions of one rank among `index`, counted from its first token."""
    return index[(index >= first) & (index < first + local)] - first


def _counts(numbers: Tensor, here: Tensor, kinds: int, num_targets: int) -> list[int]:
    """How many of this rank's targets have each number 0 .. kinds - 1; a dummy is none."""
    if not num_targets:
        return [0] * kinds
    counts: list[int] = torch.bincount(numbers[here], minlength=kinds).tolist()
    return counts


def _shares(sizes: Sequence[int], ranks: int) -> list[int]:
    """Return where each rank's units begin, and their number: R + 1 bounds, about equal sums."""
    ends = torch.tensor([0, *accumulate(sizes)], dtype=torch.double)
    wanted = torch.arange(1, ranks) * (float(ends[-1]) / ranks)
    nearest = (ends[:, None] - wanted).abs().argmin(dim=0) if ranks > 1 else wanted.long()
    return [0, *nearest.tolist(), len(sizes)]


def _exchange(index: Tensor, made: Sequence[int], local: int, place: SequencePlace) -> Exchange:
    """Return how many embeddings this rank sends to and receives from each.

    Args:
        index: int64 [M], positions of the pack's embeddings, rising.
        made: R + 1 bounds of the embeddings that each rank makes.
        local: tokens of a rank.
        place: of this rank.
    """
    starts = torch.arange(place.size + 1) * local
    needed = torch.searchsorted(index, starts).tolist()

    def common(maker: int, taker: int) -> int:
        first = max(made[maker], needed[taker])
        return max(0, min(made[maker + 1], needed[taker + 1]) - first)

    ranks = range(place.size)
    return Exchange(
        send=[common(place.rank, taker) for taker in ranks],
        receive=[common(maker, place.rank) for maker in ranks],
    )


def _vision_share(batch: Batch, spec: ModelSpec, local: int) -> dict[str, Any]:
    """Patches and grids of one rank; a unit is one temporal patch, all of its rows and columns."""
    place, merge = spec.sequence, spec.merge_size**2
    if not batch.vision_index.numel():
        return {"vision_exchange": Exchange.none(place)}
    grids = batch.grid_thw.tolist()
    units = [(number, h * w) for number, (t, h, w) in enumerate(grids) for _ in range(t)]
    bounds = _shares([size for _, size in units], place.size)
    ends = [0, *accumulate(size for _, size in units)]
    made = [ends[bound] // merge for bound in bounds]
    start, stop = bounds[place.rank], bounds[place.rank + 1]
    own = Counter(number for number, _ in units[start:stop])
    if own:
        patches = batch.patches[ends[start] : ends[stop]]
        grid_thw = torch.tensor([[count, *grids[number][1:]] for number, count in own.items()])
    else:
        patches, grid_thw = dummy_vision(spec)
    return {
        "patches": patches,
        "grid_thw": grid_thw,
        "vision_kwargs": vision_kwargs(grid_thw, spec),
        "vision_exchange": _exchange(batch.vision_index, made, local, place),
    }


def _audio_share(batch: Batch, spec: ModelSpec, local: int) -> dict[str, Any]:
    """Mel chunks of one rank; a unit is a chunk, with a rest behind it that makes no token."""
    place = spec.sequence
    if not batch.audio_index.numel():
        return {"audio_exchange": Exchange.none(place)}
    chunk_lengths = batch.audio_kwargs["chunk_lengths"]
    assert isinstance(chunk_lengths, Tensor), "the worker made it so"
    frames = chunk_lengths.tolist()
    clips = [
        clip
        for clip, length in enumerate(batch.mel_lengths.tolist())
        for _ in range(-(-length // spec.audio_chunk_frames))
    ]
    units: list[list[int]] = []
    for chunk, length in enumerate(frames):
        if units and not num_audio_tokens(length):
            units[-1].append(chunk)
        else:
            units.append([chunk])
    sizes = [sum(num_audio_tokens(frames[chunk]) for chunk in unit) for unit in units]
    bounds = _shares(sizes, place.size)
    ends = [0, *accumulate(sizes)]
    made = [ends[bound] for bound in bounds]
    own = [chunk for unit in units[bounds[place.rank] : bounds[place.rank + 1]] for chunk in unit]
    exchange = _exchange(batch.audio_index, made, local, place)
    if not own:
        mel, lengths = dummy_mel(spec)
        chunks, chunk_lengths = mel[None], lengths
    else:
        chunk_lengths = torch.tensor([frames[chunk] for chunk in own])
        parts: Counter[int] = Counter()
        for chunk in own:
            parts[clips[chunk]] += frames[chunk]
        lengths = torch.tensor(list(parts.values()))
        # As wide as the longest of its own: the tower's indices count on it.
        chunks = batch.mel_chunks[own[0] : own[-1] + 1, :, : int(chunk_lengths.max())]
    return {
        "mel_chunks": chunks,
        "mel_lengths": lengths,
        "audio_kwargs": audio_kwargs(chunk_lengths, lengths),
        "audio_exchange": exchange,
    }
