"""What is sampled depends on the request alone, and is drawn as transformers' processors would."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from omni_train.config.errors import ConfigError
from omni_train.engine.deepspeed import Precision
from omni_train.models.config import ModelConfig
from omni_train.models.talker import Talker
from omni_train.speech import sampling
from omni_train.speech.decode_step import DecodeStep, Prompt
from omni_train.speech.mel_kmeans import MelKMeansCodec, MelKMeansConfig
from omni_train.speech.sampling import (
    CodeEvent,
    SamplingConfig,
    SpeechRequest,
    sample_codes,
    stream_codes,
    uniform_noise,
)
from omni_train.speech.speaking import (
    Replicas,
    Utterance,
    load_replicas,
    make_request,
    one_thread,
    speak,
    stream_wave,
    to_wave,
)
from tests.numerics.samples import make_sample, small_tokenizer
from tests.numerics.talker_models import (
    Models,
    continuation,
    make_models,
    spoken,
    with_reply,
)

NUM_REQUESTS = 100
SAMPLES = 8
CONFIG = SamplingConfig(max_codes=10, num_samples=SAMPLES, num_slots=16, cache_step=32, top_k=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("omni")


@pytest.fixture(scope="module")
def models(folder: Path) -> Models:
    torch.set_num_threads(1)
    return make_models(folder)


def make_utterances(replicas: Replicas, numbers: range) -> Iterator[Utterance]:
    """Dialogues of all lengths, some with sound in them; a tenth continue a voice."""
    spec, thinker = replicas.talker.spec, replicas.thinker
    for number in numbers:
        kinds = ["audio"] if number % 25 == 7 else []
        prompt = make_sample(thinker.thinker, thinker.spec, kinds, seed=number, prompt=True).encoded
        reply = [(7 * number + i) % 250 for i in range(4 + number % 5)]
        document = with_reply(prompt, reply)
        if number % 10 == 3:
            asked = continuation(prompt, document, spec, text=2, seed=number)
            asked.codes = asked.codes[:0]
        else:
            asked = spoken(prompt, document, None)
        yield Utterance(f"r{number}", document, asked)


@pytest.fixture(scope="module")
def requests(models: Models) -> list[SpeechRequest]:
    replicas = Replicas(models.thinker, models.talker)
    return [make_request(replicas, one) for one in make_utterances(replicas, range(NUM_REQUESTS))]


def codes_of(talker: Talker, requests: list[SpeechRequest], config: SamplingConfig) -> list:
    """Codes and the way they ended, in lists that compare exactly."""
    return [
        [(speech.codes, speech.ended) for speech in samples]
        for samples in sample_codes(talker, requests, config)
    ]


@pytest.fixture(scope="module")
def all_codes(models: Models, requests: list[SpeechRequest]) -> list:
    return codes_of(models.talker, requests, CONFIG)


def rank_main(rank: int, folder: str, result: str) -> None:
    """One of two ranks: replicas from the files, every other utterance, other threads."""
    torch.set_num_threads(2)
    device, config = torch.device("cpu"), ModelConfig(tokenizer="in memory", init_from=folder)
    replicas = load_replicas(config, small_tokenizer(), Precision.fp32, device)
    with one_thread(device):
        mine = make_utterances(replicas, range(rank, NUM_REQUESTS, 2))
        spoken_codes = [
            [(speech.codes, speech.ended) for speech in samples]
            for samples in speak(replicas, mine, CONFIG)
        ]
    torch.save(spoken_codes, f"{result}.{rank}")


def test_two_ranks_give_the_codes_of_one(all_codes: list, folder: Path, tmp_path: Path) -> None:
    """8 x 100: the Thinker's pass, the prompts and all samples, on one process and on two."""
    result = tmp_path / "codes"
    workers = [
        mp.get_context("spawn").Process(target=rank_main, args=(rank, str(folder), str(result)))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert worker.exitcode == 0
    both = [torch.load(f"{result}.{rank}", weights_only=True) for rank in range(2)]
    assert [both[number % 2][number // 2] for number in range(NUM_REQUESTS)] == all_codes


def test_the_samples_are_worth_comparing(all_codes: list) -> None:
    flat = [speech for samples in all_codes for speech in samples]
    assert len(flat) == NUM_REQUESTS * SAMPLES
    assert len({tuple(codes) for codes, _ in flat}) > 0.9 * len(flat)
    ends = Counter(ended for _, ended in flat)
    assert min(ends[True], ends[False]) > 20, ends
    assert len({len(codes) for codes, _ in flat}) > 5


def test_company_order_and_slots_change_nothing(
    models: Models, requests: list[SpeechRequest], all_codes: list
) -> None:
    """Another order, a few alone, one by one as samples: bit for bit the same codes."""
    numbers = list(range(NUM_REQUESTS))[::-3]
    chosen = [requests[number] for number in numbers]
    assert codes_of(models.talker, chosen, CONFIG) == [all_codes[number] for number in numbers]
    for number in (0, 7, 13):
        assert codes_of(models.talker, [requests[number]], CONFIG) == [all_codes[number]]


def test_logits_do_not_depend_on_company(models: Models, requests: list[SpeechRequest]) -> None:
    """The reason for the above: bit-equal logits in any slot, beside any neighbours."""
    talker, target = models.talker, requests[7]

    def logits(slot: int, others: list[SpeechRequest]) -> Tensor:
        slots = sampling._Slots(talker, [target, *others], CONFIG, cache_length=96)
        with torch.inference_mode():
            for at, other in enumerate(others):
                slots.admit(at, other, slots.decode.prefill(other.embeds, other.position_ids), 0)
            prompt = slots.decode.prefill(target.embeds, target.position_ids)
            slots.admit(slot, target, prompt, 0)
            for step in range(5):
                slots.advance(torch.full((CONFIG.num_slots,), 3 + 11 * step))
        return slots.logits[slot]

    alone = logits(3, [])
    for slot in (0, 9, 15):
        assert torch.equal(logits(slot, requests[20 : 20 + slot]), alone)


def test_samples_share_a_prompt(
    models: Models, requests: list[SpeechRequest], all_codes: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt runs once for all samples, which are those of as many separate runs."""
    runs: list[int] = []
    original = DecodeStep.prefill

    def counted(self: DecodeStep, embeds: Tensor, position_ids: Tensor) -> Prompt:
        runs.append(len(embeds))
        return original(self, embeds, position_ids)

    monkeypatch.setattr(DecodeStep, "prefill", counted)
    assert codes_of(models.talker, requests[:3], CONFIG) == all_codes[:3]
    assert len(runs) == 3
    # The first sample does not know how many are asked for.
    one = SamplingConfig(max_codes=10, num_slots=16, cache_step=32, top_k=20)
    assert codes_of(models.talker, requests[:3], one) == [samples[:1] for samples in all_codes[:3]]


def test_a_stream_gives_the_codes_as_they_come(
    models: Models, requests: list[SpeechRequest], all_codes: list
) -> None:
    stream = stream_codes(models.talker, requests[:2], CONFIG)
    first = next(stream)
    assert (first.request, first.sample, first.code) == (0, 0, all_codes[0][0][0][0])
    events: list[CodeEvent] = [first, *stream]
    for number in range(2):
        for sample, (codes, ended) in enumerate(all_codes[number]):
            mine = [e for e in events if (e.request, e.sample) == (number, sample)]
            assert [e.code for e in mine] == codes + [None] * ended
            assert [e.cut_off for e in mine] == [False] * (len(mine) - 1) + [not ended]


def test_a_wave_comes_in_pieces_while_codes_are_drawn(models: Models) -> None:
    replicas = Replicas(models.thinker, models.talker)
    size = MelKMeansConfig(frame_rate_hz=25, codebook_size=96, griffin_lim_iterations=2)
    width = size.frames_per_code * size.num_mel_bins
    rng = torch.Generator().manual_seed(0)
    table = torch.randint(1000, 12_000, (96, width), generator=rng, dtype=torch.int16)
    codec = MelKMeansCodec(size, table)
    [utterance] = make_utterances(replicas, range(5, 6))
    config = SamplingConfig(max_codes=60, num_slots=1, cache_step=128, top_k=20)
    [[speech]] = speak(replicas, [utterance], config)
    pieces = list(stream_wave(replicas, utterance, config, codec))
    assert len(pieces) > 2
    whole = to_wave(codec, speech.codes)
    assert len(whole) == 640 * len(speech.codes)
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=1e-5)
    assert to_wave(codec, []).shape == (0,)


def test_scores_are_those_of_transformers() -> None:
    """Order and meaning: penalty, suppression, temperature, top-k, top-p."""
    torch.manual_seed(0)
    logits = torch.randn(6, 104) * 3
    # Equal logits at the edge of top-k, as bf16 gives them.
    logits[0, :30] = logits[0].max()
    history = torch.randint(0, 104, (6, 40))
    config = SamplingConfig(
        max_codes=4, temperature=0.7, top_k=12, top_p=0.8, repetition_penalty=1.2
    )
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.2),
            SuppressTokensLogitsProcessor([97, 3]),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(12),
            TopPLogitsWarper(0.8),
        ]
    )
    seen = torch.zeros(6, 104, dtype=torch.bool).scatter(1, history, True)
    draw = sampling._Draw(config, [3, 97], torch.device("cpu"))
    got, want = draw.scores(logits, seen), theirs(history, logits)
    assert torch.equal(got, want)
    kept = torch.isfinite(want).sum(1)
    assert kept[0] > 12, "ties at the edge are all kept"
    assert kept[1:].max() > 2
    assert kept[1:].max() < 12


def test_draws_follow_the_distribution(models: Models, requests: list[SpeechRequest]) -> None:
    """2,000 first codes of one request against the processed probabilities: chi-squared."""
    count = 2000
    config = SamplingConfig(max_codes=1, num_samples=count, num_slots=100, top_k=8, top_p=0.95)
    [samples] = sample_codes(models.talker, requests[:1], config)
    drawn = Counter(s.codes[0] if s.codes else -1 for s in samples)
    with torch.no_grad():
        step = DecodeStep(models.talker, num_rows=1, length=1)
        prompt = step.prefill(requests[0].embeds, requests[0].position_ids)
    draw = sampling._Draw(config, list(models.talker.spec.suppressed_ids), torch.device("cpu"))
    seen = torch.zeros(1, prompt.logits.numel(), dtype=torch.bool)
    seen[0, [96, 97, 100]] = True
    weights = draw.scores(prompt.logits[None], seen).softmax(-1)[0]
    expected = {i: count * float(w) for i, w in enumerate(weights) if w > 0}
    stops = models.talker.spec.stop_ids
    chi = sum((drawn[i] - e) ** 2 / e for i, e in expected.items() if i not in stops)
    assert len(expected) > 3
    assert set(drawn) <= set(expected) | {-1}
    # The 0.1 % point of chi-squared with seven degrees of freedom is 24.3.
    assert chi < 24.3, (drawn, expected)


def test_noise_is_fixed_by_names_alone() -> None:
    noise = uniform_noise(0, "key", 2, 50)
    assert (noise[:20] == uniform_noise(0, "key", 2, 20)).all()
    others = [uniform_noise(*names, 50) for names in ((1, "key", 2), (0, "kex", 2), (0, "key", 3))]
    assert all(abs(noise - other).min() > 0 for other in others)
    # Pinned: another generator would change every result ever reported.
    assert hashlib.sha256(noise.tobytes()).hexdigest()[:12] == "d1ae188fb986"


@pytest.mark.parametrize(
    "change",
    [
        {"max_codes": 0},
        {"temperature": 0.0},
        {"top_p": 0.0},
        {"top_k": -1},
        {"num_samples": 0},
        {"num_slots": 0},
        {"repetition_penalty": 0.0},
        {"cache_step": 0},
    ],
    ids=str,
)
def test_settings_are_checked(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"sampling.{next(iter(change))}"):
        SamplingConfig(**{"max_codes": 5, **change})


def test_what_cannot_be_sampled_is_refused(
    models: Models, requests: list[SpeechRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="one key"):
        sample_codes(models.talker, [requests[0], requests[0]], CONFIG)
    monkeypatch.setattr(models.talker.codec_head.weight, "ds_id", 1, raising=False)
    with pytest.raises(ConfigError, match="plain replica"):
        sample_codes(models.talker, requests[:1], CONFIG)
