"""Samples as a training mixture has them, for measuring the plan: index rows, no media.

Two mixtures, each for packs of 8,192 tokens (stage 2) and 32,768 (stage 3, long sound and clips):

- `web`: tokens in the recipe's ratio, 800 pictures and clips : 300 sound : 100 clips with sound,
  and 20 % text. The planner's constants may be chosen on it.
- `dialogue`: other sources, other lengths (fixed sizes, spikes, several pictures to a sample) and
  another ratio, 30 : 20 : 10 and 40 % text. Nothing is chosen on it.

Lengths follow published figures:

    web pictures   smaller side log-normal, median 260, sigma 0.68: of 413 M pictures 51, 16 and
                   2.3 % have both sides of at least 256, 512 and 1,024 (LAION-400M)
    pages          A4 at 85 to 220 dpi
    clips          log-normal, median 11 s, mean 16: 8.5 s (Panda-70M), 11.7 s (InternVid), 17.5 s
                   (WebVid-10M) on average; the other mixture has the bins of LLaVA-Video-178K,
                   up to 30, 60, 120 and 180 s
    speech         log-normal, median 7 s, cut at 30: 5 to 12 s on average (Common Voice,
                   LibriSpeech); the other mixture has chunks of 30 s, as Whisper was trained on
    sound events   10 s each (AudioSet), with and without picture
    text           log-normal, mean 660 tokens (as FineWeb), some long documents; the other mixture
                   has a Pareto tail
    interleaved    2.5 pictures and 815 tokens on average (OBELICS)

Giants: clips are fitted to three quarters of the budget, as `video_rate=budget` does, pictures to
15/16 of it, sound goes up to 300 s at 8,192 tokens and 1,200 s at 32,768, and documents are cut
into pieces of the whole budget. What still has more tokens than a pack is left out and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from omni_train.data.measure import Costs, measure
from omni_train.data.plan import join_costs
from omni_train.data.types import (
    FrameRate,
    IndexRow,
    MediaInfo,
    MediaKind,
    ModelSpec,
    ProcessingConfig,
    SampleRef,
    SpecialTokens,
)

# Sizes of the released 7B model; ids play no part in measuring.
SPEC = ModelSpec(
    tokens=SpecialTokens(*range(9)),
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    window_size=112,
    num_mel_bins=128,
    audio_chunk_frames=200,
    positions_per_second=25,
    seconds_per_chunk=2,
)
STAGE_2_TOKENS = 8192
# A window of full packs has a little less than its budget, as the loader sees to.
FILL = 0.983
RATE_HZ = 16_000
FPS = 25.0
SIZES = ((640, 360), (854, 480), (1280, 720))
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Load:
    """The samples of a window.

    Args:
        refs: in stream order.
        costs: of the same samples.
        num_over: samples left out because they have more tokens than a pack.
    """

    refs: list[SampleRef]
    costs: Costs
    num_over: int


@dataclass(slots=True)
class Draw:
    """Random lengths.

    Args:
        rng: where they come from.
        budget: tokens of a pack.
        rest: pieces of a document that was cut, still to be given out.
    """

    rng: np.random.Generator
    budget: int
    rest: list[int] = field(default_factory=list)

    @property
    def long(self) -> bool:
        """Whether this is stage 3."""
        return self.budget > STAGE_2_TOKENS

    def lognormal(self, median: float, sigma: float, low: float, high: float) -> float:
        """Return a log-normal number, clipped."""
        return float(np.clip(self.rng.lognormal(np.log(median), sigma), low, high))

    def chance(self, share: float) -> bool:
        """Return true in so many of all cases."""
        return bool(self.rng.random() < share)

    def pieces(self, tokens: float) -> int:
        """Return the first piece of a document of so many tokens; `rest` has the others."""
        whole = int(tokens)
        self.rest += [self.budget] * (whole // self.budget)
        if whole % self.budget:
            self.rest.append(whole % self.budget)
        return self.rest.pop()


def _row(num_text_tokens: float, *media: MediaInfo) -> IndexRow:
    return IndexRow("", 0, 0, "", list(media), int(num_text_tokens), 0)


def _picture(width: float, height: float) -> MediaInfo:
    return MediaInfo(MediaKind.image, "", width=int(width), height=int(height), num_frames=1)


def _sound(seconds: float) -> MediaInfo:
    samples = int(seconds * RATE_HZ)
    return MediaInfo(
        MediaKind.audio, "", has_audio=True, num_audio_samples=samples, sample_rate_hz=RATE_HZ
    )


def _clip(seconds: float, size: tuple[int, int], *, sound: bool) -> MediaInfo:
    return MediaInfo(
        MediaKind.video,
        "",
        width=size[0],
        height=size[1],
        num_frames=max(int(seconds * FPS), 2),
        fps=FPS,
        has_audio=sound,
        num_audio_samples=int(seconds * RATE_HZ) if sound else 0,
        sample_rate_hz=RATE_HZ if sound else 0,
    )


def web_picture(draw: Draw) -> IndexRow:
    """Return a picture with its caption, or a page with its text."""
    if draw.chance(0.2):
        width = draw.rng.uniform(700, 1800)
        return _row(draw.lognormal(500, 0.7, 32, 3000), _picture(width, width * 1.414))
    side = draw.lognormal(260, 0.68, 64, 6000)
    other = side * np.exp(abs(draw.rng.normal(0, 0.45)))
    size = (side, other) if draw.chance(0.5) else (other, side)
    return _row(draw.lognormal(60, 0.8, 8, 1000), _picture(*size))


def web_clip(draw: Draw) -> IndexRow:
    """Return a clip without sound; in stage 3 half of them are long."""
    seconds = draw.lognormal(11, 0.9, 1, 180)
    if draw.long and draw.chance(0.5):
        seconds = draw.lognormal(90, 0.9, 10, 1200)
    size = SIZES[draw.rng.choice(3, p=(0.5, 0.25, 0.25))]
    return _row(draw.lognormal(100, 0.8, 8, 1000), _clip(seconds, size, sound=False))


def web_sound(draw: Draw) -> IndexRow:
    """Return speech with its transcript, a sound event, or a long recording."""
    if draw.chance(0.15):
        return _row(draw.lognormal(40, 0.6, 8, 300), _sound(10))
    seconds = draw.lognormal(7, 0.6, 0.5, 30)
    if draw.chance(0.1 if draw.long else 0.02):
        seconds = draw.lognormal(180, 0.8, 30, 1200 if draw.long else 300)
    # 150 words a minute.
    return _row(20 + 3.3 * seconds, _sound(seconds))


def web_clip_with_sound(draw: Draw) -> IndexRow:
    """Return a clip with its sound."""
    seconds = 10.0 if draw.chance(0.6) else draw.lognormal(25, 0.8, 3, 120)
    if draw.long and draw.chance(0.4):
        seconds = draw.lognormal(90, 0.8, 10, 600)
    size = SIZES[0 if draw.chance(0.7) else 2]
    return _row(draw.lognormal(80, 0.8, 8, 1000), _clip(seconds, size, sound=True))


def web_text(draw: Draw) -> IndexRow:
    """Return a document, or a piece of a long one."""
    if draw.rest:
        return _row(draw.rest.pop())
    if draw.chance(0.1 if draw.long else 0.03):
        return _row(draw.pieces(draw.lognormal(8000, 1.2, 500, 400_000)))
    return _row(draw.lognormal(400, 1.0, 16, draw.budget))


def dialogue_pictures(draw: Draw) -> IndexRow:
    """Return an interleaved document: pictures of a few fixed sizes, and text."""
    sizes = ((336, 336), (448, 336), (672, 672), (1344, 896), (1240, 1754))
    chosen = draw.rng.choice(5, min(draw.rng.geometric(0.4), 12), p=(0.3, 0.25, 0.25, 0.1, 0.1))
    return _row(draw.lognormal(640, 0.7, 32, 4000), *(_picture(*sizes[i]) for i in chosen))


def dialogue_clip(draw: Draw) -> IndexRow:
    """Return a clip with questions and answers."""
    ends = (1, 30, 60, 120, 180, 900)
    place = draw.rng.choice(5, p=(0.45, 0.2, 0.12, 0.08, 0.15) if draw.long else
                            (0.55, 0.2, 0.15, 0.1, 0.0))  # fmt: skip
    seconds = draw.rng.uniform(ends[place], ends[place + 1])
    return _row(draw.lognormal(300, 0.5, 32, 2000), _clip(seconds, SIZES[1], sound=False))


def dialogue_sound(draw: Draw) -> IndexRow:
    """Return a chunk of 30 s, a sound event, or a long recording."""
    place = draw.rng.choice(3, p=(0.7, 0.2, 0.1))
    long = draw.rng.uniform(30, 1000 if draw.long else 250)
    return _row(draw.lognormal(110, 0.4, 8, 400), _sound((30, 10, long)[place]))


def dialogue_clip_with_sound(draw: Draw) -> IndexRow:
    """Return a sound event that is seen, or a scene."""
    event = draw.chance(0.6)
    seconds = 10 if event else draw.rng.uniform(20, 240 if draw.long else 60)
    size = SIZES[0 if event else 1]
    return _row(draw.lognormal(150, 0.6, 16, 1000), _clip(seconds, size, sound=True))


def dialogue_text(draw: Draw) -> IndexRow:
    """Return a dialogue; a few are longer than a pack and are cut."""
    if draw.rest:
        return _row(draw.rest.pop())
    return _row(draw.pieces(min(120 * (1 + draw.rng.pareto(1.2)), 400_000)))


Source = Callable[[Draw], IndexRow]
# Shares of the tokens: in stage 3 clips have half of what pictures and clips have together.
MIXTURES: dict[str, Callable[[bool], dict[Source, float]]] = {
    "web": lambda long: {
        web_picture: 0.8 * 800 / 1200 * (0.5 if long else 0.75),
        web_clip: 0.8 * 800 / 1200 * (0.5 if long else 0.25),
        web_sound: 0.8 * 300 / 1200,
        web_clip_with_sound: 0.8 * 100 / 1200,
        web_text: 0.2,
    },
    "dialogue": lambda long: {
        dialogue_pictures: 0.15 if long else 0.2,
        dialogue_clip: 0.15 if long else 0.1,
        dialogue_sound: 0.2,
        dialogue_clip_with_sound: 0.1,
        dialogue_text: 0.4,
    },
}


def make_load(
    mixture: str, *, pack_tokens: int, packs_per_step: int, num_steps: int, seed: int
) -> Load:
    """Return the samples of a window of so many global steps, shuffled."""
    config = ProcessingConfig(
        image_max_pixels=min(pack_tokens * 15 // 16, 16_384) * 28 * 28,
        video_rate=FrameRate.budget,
        video_max_tokens=pack_tokens * 3 // 4,
    )
    total = FILL * pack_tokens * packs_per_step * num_steps
    parts, num_over = [], 0
    shares = MIXTURES[mixture](pack_tokens > STAGE_2_TOKENS)
    for number, (source, share) in enumerate(shares.items()):
        draw = Draw(np.random.default_rng([seed, number]), pack_tokens)
        given = 0
        for costs in _chunks(source, draw, config):
            fits = costs.num_tokens <= pack_tokens
            ends = given + np.cumsum(costs.num_tokens * fits)
            used = (ends <= share * total).nonzero()[0]
            num_over += int((~fits[used]).sum())
            parts.append(_rows(costs, used[fits[used]]))
            given = int(ends[-1])
            if given > share * total:
                break
    costs = join_costs(parts)
    order = np.random.default_rng([seed, 99]).permutation(len(costs.num_tokens))
    return Load([SampleRef(0, 0, i) for i in range(len(order))], _rows(costs, order), num_over)


def _chunks(source: Source, draw: Draw, config: ProcessingConfig) -> Iterator[Costs]:
    while True:
        yield measure([source(draw) for _ in range(_CHUNK)], config, SPEC)


def _rows(costs: Costs, rows: np.ndarray) -> Costs:
    return Costs(
        num_tokens=costs.num_tokens[rows],
        vision_cost=costs.vision_cost[rows],
        audio_cost=costs.audio_cost[rows],
        llm_cost=costs.llm_cost[rows],
    )
