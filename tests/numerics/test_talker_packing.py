"""Packing, cached states and missing speech change neither the Talker's loss nor its gradients."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from omni_train.data.collate import collate
from omni_train.data.types import EncodedSample
from omni_train.models.talker import OmniForTraining, TalkerForTraining, thinker_states
from omni_train.models.talker_layout import (
    SpeechBatch,
    SpokenReply,
    TalkerLayout,
    lay_out,
    pack_speech,
)
from omni_train.models.talker_states import StateStore, thinker_hash
from omni_train.models.thinker import ThinkerForTraining
from omni_train.objectives.codec_next_token import codec_next_token
from tests.numerics.samples import make_sample
from tests.numerics.talker_models import (
    Models,
    continuation,
    make_models,
    random_codes,
    spoken,
    with_reply,
)

Speech = tuple[EncodedSample, SpokenReply | None]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("omni"))


def omni(models: Models, *, joint: bool) -> OmniForTraining:
    thinker = copy.deepcopy(models.thinker)
    talker = TalkerForTraining(copy.deepcopy(models.talker))
    return OmniForTraining(thinker, talker, joint=joint)


@pytest.fixture(scope="module")
def dialogues(models: Models) -> list[Speech]:
    """Four dialogues with media, one of them without speech and one that continues a voice."""
    spec, out = models.talker.spec, []
    for seed, kinds in enumerate((["audio"], [], ["image", "audio"], ["av"])):
        prompt = make_sample(models.thinker.thinker, models.spec, kinds, seed=seed, prompt=True)
        document = with_reply(prompt.encoded, list(range(seed, seed + 7)))
        reply: SpokenReply | None = spoken(
            prompt.encoded, document, random_codes(spec, 5 + 4 * seed, seed)
        )
        if seed == 1:
            reply = None
        if seed == 2:
            reply = continuation(prompt.encoded, document, spec, text=3, seed=seed)
        out.append((document, reply))
    return out


def batch_of(models: Models, speech: list[Speech], states: Tensor | None = None) -> SpeechBatch:
    spec = models.talker.spec
    lengths = [document.num_tokens for document, _ in speech]
    layouts: list[TalkerLayout | None] = [r and lay_out(r, spec) for _, r in speech]
    thinker = collate([document for document, _ in speech], models.spec)
    talker = pack_speech(layouts, lengths, spec)
    return SpeechBatch(talker=talker, thinker=thinker if states is None else None, states=states)


def run(model: nn.Module, batches: list[SpeechBatch]) -> tuple[float, dict[str, Tensor]]:
    """Sum of the losses and gradients of some batches."""
    total = 0.0
    for batch in batches:
        out = codec_next_token(model, batch)
        out.loss.backward()
        total += float(out.loss.detach())
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return total, grads


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], *, tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, grad in want.items():
        scale = max(1.0, float(grad.abs().max()))
        torch.testing.assert_close(
            got[name], grad, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("joint", [False, True], ids=["frozen", "joint"])
def test_packed_equals_unpacked(models: Models, dialogues: list[Speech], joint: bool) -> None:
    model = omni(models, joint=joint)
    alone, want = run(model, [batch_of(models, [one]) for one in dialogues])
    for order in (dialogues, dialogues[::-1]):
        batch = batch_of(models, order)
        packed, got = run(model, [batch])
        assert packed == pytest.approx(alone, rel=1e-6)
        assert batch.num_target_tokens == sum(
            r.codes.numel() + 1 for _, r in dialogues if r is not None
        )
        assert_same(got, want, tolerance=1e-5)
    parts = {name.split(".")[0] for name in want}
    assert parts == ({"thinker", "talker"} if joint else {"talker"})
    assert max(float(grad.abs().max()) for grad in want.values()) > 1.0
    if joint:
        # The speech reaches what hears and sees, through the Thinker.
        towers = [n for n in want if "audio_tower.layers" in n or "visual.blocks" in n]
        assert any(want[name].any() for name in towers)


def test_loss_is_plain_cross_entropy_over_the_continuation(
    models: Models, dialogues: list[Speech]
) -> None:
    """Written out by hand for the dialogue with a reference: nothing else is supervised."""
    document, reply = dialogues[2]
    assert reply is not None
    assert reply.reference is not None
    batch = batch_of(models, [dialogues[2]])
    loss = codec_next_token(omni(models, joint=False), batch).loss
    with torch.no_grad():
        states = thinker_states(models.thinker, collate([document], models.spec))
        hidden = models.talker.hidden(states, batch.talker)[0]
        logits = models.talker.codec_head(hidden)
    spec, table = models.talker.spec, models.upstream.thinker.get_input_embeddings().weight
    targets = [*reply.codes.tolist(), spec.codec_eos]
    first = reply.prompt_length + reply.reference.codes.numel() + 1
    want = torch.nn.functional.cross_entropy(
        logits[first : first + len(targets)], torch.tensor(targets), reduction="sum"
    )
    assert logits.shape[0] == first + len(targets)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    # The rows really are the Thinker's: the speaker's, and the end of the text.
    row = models.talker.rows()[spec.speaker_row(reply.speaker)]
    assert torch.equal(row, table[spec.speakers[reply.speaker]])
    assert torch.equal(models.talker.rows()[0], table[spec.row_ids[0]])


def test_replies_do_not_see_each_other(models: Models, dialogues: list[Speech]) -> None:
    first, second = dialogues[0], dialogues[3]
    assert first[1] is not None
    assert second[1] is not None
    changed = copy.deepcopy(first)
    assert changed[1] is not None
    changed[1].codes[1] = (changed[1].codes[1] + 1) % models.talker.spec.num_codes
    model, own = omni(models, joint=False), second[1].codes.numel() + 1
    with torch.no_grad():
        behind, other = (model(batch_of(models, [one, second])) for one in (first, changed))
    assert torch.equal(behind[-own:], other[-own:])
    assert not torch.equal(behind[:-own], other[:-own])


def test_cached_states_equal_fresh_ones(
    models: Models, dialogues: list[Speech], tmp_path: Path
) -> None:
    """Written from packs of another make-up, read from disk, with the Thinker out of memory."""
    store = StateStore(
        tmp_path, thinker=thinker_hash(models.thinker), width=64, dtype=torch.float32
    )
    documents = [document for document, _ in dialogues]
    for pack in (documents[:1], documents[1:][::-1]):
        with torch.no_grad():
            states = thinker_states(models.thinker, collate(pack, models.spec))
        for document, part in zip(
            pack, torch.split(states, [d.num_tokens for d in pack]), strict=True
        ):
            store.put(document.key, part)
    read = [store.get(d.key, num_tokens=d.num_tokens) for d in documents]
    assert all(states is not None for states in read)
    alone = TalkerForTraining(copy.deepcopy(models.talker))
    cached = batch_of(
        models, dialogues, torch.cat([states for states in read if states is not None])
    )
    loss, grads = run(alone, [cached])
    want, wanted = run(omni(models, joint=False), [batch_of(models, dialogues)])
    assert loss == pytest.approx(want, rel=1e-6)
    assert_same(grads, wanted, tolerance=1e-5)
    assert store.get(documents[0].key, num_tokens=documents[0].num_tokens + 1) is None
    assert store.get("another", num_tokens=1) is None
    other: ThinkerForTraining = copy.deepcopy(models.thinker)
    with torch.no_grad():
        other.thinker.lm_head.weight[0, 0] += 1
    assert thinker_hash(other) != thinker_hash(models.thinker)


@pytest.mark.parametrize("joint", [False, True], ids=["frozen", "joint"])
def test_a_pack_without_speech_gives_zero(
    models: Models, dialogues: list[Speech], joint: bool
) -> None:
    model = omni(models, joint=joint)
    _, full = run(model, [batch_of(models, dialogues)])
    for speech in ([], [dialogues[1]]):
        batch = batch_of(models, speech)
        loss, grads = run(model, [batch])
        assert loss == 0.0
        assert batch.num_target_tokens == 0
        # Every parameter took part all the same, and nothing but zeros came of it.
        assert grads.keys() == full.keys()
        assert not any(grad.any() for grad in grads.values())
