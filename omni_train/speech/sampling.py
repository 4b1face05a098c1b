"""Samples codes from a plain Talker: batched, with a key-value cache, and as a stream.

A fixed number of slots is decoded in step. Each slot holds one sample of one request at its own
length; when a sample ends, the next one waiting takes its slot. A prompt runs once, alone and at
its exact length, and all its samples start from copies of its cache.

What a request gets does not depend on who shares its batch: every step has the same shapes (slots,
cache positions) and each row reads its own data only; the noise of a draw follows from seed,
request key, sample number and step alone. So any split of the requests over ranks or calls gives
the same codes, as long as precision, device, number of threads and number of slots are the same.

Not done here: the Thinker's pass (`thinker_states`, one dialogue a pack where the same holds for
its floating-point results), codes to waves (the codecs).

Letters: B slots, V rows of the codec table, L prompt positions, S cache positions, H the Talker's
width, E the Thinker's, M text items after the first, K codes at most.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from transformers import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from omni_train.config.errors import check_fields
from omni_train.engine.shards import check_whole
from omni_train.models.talker import Talker
from omni_train.models.talker_layout import TalkerLayout, absolute_index
from omni_train.speech.decode_step import DecodeStep, Prompt

# Keeps a draw off the very end of the distribution, where rounding could pick a row of weight zero.
_BELOW_ONE = 1.0 - 2.0**-32


@dataclass(kw_only=True, slots=True)
class SamplingConfig:
    """How codes are drawn; the defaults are the released model's.

    Args:
        max_codes: K, after which a sample is cut off.
        num_samples: samples of each request.
        temperature: divides the logits.
        top_k: rows kept at most; 0 keeps all, 1 is greedy.
        top_p: weight of the rows kept; 1 keeps all.
        repetition_penalty: of ids drawn before, and of the codec's control ids in the prompt.
        seed: of all noise.
        num_slots: B, samples decoded side by side.
        cache_step: the cache has the least multiple of it that holds prompt and codes; requests of
            one multiple run together.
    """

    max_codes: int
    num_samples: int = 1
    temperature: float = 0.9
    top_k: int = 40
    top_p: float = 0.8
    repetition_penalty: float = 1.05
    seed: int = 0
    num_slots: int = 32
    cache_step: int = 256

    def __post_init__(self) -> None:
        check_fields(
            self,
            "sampling",
            ("max_codes", self.max_codes >= 1, "must be at least 1"),
            ("num_samples", self.num_samples >= 1, "must be at least 1"),
            ("temperature", self.temperature > 0, "must be positive; top_k=1 is greedy"),
            ("top_k", self.top_k >= 0, "must not be negative"),
            ("top_p", 0 < self.top_p <= 1, "must lie in (0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "must be positive"),
            ("num_slots", self.num_slots >= 1, "must be at least 1"),
            ("cache_step", self.cache_step >= 1, "must be at least 1"),
            remedy="choose another value",
        )


@dataclass(slots=True)
class SpeechRequest:
    """A reply to be spoken.

    Args:
        key: names the request's noise; unique among the requests.
        embeds: [L, H], the prompt up to the codec bos, projected.
        position_ids: int64 [3, L].
        stream: [M, E], the text items that come with the codes; the last one repeats.
    """

    key: str
    embeds: Tensor
    position_ids: Tensor
    stream: Tensor


@dataclass(frozen=True, slots=True)
class CodeEvent:
    """One step of one sample.

    Args:
        request, sample: numbers.
        code: the code, or None where the sample ended by itself.
        cut_off: whether this is the last code that `max_codes` allows.
    """

    request: int
    sample: int
    code: int | None
    cut_off: bool = False


@dataclass(slots=True)
class SampledSpeech:
    """One sample.

    Args:
        codes: without the stop.
        ended: whether it ended by itself, rather than at `max_codes`.
    """

    codes: list[int] = field(default_factory=list)
    ended: bool = False


@torch.no_grad()
def speech_request(
    talker: Talker, key: str, states: Tensor, layout: TalkerLayout, *, start: int = 0
) -> SpeechRequest:
    """Return the request of one spoken reply.

    Args:
        talker: the replica that will sample.
        key: see `SpeechRequest`.
        states: [T, E] of the Thinker's pack.
        layout: the reply's, without codes.
        start: where its document begins in the pack.
    """
    rows = talker.rows()
    table = torch.cat([states.to(rows.dtype), rows])
    total, device = states.shape[0], states.device
    codec_index = torch.nonzero(layout.codec_ids >= 0).squeeze(1)
    text = table[absolute_index(layout.text_index, start, total).to(device)]
    codec_ids = layout.codec_ids[codec_index].to(device)
    return SpeechRequest(
        key=key,
        embeds=talker.project(text, codec_index.to(device), codec_ids),
        position_ids=layout.position_ids.to(device),
        stream=table[absolute_index(layout.stream_index, start, total).to(device)],
    )


def sample_codes(
    talker: Talker,
    requests: list[SpeechRequest],
    config: SamplingConfig,
    *,
    suppress_ids: Collection[int] | None = None,
) -> list[list[SampledSpeech]]:
    """Return `num_samples` samples of each request; see `stream_codes`."""
    out = [[SampledSpeech() for _ in range(config.num_samples)] for _ in requests]
    for event in stream_codes(talker, requests, config, suppress_ids=suppress_ids):
        speech = out[event.request][event.sample]
        if event.code is None:
            speech.ended = True
        else:
            speech.codes.append(event.code)
    return out


@torch.inference_mode()
def stream_codes(
    talker: Talker,
    requests: list[SpeechRequest],
    config: SamplingConfig,
    *,
    suppress_ids: Collection[int] | None = None,
) -> Iterator[CodeEvent]:
    """Yield each code as soon as it is drawn; samples of different requests come interleaved.

    Args:
        talker: a plain replica on one device, in eval mode.
        requests: at most one per key.
        config: how to draw.
        suppress_ids: ids never drawn; all that are neither code nor stop where left out.

    Raises:
        ConfigError: a ZeRO-3 model, which would gather all weights for every code.
        ValueError: two requests with one key.
    """
    check_whole(talker, each="code")
    if len({request.key for request in requests}) < len(requests):
        raise ValueError("two requests have one key and would get the same noise")
    suppressed = talker.spec.suppressed_ids if suppress_ids is None else suppress_ids
    draw = _Draw(config, sorted(suppressed), talker.codec_head.weight.device)
    groups: dict[int, list[int]] = {}
    for number, request in enumerate(requests):
        needed = request.embeds.shape[0] + config.max_codes
        groups.setdefault(-(-needed // config.cache_step), []).append(number)
    for steps, numbers in groups.items():
        chosen = [requests[number] for number in numbers]
        slots = _Slots(talker, chosen, config, cache_length=steps * config.cache_step)
        for event in _decode(slots, chosen, config, draw):
            number = numbers[event.request]
            yield CodeEvent(number, event.sample, event.code, event.cut_off)


def _decode(
    slots: _Slots, requests: list[SpeechRequest], config: SamplingConfig, draw: _Draw
) -> Iterator[CodeEvent]:
    """Decode requests of one cache length."""
    stop_ids = slots.talker.spec.stop_ids
    waiting = [(i, n) for i in range(len(requests)) for n in range(config.num_samples)][::-1]
    # (request, sample, codes so far) of each slot.
    taken: list[tuple[int, int, int] | None] = [None] * config.num_slots
    prompt: Prompt | None = None
    whose = -1
    while waiting or any(taken):
        for slot in range(config.num_slots):
            if waiting and taken[slot] is None:
                number, sample = waiting.pop()
                if prompt is None or whose != number:
                    request, whose = requests[number], number
                    prompt = slots.decode.prefill(request.embeds, request.position_ids)
                slots.admit(slot, requests[number], prompt, sample)
                taken[slot] = (number, sample, 0)
        codes = draw(slots)
        for slot, code in enumerate(codes.tolist()):
            turn = taken[slot]
            if turn is None:
                continue
            number, sample, count = turn
            ended = code in stop_ids
            cut_off = not ended and count + 1 == config.max_codes
            taken[slot] = None if ended or cut_off else (number, sample, count + 1)
            yield CodeEvent(number, sample, None if ended else code, cut_off)
        if any(taken):
            slots.advance(codes)


class _Slots:
    """State of B samples that are decoded side by side.

    Args:
        talker: the replica.
        requests: all that will come, for the longest text stream.
        config: number of slots and of codes.
        cache_length: S.
    """

    def __init__(
        self,
        talker: Talker,
        requests: list[SpeechRequest],
        config: SamplingConfig,
        *,
        cache_length: int,
    ) -> None:
        self.talker, self.config = talker, config
        weight, count = talker.codec_head.weight, config.num_slots
        longest = max(request.stream.shape[0] for request in requests)
        self.decode = DecodeStep(talker, num_rows=count, length=cache_length)
        self.cache_length = cache_length
        self.numbers = self.decode.rows
        zeros = torch.zeros_like(self.numbers)
        # Prompt positions, codes fed in, first position id after the prompt, last text item.
        self.length, self.step = zeros.clone(), zeros.clone()
        self.position, self.last_item = zeros.clone(), zeros.clone()
        self.stream = weight.new_zeros(count, longest, talker.config.embedding_size)
        self.logits = torch.zeros(count, weight.shape[0], device=weight.device)
        self.seen = torch.zeros_like(self.logits, dtype=torch.bool)
        self.noise = torch.zeros(count, config.max_codes, dtype=torch.float64, device=weight.device)

    def admit(self, slot: int, request: SpeechRequest, prompt: Prompt, sample: int) -> None:
        """Start a sample in a slot."""
        length, items = request.embeds.shape[0], request.stream.shape[0]
        self.decode.fill(slot, prompt)
        self.length[slot], self.step[slot] = length, 0
        self.position[slot] = request.position_ids[0, -1] + 1
        self.stream[slot, :items], self.last_item[slot] = request.stream, items - 1
        self.logits[slot] = prompt.logits
        self.seen[slot] = False
        spec = self.talker.spec
        # The ids that transformers' `generate` has in the Talker's prompt.
        self.seen[slot, [spec.codec_mask, spec.codec_pad, spec.codec_bos]] = True
        noise = uniform_noise(self.config.seed, request.key, sample, self.config.max_codes)
        self.noise[slot] = torch.from_numpy(noise)

    def advance(self, codes: Tensor) -> None:
        """Feed the codes int64 [B]; free slots go along with what they hold."""
        text = self.stream[self.numbers, torch.minimum(self.step, self.last_item)]
        at = (self.length + self.step).clamp(max=self.cache_length - 1)
        self.logits = self.decode(text, codes, at, self.position + self.step)
        self.step = self.step + 1


class _Draw:
    """Draws one id per slot: penalty, suppression, temperature, top-k, top-p, then the noise."""

    def __init__(self, config: SamplingConfig, suppressed: list[int], device: torch.device) -> None:
        self.penalty = config.repetition_penalty
        self.suppressed = torch.tensor(suppressed, dtype=torch.long, device=device)
        self.warpers: list[Any] = []
        if config.temperature != 1.0:
            self.warpers.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            self.warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(config.top_p))

    def scores(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Return processed scores float32 [B, V], as transformers' processors would.

        Args:
            logits: float32 [B, V].
            seen: bool [B, V], ids that the penalty is for.
        """
        penalised = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
        scores = torch.where(seen, penalised, logits)
        scores = scores.index_fill(1, self.suppressed, -torch.inf)
        for warper in self.warpers:
            scores = warper(None, scores)
        return scores

    def __call__(self, slots: _Slots) -> Tensor:
        """Return the drawn ids int64 [B] and note them as seen."""
        weights = self.scores(slots.logits, slots.seen).softmax(dim=-1, dtype=torch.float64)
        bounds = weights.cumsum(dim=-1)
        step = slots.step.clamp(max=slots.noise.shape[1] - 1)
        noise = slots.noise.gather(1, step[:, None]) * _BELOW_ONE
        codes = torch.searchsorted(bounds, noise * bounds[:, -1:], right=True)[:, 0]
        slots.seen[slots.numbers, codes] = True
        return codes


def uniform_noise(seed: int, key: str, sample: int, count: int) -> np.ndarray[Any, Any]:
    """Return float64 [count] in [0, 1), one for each step, by a counter-based generator.

    Args:
        seed, key, sample: whose noise; any other triple has other noise.
        count: steps.
    """
    name = xxhash.xxh3_128_intdigest(f"{seed}:{sample}:{key}".encode())
    return np.random.Generator(np.random.Philox(key=name)).random(count)
