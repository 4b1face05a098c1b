"""A pack cut for several ranks: nothing is lost, and the towers make the same of their shares."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from omni_train.config.errors import DataError
from omni_train.data import sequence
from omni_train.data.collate import collate
from omni_train.data.image import normalize_patches
from omni_train.data.sequence import check_agreement, split
from omni_train.data.types import Batch, Exchange, ModelSpec, SequencePlace
from omni_train.models.build import build_thinker
from omni_train.models.thinker import ThinkerForTraining
from tests.numerics.samples import make_sample, small_config, small_tokenizer

PACKS = [
    [["av"], ["image", "audio"], [], ["video", "audio", "audio"]],
    [["image"]],
    [["audio"]],
    [[], []],
    [],
]


@pytest.fixture(scope="module")
def model() -> ThinkerForTraining:
    tokenizer = small_tokenizer()
    return build_thinker(small_config(tokenizer)[0], tokenizer, seed=1, dtype=torch.float32)


def pack_of(model: ThinkerForTraining, kinds: list[list[str]]) -> Batch:
    made = [make_sample(model.thinker, model.spec, kind, seed=i) for i, kind in enumerate(kinds)]
    return collate([sample.encoded for sample in made], model.spec)


def parts_of(batch: Batch, spec: ModelSpec, size: int) -> list[Batch]:
    places = [SequencePlace(rank, size) for rank in range(size)]
    return [split(batch, replace(spec, sequence=place)) for place in places]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("number", range(len(PACKS)))
def test_parts_make_up_the_pack(model: ThinkerForTraining, number: int, size: int) -> None:
    pack = pack_of(model, PACKS[number])
    parts = parts_of(pack, model.spec, size)
    total, local = pack.num_tokens, parts[0].num_tokens
    assert {part.num_tokens for part in parts} == {local}
    assert total <= local * size < total + size
    for name, dim in (("input_ids", 1), ("position_ids", 2)):
        joined = torch.cat([getattr(part, name) for part in parts], dim=dim)
        assert torch.equal(joined.narrow(dim, 0, total), getattr(pack, name)), name
    for part in parts:
        assert part.segments.num_tokens == local * size
        assert part.segments.lengths[: len(pack.segments.lengths)] == pack.segments.lengths
        assert len(set(part.pack_signature)) > 1
        assert part.pack_signature == parts[0].pack_signature
    # Every target once, at its place; a dummy of weight zero where a rank has none.
    assert sum(part.num_target_tokens for part in parts) == pack.num_target_tokens
    targets = [
        (rank * local + int(at), int(target))
        for rank, part in enumerate(parts)
        for at, target, weight in zip(
            part.target_index, part.target_ids, part.target_weights, strict=True
        )
        if weight
    ]
    if pack.num_target_tokens:
        assert targets == list(
            zip(pack.target_index.tolist(), pack.target_ids.tolist(), strict=True)
        )
    assert all(part.target_index.numel() == part.target_kind.numel() > 0 for part in parts)
    for name in ("document_targets", "kind_targets"):
        sums = [sum(counts) for counts in zip(*(getattr(p, name) for p in parts), strict=True)]
        assert sums == getattr(pack, name), name
    for name in ("vision_index", "audio_index"):
        joined = torch.cat([getattr(part, name) + i * local for i, part in enumerate(parts)])
        assert torch.equal(joined, getattr(pack, name)), name
    # Counted once.
    assert [part.keys for part in parts] == [pack.keys] + [[]] * (size - 1)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("number", range(len(PACKS)))
def test_towers_over_shares_equal_the_towers_over_the_pack(
    model: ThinkerForTraining, number: int, size: int
) -> None:
    """And what is sent is what is received, in the order of the tokens."""
    pack = pack_of(model, PACKS[number])
    parts = parts_of(pack, model.spec, size)
    towers = model.thinker.model
    with torch.no_grad():
        for kind in ("vision", "audio"):
            made = [_embeddings(towers, part, kind) for part in [pack, *parts]]
            whole = made[0][: getattr(pack, f"{kind}_index").numel()]
            moves = [getattr(part, f"{kind}_exchange") for part in parts]
            assert [m.send for m in moves] == [
                list(column) for column in zip(*(m.receive for m in moves), strict=True)
            ]
            sent = [
                list(rows[: sum(move.send)].split(move.send))
                for rows, move in zip(made[1:], moves, strict=True)
            ]
            for rank, part in enumerate(parts):
                got = torch.cat([of_rank[rank] for of_rank in sent])
                assert len(got) == getattr(part, f"{kind}_index").numel()
            joined = torch.cat([of_rank[rank] for rank in range(size) for of_rank in sent])
            torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-5)


def _embeddings(towers: torch.nn.Module, batch: Batch, kind: str) -> torch.Tensor:
    if kind == "vision":
        patches = normalize_patches(batch.patches, torch.float32)
        made: torch.Tensor = towers.visual(
            patches, grid_thw=batch.grid_thw, **batch.vision_kwargs
        ).pooler_output
    else:
        made = towers.audio_tower(
            feature_lens=batch.mel_lengths, padded_feature=batch.mel_chunks, **batch.audio_kwargs
        ).last_hidden_state
    return made


def test_media_are_shared_out_evenly(model: ThinkerForTraining) -> None:
    """One long clip alone is work for all ranks."""
    parts = parts_of(pack_of(model, [["video"]] * 8), model.spec, 4)
    assert [len(part.patches) for part in parts] == [48] * 4
    assert all(sum(part.vision_exchange.send) == 12 for part in parts if part.vision_exchange)


def test_ranks_that_read_other_samples_stop(
    model: ThinkerForTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, place = model.spec, SequencePlace(0, 2)
    one, other = (parts_of(pack_of(model, PACKS[n]), spec, 2)[0] for n in (0, 1))
    for seen, agree in (
        ([one, one], True),
        ([other, other, one, one], True),
        ([one, other], False),
    ):
        signatures = [[batch.pack_signature] for batch in seen]
        monkeypatch.setattr(sequence, "gather_json", lambda value, s=signatures: s)
        if agree:
            check_agreement([one], place)
        else:
            with pytest.raises(DataError, match="unequal_packs"):
                check_agreement([one], place)


def test_a_pack_without_media_exchanges_nothing() -> None:
    assert Exchange.none(SequencePlace(1, 3)) == Exchange([0, 0, 0], [0, 0, 0])
