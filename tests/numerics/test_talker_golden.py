"""The Talker's inputs, logits and greedy codes are those of transformers' own generation.

Both come from one saved checkpoint. Prompts of different length are left-padded, since upstream is
right only there; the last test documents what it does to a prompt alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from omni_train.data.collate import collate
from omni_train.data.types import EncodedSample
from omni_train.evaluation.generate import media_ids
from omni_train.models.talker import thinker_states
from omni_train.models.talker_layout import TalkerLayout, lay_out, pack_speech
from omni_train.speech import sampling
from omni_train.speech.sampling import SamplingConfig, sample_codes, speech_request
from tests.numerics.samples import Sample, make_sample
from tests.numerics.talker_models import VOICE, Models, make_models, spoken, with_reply

MAX_CODES = 12
PENALTY = 1.3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("omni"))


@dataclass
class Upstream:
    """What transformers generated: text [B, N], codes [B, K], raw and processed [B, K, V]."""

    text: Tensor
    codes: Tensor
    logits: Tensor
    scores: Tensor
    waves: Any


def padded(samples: list[Sample], *, extra: int = 0) -> dict[str, Any]:
    """Left-pad prompts as transformers' processor would; `extra` more columns of padding."""
    hf = [sample.hf for sample in samples]
    batch = {}
    for name in ("input_ids", "attention_mask"):
        rows = pad_sequence([x[name][0] for x in hf], batch_first=True, padding_side="left")
        batch[name] = torch.nn.functional.pad(rows, (extra, 0))
    for name in ("pixel_values", "image_grid_thw", "input_features", "feature_attention_mask"):
        if parts := [x[name] for x in hf if name in x]:
            # Without the prefix, upstream hands the pixels to the Talker as well, which refuses.
            batch["thinker_" + name if name == "pixel_values" else name] = torch.cat(parts)
    return batch


def generate(models: Models, inputs: dict[str, Any], **options: Any) -> Upstream:
    """Run the whole upstream model, Token2Wav included, and look at what the Talker gave."""
    seen: list[Any] = []
    original: Callable[..., Any] = models.upstream.talker.generate

    def recorded(**kwargs: Any) -> Tensor:
        # Upstream suppresses bos alone; a random model would draw other ids that are no code.
        assert kwargs["suppress_tokens"] == [models.talker.spec.codec_bos]
        kwargs["suppress_tokens"] = list(models.talker.spec.suppressed_ids)
        out = original(
            **kwargs, output_logits=True, output_scores=True, return_dict_in_generate=True
        )
        codes = out.sequences[:, kwargs["input_ids"].shape[1] :]
        seen.append((codes, torch.stack(out.logits, 1), torch.stack(out.scores, 1)))
        return out.sequences

    models.upstream.talker.generate = recorded
    spec = models.talker.spec
    try:
        text, waves = models.upstream.generate(
            **inputs,
            speaker=VOICE,
            thinker_do_sample=False,
            thinker_suppress_tokens=media_ids(models.spec),
            talker_do_sample=False,
            talker_max_new_tokens=MAX_CODES,
            talker_eos_token_id=list(spec.stop_ids),
            talker_repetition_penalty=PENALTY,
            **{"thinker_max_new_tokens": 7, "thinker_pad_token_id": 0, **options},
        )
    finally:
        del models.upstream.talker.generate
    return Upstream(text[:, inputs["input_ids"].shape[1] :], *seen[0], waves)


@dataclass
class Golden:
    """One upstream run, and our documents of prompts and generated replies."""

    upstream: Upstream
    prompts: list[EncodedSample]
    documents: list[EncodedSample]
    lengths: list[int]
    states: Tensor


def golden(models: Models, samples: list[Sample], upstream: Upstream, eos: int) -> Golden:
    """Line our inputs up with what upstream generated."""
    # Of a reply that did not end, upstream never computes the last token's state.
    replies = [row[: row.index(eos)] if eos in row else row[:-1] for row in upstream.text.tolist()]
    stops = models.talker.spec.stop_ids
    lengths = [
        next((i for i, code in enumerate(row) if code in stops), len(row))
        for row in upstream.codes.tolist()
    ]
    prompts = [sample.encoded for sample in samples]
    documents = [with_reply(p, r) for p, r in zip(prompts, replies, strict=True)]
    with torch.no_grad():
        states = thinker_states(models.thinker, collate(documents, models.spec))
    return Golden(upstream, prompts, documents, lengths, states)


@pytest.fixture(scope="module")
def batch(models: Models) -> Golden:
    """Two prompts with media; the first reply ends early, the second is cut off."""
    samples = [
        make_sample(models.thinker.thinker, models.spec, kinds, seed=seed, prompt=True)
        for kinds, seed in ((["audio", "image"], 5), (["image"], 6))
    ]
    inputs = padded(samples)
    assert not inputs["attention_mask"].all(), "no row is padded"
    free = generate(models, inputs, thinker_eos_token_id=-1).text.tolist()
    eos = next(t for i, t in enumerate(free[0]) if i > 1 and t not in free[0][:i] + free[1])
    upstream = generate(models, inputs, thinker_eos_token_id=eos)
    assert len(upstream.waves) == 2
    return golden(models, samples, upstream, eos)


def layouts(models: Models, golden: Golden, *, teach: bool) -> list[TalkerLayout]:
    """Our layouts; with `teach`, upstream's codes are fed in."""
    return [
        lay_out(spoken(prompt, document, codes[:count] if teach else None), models.talker.spec)
        for prompt, document, codes, count in zip(
            golden.prompts, golden.documents, golden.upstream.codes, golden.lengths, strict=True
        )
    ]


def taught_logits(models: Models, golden: Golden) -> list[Tensor]:
    """Logits [K + 1, V] of each reply, all of them in one pack."""
    lengths = [document.num_tokens for document in golden.documents]
    taught: list[TalkerLayout | None] = [*layouts(models, golden, teach=True)]
    pack = pack_speech(taught, lengths, models.talker.spec)
    with torch.no_grad():
        hidden = models.talker.hidden(golden.states, pack)[0, pack.target_index]
        logits = models.talker.codec_head(hidden)
    return list(torch.split(logits, [count + 1 for count in golden.lengths]))


def assert_equal_steps(got: Tensor, want: Tensor, count: int) -> None:
    """Compare the steps that upstream really took: also the one that drew the stop, if any."""
    steps = min(count + 1, want.shape[0])
    torch.testing.assert_close(got[:steps], want[:steps], rtol=0, atol=1e-5)


def test_the_batch_is_worth_comparing(models: Models, batch: Golden) -> None:
    first, second = (d.num_tokens - p.num_tokens for p, d in
                     zip(batch.prompts, batch.documents, strict=True))  # fmt: skip
    assert first < second == 6, "one reply ended early"
    assert batch.prompts[0].num_tokens != batch.prompts[1].num_tokens
    assert min(batch.lengths) > 7, "all of the text stream is consumed, then pad"
    assert batch.upstream.logits.std() > 0.3
    assert batch.upstream.codes.unique().numel() > 4


def test_teacher_forced_logits_equal_generate(models: Models, batch: Golden) -> None:
    for row, got in enumerate(taught_logits(models, batch)):
        assert_equal_steps(got, batch.upstream.logits[row], batch.lengths[row])


def test_cached_steps_equal_generate_and_teacher_forcing(models: Models, batch: Golden) -> None:
    taught = taught_logits(models, batch)
    config = SamplingConfig(
        max_codes=MAX_CODES,
        num_slots=3,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=PENALTY,
    )
    requests, start = [], 0
    for row, layout in enumerate(layouts(models, batch, teach=False)):
        requests.append(speech_request(models.talker, str(row), batch.states, layout, start=start))
        start += batch.documents[row].num_tokens
    slots = sampling._Slots(models.talker, requests, config, cache_length=128)
    with torch.inference_mode():
        for slot, row in ((2, 0), (0, 1)):
            prompt = slots.decode.prefill(requests[row].embeds, requests[row].position_ids)
            slots.admit(slot, requests[row], prompt, 0)
        draw = sampling._Draw(config, list(models.talker.spec.suppressed_ids), slots.logits.device)
        # The penalty is also for the ids of upstream's prompt, one of which is a stop.
        scores = draw.scores(slots.logits, slots.seen)[[2, 0]]
        torch.testing.assert_close(scores, batch.upstream.scores[:, 0], rtol=0, atol=1e-5)
        steps = [slots.logits]
        for step in range(min(batch.lengths)):
            codes = batch.upstream.codes[:, step]
            slots.advance(torch.stack([codes[1], torch.zeros_like(codes[0]), codes[0]]))
            steps.append(slots.logits)
    stepped = torch.stack(steps, 1)
    for slot, row in ((2, 0), (0, 1)):
        count = min(batch.lengths)
        assert_equal_steps(stepped[slot], batch.upstream.logits[row], count)
        torch.testing.assert_close(stepped[slot], taught[row][: count + 1], rtol=0, atol=1e-5)


def test_greedy_codes_equal_generate(models: Models, batch: Golden) -> None:
    """With the penalty of ids seen before, those of upstream's prompt included."""
    start, requests = 0, []
    for row, layout in enumerate(layouts(models, batch, teach=False)):
        requests.append(speech_request(models.talker, str(row), batch.states, layout, start=start))
        start += batch.documents[row].num_tokens
    config = SamplingConfig(max_codes=MAX_CODES, top_k=1, repetition_penalty=PENALTY, num_slots=2)
    for row, [speech] in enumerate(sample_codes(models.talker, requests, config)):
        assert speech.codes == batch.upstream.codes[row, : batch.lengths[row]].tolist()
        assert speech.ended == (batch.lengths[row] < MAX_CODES)


def test_upstream_samples_a_lone_prompt_off_its_distribution(models: Models) -> None:
    """transformers 5.18 to 5.23 drop a mask of ones before the Talker (RECIPE.md section 5).

    Without a mask it adds neither codec bos and pad nor 3-D positions, so speech of a batch of one
    is drawn from other logits than the model was trained for; one column of padding repairs it.
    This is why sampling is our own. If this fails, upstream has mended it: say so in the docs.
    """
    sample = make_sample(models.thinker.thinker, models.spec, ["image"], seed=6, prompt=True)
    errors = []
    for extra in (1, 0):
        upstream = generate(models, padded([sample], extra=extra), thinker_eos_token_id=-1)
        got = taught_logits(models, golden(models, [sample], upstream, eos=-1))[0]
        steps = min(got.shape[0], upstream.logits.shape[1])
        errors.append(float((got[:steps] - upstream.logits[0, :steps]).abs().max()))
    assert errors[0] < 1e-5
    assert errors[1] > 1e-2
