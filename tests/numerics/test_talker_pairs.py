"""Two answers behind one prompt equal two passes, each with a prompt of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from omni_train.config.errors import DataError
from omni_train.data.collate import collate
from omni_train.data.types import EncodedSample
from omni_train.models.talker_layout import SpeechBatch, TalkerLayout, lay_out, pack_speech
from omni_train.models.talker_pairs import PairBatch, PairLayout, pack_pairs
from omni_train.objectives.preference import (
    PairTargets,
    PreferenceConfig,
    answer_logprobs,
    preference,
)
from tests.numerics.samples import make_sample
from tests.numerics.talker_models import (
    Models,
    continuation,
    make_models,
    random_codes,
    spoken,
    with_reply,
)
from tests.numerics.test_talker_packing import assert_same, omni

Pair = tuple[EncodedSample, PairLayout]
REFERENCE = torch.tensor([-60.0, -30.0, -50.0, -80.0, -100.0, -90.0])
CONFIG = PreferenceConfig(beta=0.05, sft_weight=0.2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("omni"))


@pytest.fixture(scope="module")
def pairs(models: Models) -> list[Pair]:
    """Three dialogues with media, one of which continues a voice; answers of unequal length."""
    spec, out = models.talker.spec, []
    for seed, kinds in enumerate((["audio"], ["image"], ["av"])):
        prompt = make_sample(models.thinker.thinker, models.spec, kinds, seed=seed, prompt=True)
        document = with_reply(prompt.encoded, list(range(seed, seed + 7)))
        reply = spoken(prompt.encoded, document, random_codes(spec, 5 + 9 * seed, seed))
        if seed == 1:
            reply = continuation(prompt.encoded, document, spec, text=3, seed=seed)
        rejected = random_codes(spec, 14 - 4 * seed, seed + 50)
        out.append((document, PairLayout(lay_out(reply, spec), rejected)))
    return out


def shared(models: Models, chosen: list[int], pairs: list[Pair]) -> PairBatch:
    documents = [pairs[number][0] for number in chosen]
    lengths = [document.num_tokens for document in documents]
    layouts = [pairs[number][1] for number in chosen]
    talker, answers = pack_pairs(layouts, lengths, models.talker.spec)
    sizes = torch.bincount(answers, minlength=2 * len(chosen)).float()
    reference = REFERENCE.view(-1, 2)[chosen].flatten()
    return PairBatch(
        talker=talker,
        thinker=collate(documents, models.spec),
        pairs=PairTargets(answers, sizes, reference),
    )


def apart(models: Models, pairs: list[Pair]) -> list[SpeechBatch]:
    """Both answers of each pair, each as a reply of its own."""
    spec, batches = models.talker.spec, []
    for document, layout in pairs:
        for codes in (layout.prompt.codes, layout.rejected):
            prompt = layout.prompt
            alone = TalkerLayout(
                text_index=prompt.text_index,
                codec_ids=prompt.codec_ids,
                position_ids=prompt.position_ids,
                stream_index=prompt.stream_index,
                codes=codes,
            )
            talker = pack_speech([alone], [document.num_tokens], spec)
            batches.append(SpeechBatch(talker=talker, thinker=collate([document], models.spec)))
    return batches


class TwoPasses(nn.Module):
    """Answers of all pairs, one pass each."""

    def __init__(self, model: nn.Module, batches: list[SpeechBatch]) -> None:
        super().__init__()
        self.model, self.batches = model, batches

    def forward(self, batch: PairBatch) -> Tensor:
        return torch.cat([self.model(one) for one in self.batches])


def test_prefix_sharing_equals_two_passes(models: Models, pairs: list[Pair]) -> None:
    model = omni(models, joint=False)
    whole = shared(models, [0, 1, 2], pairs)
    batches = apart(models, pairs)
    with torch.no_grad():
        together, separate = model(whole), TwoPasses(model, batches)(whole)
    torch.testing.assert_close(together, separate, rtol=1e-5, atol=1e-5)
    # The Talker reads each prompt once.
    separately = sum(batch.talker.text_index.numel() for batch in batches)
    prompts = sum(layout.prompt.text_index.numel() for _, layout in pairs)
    assert whole.talker.text_index.numel() == separately - prompts
    found: list[tuple[float, dict[str, Tensor]]] = []
    for run in (model, TwoPasses(model, batches)):
        output = preference(run, whole, CONFIG)
        output.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        found.append((output.loss.item(), grads))
        assert output.num_tokens == whole.num_target_tokens == 3
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert_same(found[0][1], found[1][1], tolerance=1e-5)


def test_packs_of_pairs_do_not_change_the_loss(models: Models, pairs: list[Pair]) -> None:
    model = omni(models, joint=False)
    results = []
    for packs in ([[0, 1, 2]], [[0], [2, 1]], [[2], [], [1], [0]]):
        total = 0.0
        for chosen in packs:
            output = preference(model, shared(models, chosen, pairs), CONFIG)
            output.loss.backward()
            total += output.loss.item()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        results.append((total, grads))
    for total, grads in results[1:]:
        assert total == pytest.approx(results[0][0], rel=1e-5)
        assert_same(grads, results[0][1], tolerance=1e-5)


def test_the_reference_is_what_the_policy_starts_as(models: Models, pairs: list[Pair]) -> None:
    model = omni(models, joint=False)
    batch = shared(models, [0, 1, 2], pairs)
    with torch.no_grad():
        batch.pairs.reference = answer_logprobs(model(batch), batch.pairs)
    output = preference(model, batch, PreferenceConfig(beta=0.1))
    assert output.loss.item() == pytest.approx(3 * 0.693147, abs=1e-4)
    assert float(output.metrics["rewards/margins"][0]) == pytest.approx(0.0, abs=1e-5)
    moved = batch.to(torch.device("cpu"))
    assert preference(model, moved, PreferenceConfig()).num_tokens == 3


def test_an_answer_without_codes_is_refused(models: Models, pairs: list[Pair]) -> None:
    document, layout = pairs[0]
    empty = PairLayout(layout.prompt, torch.empty(0, dtype=torch.long))
    with pytest.raises(DataError, match="empty_speech"):
        pack_pairs([empty], [document.num_tokens], models.talker.spec)
