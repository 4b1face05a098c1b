"""G6: codes per second of the Talker, 64 requests side by side.

The 7B Talker's widths, all 24 layers. Three lines: one decoding step with its fixed shapes captured
in a CUDA graph, against what reading the weights once takes at the rate of a large copy, measured
here; the sampling loop as it is, which captures no graph; and the loop against transformers'
`generate` on the same requests. Greedy codes are compared first.
"""

from __future__ import annotations

import torch

from benchmarks import gpu
from benchmarks.report import Row, compare
from benchmarks.talker_decode import Peer, make_layouts, speech_request
from omni_train.models.config import ModelConfig, ModelPreset
from omni_train.models.presets import build_config
from omni_train.models.talker import Talker
from omni_train.models.talker_spec import released_talker_spec
from omni_train.speech.decode_step import DecodeStep
from omni_train.speech.sampling import SamplingConfig, sample_codes

LEAST_RATE, OVER_PEER = 0.5, 5.0


def make_talker(place: gpu.Place) -> Talker:
    """Return a Talker with random weights."""
    if place.tiny:
        from omni_train.data.tokenizer import train_tokenizer
        from omni_train.models.build import build_talker

        tokenizer = train_tokenizer(gpu.TEXTS, vocab_size=400)
        config = ModelConfig(tokenizer="in memory")
        built = build_talker(config, tokenizer, seed=0, dtype=place.dtype, fresh=True)
        return built.talker.eval().requires_grad_(False)
    config = build_config(ModelPreset.qwen2_5_omni_7b)
    spec = released_talker_spec(config)
    return gpu.build(place, lambda: Talker(config.talker_config, spec)).eval().requires_grad_(False)


def copy_rate(place: gpu.Place, times: int) -> float:
    """Return the bytes that a large copy reads and writes in a second."""
    source = torch.zeros(place.pick(1 << 31, 1 << 12), dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    return 2 * len(source) / gpu.median_s(place, lambda: target.copy_(source), times)[0]


def step_row(place: gpu.Place, talker: Talker, num_rows: int, pairs: int) -> Row:
    """Return the codes per second of one captured step, against the weights' bytes."""
    step = DecodeStep(talker, num_rows=num_rows, length=place.pick(512, 32))
    width = talker.config.embedding_size
    text = torch.zeros(num_rows, width, device=place.device, dtype=place.dtype)
    codes, at = (torch.zeros(num_rows, dtype=torch.long, device=place.device) for _ in "ab")

    def work() -> object:
        return step(text, codes, at, at)

    if not place.tiny:
        work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        work = graph.replay
    taken = gpu.median_s(place, work, 4 * pairs)
    weights = sum(p.nbytes for p in talker.model.layers.parameters())
    weights += talker.codec_head.weight.nbytes
    rates = [num_rows / one for one in taken]
    limit = num_rows * copy_rate(place, pairs) / weights
    shares = (rates[0] / limit, rates[2] / limit, rates[1] / limit)
    return Row("codes/s of a captured step", rates[0], limit, "1/s", *shares, LEAST_RATE)


@torch.no_grad()
def measure(place: gpu.Place, pairs: int) -> tuple[list[Row], list[str]]:
    """Return the rows."""
    talker = make_talker(place)
    count, codes = place.pick((64, 150), (2, 4))
    states, layouts = make_layouts(talker, count)
    requests = [
        speech_request(talker, str(number), state, layout)
        for number, (state, layout) in enumerate(zip(states, layouts, strict=True))
    ]
    peer = Peer(talker, states, layouts, codes=codes)
    longest = max(request.embeds.shape[0] for request in requests) + codes

    def ours(**options: float) -> list[list[int]]:
        config = SamplingConfig(max_codes=codes, num_slots=count, cache_step=longest, **options)
        found = sample_codes(talker, requests, config, suppress_ids=peer.suppressed)
        return [speech.codes for [speech] in found]

    mine, theirs = ours(top_k=1), peer.batched(do_sample=False).tolist()
    both = (zip(one, two, strict=True) for one, two in zip(mine, theirs, strict=True))
    same = sum(a == b for codes_of_one in both for a, b in codes_of_one)
    # In half precision two near-equal logits may change places, and then all that follows differs.
    share = same / (count * codes)
    assert share == 1.0 or not place.tiny, f"{share:.1%} of the greedy codes are the peer's"
    drawn = {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.8}
    rows = [
        step_row(place, talker, count, pairs),
        compare(
            "codes/s of the loop, peer's generate",
            lambda: gpu.seconds(place, ours),
            lambda: gpu.seconds(place, lambda: peer.batched(**drawn)),
            goal=OVER_PEER,
            pairs=pairs,
            items=count * codes,
        ),
    ]
    return rows, [f"{count} requests; {share:.1%} of the greedy codes are the peer's"]


if __name__ == "__main__":
    gpu.run_main("Codes per second of the Talker.", measure)
