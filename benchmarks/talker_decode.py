"""Codes per second of the sampling loop, against transformers' `generate` on the same Talker.

The tiny Talker, released sampling settings, stops suppressed so that both sides draw the same
number of codes. The peer gets left-padded prompts with their mask in both rows (alone, one column
of padding), since without padding it is wrong. Greedy codes are compared before anything is timed.
The Thinker is timed on neither side: its states are random numbers.
"""

from __future__ import annotations

import statistics
import sys
import time
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniTalkerForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from benchmarks.report import compare, parser, show
from omni_train.data.tokenizer import train_tokenizer
from omni_train.models.build import build_talker
from omni_train.models.config import ModelConfig
from omni_train.models.talker import Talker
from omni_train.models.talker_layout import SpokenReply, TalkerLayout, absolute_index, lay_out
from omni_train.speech.mel_kmeans import MelKMeansCodec, MelKMeansConfig
from omni_train.speech.sampling import (
    SamplingConfig,
    SpeechRequest,
    sample_codes,
    speech_request,
    stream_codes,
)

REQUESTS = 32
CODES = 60


class Peer:
    """transformers' Talker with the same weights, and the requests as its `generate` wants them."""

    def __init__(
        self,
        talker: Talker,
        states: list[Tensor],
        layouts: list[TalkerLayout],
        *,
        codes: int = CODES,
    ) -> None:
        self.codes, weight = codes, talker.codec_head.weight
        self.device = weight.device
        self.model = Qwen2_5OmniTalkerForConditionalGeneration(talker.config).eval().to(weight)
        self.model.model.set_attn_implementation("sdpa")
        weights = talker.state_dict()
        kept = {name: weights[name] for name in self.model.state_dict()}
        self.model.load_state_dict(kept)
        self.suppressed = suppressed(talker)
        self.pad = talker.spec.codec_pad
        self.controls = (talker.spec.codec_mask, talker.spec.codec_pad, talker.spec.codec_bos)
        self.rows = []
        for state, layout in zip(states, layouts, strict=True):
            table = torch.cat([state, talker.rows()])
            embeds, stream = (
                table[absolute_index(index, 0, state.shape[0])]
                for index in (layout.text_index, layout.stream_index)
            )
            self.rows.append((embeds, stream))

    def generate(self, numbers: list[int], **options: Any) -> Tensor:
        """Return codes int64 [requests, codes]."""
        embeds = [self.rows[number][0] for number in numbers]
        longest = max(row.shape[0] for row in embeds) + (len(numbers) == 1)
        rows = [[0] * (longest - len(r)) + [1] * len(r) for r in embeds]
        mask = torch.tensor(rows, device=self.device)
        padded = torch.stack(
            [torch.nn.functional.pad(r, (0, 0, longest - len(r), 0)) for r in embeds]
        )
        streams = [self.rows[number][1] for number in numbers]
        # The last item of a stream repeats.
        size = max(len(stream) for stream in streams)
        reply = pad_sequence(
            [torch.cat([s, s[-1:].expand(size - len(s), -1)]) for s in streams], batch_first=True
        )
        prompt = torch.full((len(numbers), longest), self.controls[0], device=self.device)
        prompt[:, -2], prompt[:, -1] = self.controls[1:]
        out: Tensor = self.model.generate(
            input_ids=prompt,
            input_text_ids=torch.zeros_like(prompt),
            thinker_reply_part=reply,
            inputs_embeds=padded,
            attention_mask=mask,
            suppress_tokens=self.suppressed,
            pad_token_id=self.pad,
            max_new_tokens=self.codes,
            repetition_penalty=1.05,
            **options,
        )
        return out[:, longest:]

    def alone(self, **options: Any) -> Tensor:
        """One request after the other."""
        return torch.cat([self.generate([number], **options) for number in range(len(self.rows))])

    def batched(self, **options: Any) -> Tensor:
        """All at once."""
        return self.generate(list(range(len(self.rows))), **options)


def make_layouts(talker: Talker, count: int = REQUESTS) -> tuple[list[Tensor], list[TalkerLayout]]:
    """Random states [T, E] of dialogues of 20 tokens and more, and where they go."""
    rng = torch.Generator().manual_seed(0)
    weight = talker.codec_head.weight
    states, layouts = [], []
    for number in range(count):
        prompt, reply = 15 + number % REQUESTS, 5 + number % 7
        total = prompt + reply
        state = torch.randn(total, talker.config.embedding_size, generator=rng)
        states.append(state.to(weight))
        spoken = SpokenReply(
            position_ids=torch.arange(total).expand(3, -1),
            prompt_length=prompt,
            reply_start=prompt,
            reply_length=reply,
            speaker=next(iter(talker.spec.speakers)),
            codes=torch.zeros(0, dtype=torch.long),
        )
        layouts.append(lay_out(spoken, talker.spec))
    return states, layouts


def first_ms(talker: Talker, requests: list[SpeechRequest], config: SamplingConfig) -> list[float]:
    """Milliseconds until one request alone yields its first code, and its first piece of wave."""
    size = MelKMeansConfig(frame_rate_hz=25, codebook_size=talker.spec.num_codes)
    width = size.frames_per_code * size.num_mel_bins
    # What the codes sound like does not matter here.
    codec = MelKMeansCodec(size, torch.full((size.codebook_size, width), 4096, dtype=torch.int16))
    times = []
    for request in requests[:9]:
        start = time.perf_counter()
        events = stream_codes(talker, [request], config, suppress_ids=suppressed(talker))
        first = next(events)
        code_s = time.perf_counter() - start
        drawn = (torch.tensor([e.code]) for e in chain([first], events) if e.code is not None)
        next(codec.stream(drawn))
        times.append((code_s, time.perf_counter() - start))
    return [statistics.median(column) * 1e3 for column in zip(*times, strict=True)]


def suppressed(talker: Talker) -> list[int]:
    """Ids that neither side may draw: stops among them, so that all replies are equally long."""
    return list(talker.spec.suppressed_ids + talker.spec.stop_ids)


def main() -> int:
    """Run the table."""
    args = parser("Codes per second of the Talker, against transformers' generate.").parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    tokenizer = train_tokenizer(["the words do not matter here"], vocab_size=320)
    config = ModelConfig(tokenizer="in memory")
    talker = build_talker(config, tokenizer, seed=0, dtype=torch.float32, fresh=True).talker.eval()
    talker.requires_grad_(False)
    states, layouts = make_layouts(talker)
    requests = [
        speech_request(talker, str(number), state, layout)
        for number, (state, layout) in enumerate(zip(states, layouts, strict=True))
    ]
    peer = Peer(talker, states, layouts)
    # The least cache that holds every request, so that all of them run together.
    longest = max(request.embeds.shape[0] for request in requests) + CODES

    def ours(**options: Any) -> list[list[int]]:
        sampling = SamplingConfig(
            max_codes=CODES, num_slots=REQUESTS, cache_step=longest, **options
        )
        samples = sample_codes(talker, requests, sampling, suppress_ids=peer.suppressed)
        return [speech.codes for [speech] in samples]

    greedy = ours(top_k=1)
    assert greedy == peer.batched(do_sample=False).tolist(), "not the codes of the peer's batch"
    assert greedy == peer.alone(do_sample=False).tolist(), "not the codes of the peer alone"
    drawn = {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.8}
    total = REQUESTS * CODES
    rows = [
        compare(name, ours, lambda run=run: run(**drawn), goal=goal, pairs=args.pairs, items=total)
        for name, run, goal in (
            ("codes, peer one at a time", peer.alone, 5.0),
            (f"codes, peer in a batch of {REQUESTS}", peer.batched, 1.1),
        )
    ]
    one = SamplingConfig(max_codes=CODES, num_slots=1, cache_step=longest)
    code_ms, wave_ms = first_ms(talker, requests, one)
    note = f"a request alone has its first code after {code_ms:.1f} ms, and its first piece of wave"
    notes = [f"{note} (mel_kmeans at 25 Hz) after {wave_ms:.1f} ms"]
    return show(rows, ("torch", "transformers"), notes, as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
