"""Clips of the demo corpus: what is shown and said when, and the mp4 with H.264 and AAC of it.

    plan_clip    rng -> ClipPlan: slots of one shape each, words said inside slots, sound layout
    render_clip  ClipPlan -> mp4 bytes

All times of a plan are on the clip's own clock, in seconds from its first frame. Slots last whole
frames, so a plan's times are exact at every frame rate. A word lies inside one slot.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from functools import lru_cache
from math import ceil, floor

import av
import numpy as np
from numpy.typing import NDArray

from data_pipelines.demo_content import Scene, Split, draw_words, scenes
from data_pipelines.pictures import SIDE, draw_scene
from data_pipelines.voices import SAMPLE_RATE_HZ, speak

FRAME_RATES = (Fraction(1), Fraction(2), Fraction(5, 2), Fraction(4))
_SHORTEST_SLOT_S = 0.9
_LONGEST_SLOT_S = 1.6
_GAP_S = 0.05
_DRIFT_PX = 6.0
_AAC_BITS_PER_SECOND = 48_000


class Sound(Enum):
    """How the sound lies to the picture."""

    full = "full"
    none = "none"
    shorter = "shorter"
    longer = "longer"


@dataclass(frozen=True, slots=True)
class Slot:
    """One scene on screen from `start_s` to `end_s`."""

    scene: Scene
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Spoken:
    """One word; `slot` is the number of the slot it is said in, -1 behind the last frame."""

    word: str
    start_s: float
    end_s: float
    slot: int


@dataclass(frozen=True, slots=True)
class ClipPlan:
    """All there is to know of a clip.

    Args:
        fps: frames per second.
        slots: in order, without gaps.
        spoken: in order; empty without sound.
        sound: layout of the sound.
        audio_s: length of the sound; 0 without sound.
        voice: of the speaker; empty without sound.
        number: seed of the small differences between pictures.
    """

    fps: Fraction
    slots: tuple[Slot, ...]
    spoken: tuple[Spoken, ...]
    sound: Sound
    audio_s: float
    voice: str
    number: int

    @property
    def video_s(self) -> float:
        """Length of the picture."""
        return self.slots[-1].end_s

    @property
    def content(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What makes two clips the same in content: scenes in order, words in order."""
        return tuple(str(s.scene) for s in self.slots), tuple(s.word for s in self.spoken)


@lru_cache(maxsize=512)
def word_wave(word: str, voice: str) -> NDArray[np.float32]:
    """Return one spoken word, float32 [S] at 16 kHz."""
    return speak(word, voice)


def plan_clip(
    rng: random.Random, *, fps: Fraction, sound: Sound, voice: str, split: Split, seed: int
) -> ClipPlan:
    """Plan a clip of 4 or 5 slots with 2 or 3 words.

    Args:
        rng: source of all choices.
        fps: one of FRAME_RATES.
        sound: layout of the sound.
        voice: who speaks.
        split: side from which word sequence and scenes are taken.
        seed: of the corpus, which decides the sides.
    """
    slots = _plan_slots(rng, fps, split, seed)
    number = rng.getrandbits(32)
    if sound is Sound.none:
        return ClipPlan(fps, slots, (), sound, 0.0, "", number)
    # Shorter sound ends with the last slot but one, longer sound says one word behind the picture.
    usable = list(range(len(slots) - 1 if sound is Sound.shorter else len(slots)))
    chosen = sorted(rng.sample(usable, rng.randint(2, 3)))
    if sound is Sound.longer:
        chosen[-1] = -1
    words = draw_words(rng, len(chosen), split, seed)
    video_s = slots[-1].end_s
    spoken = []
    for word, place in zip(words, chosen, strict=True):
        length_s = len(word_wave(word, voice)) / SAMPLE_RATE_HZ
        begin_s, end_s = (video_s, video_s + 1.2)
        if place >= 0:
            begin_s, end_s = slots[place].start_s, slots[place].end_s
        latest_s = max(begin_s + _GAP_S, end_s - length_s - _GAP_S)
        # On a sample, so that the written times are those of the sound.
        start = round(rng.uniform(begin_s + _GAP_S, latest_s) * SAMPLE_RATE_HZ)
        spoken.append(Spoken(word, *_times(start, len(word_wave(word, voice))), place))
    audio_s = {
        Sound.full: video_s,
        Sound.shorter: slots[-2].end_s,
        Sound.longer: video_s + 1.25,
    }[sound]
    return ClipPlan(fps, slots, tuple(spoken), sound, audio_s, voice, number)


def render_clip(plan: ClipPlan) -> bytes:
    """Encode a plan as mp4: H.264, and AAC at 16 kHz mono where there is sound."""
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=plan.fps)
        video.width = video.height = SIDE
        video.pix_fmt = "yuv420p"
        # One thread and no scene detection: the same bytes on every machine; a key frame a second.
        video.thread_count = 1
        video.options = {"preset": "veryfast", "crf": "18", "sc_threshold": "0"}
        video.gop_size = max(1, ceil(plan.fps))
        audio = None
        if plan.sound is not Sound.none:
            audio = container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="mono")
            audio.bit_rate = _AAC_BITS_PER_SECOND
            audio.options = {"aac_coder": "fast"}
        for picture in _pictures(plan):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        if audio is not None:
            frame = av.AudioFrame.from_ndarray(_wave(plan)[None], format="fltp", layout="mono")
            frame.sample_rate = SAMPLE_RATE_HZ
            # From time 0, so that the encoder's priming lies before it and the edit list says so.
            frame.time_base, frame.pts = Fraction(1, SAMPLE_RATE_HZ), 0
            container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return sink.getvalue()


def _plan_slots(rng: random.Random, fps: Fraction, split: Split, seed: int) -> tuple[Slot, ...]:
    fewest, most = ceil(_SHORTEST_SLOT_S * fps), max(1, floor(_LONGEST_SLOT_S * fps))
    pool = scenes(split, seed)
    slots: list[Slot] = []
    frame = 0
    for _ in range(rng.randint(4, 5)):
        # Neighbours differ in colour and shape, so that the change can be seen.
        scene = rng.choice(pool)
        while slots and scene.name == slots[-1].scene.name:
            scene = rng.choice(pool)
        last = frame + rng.randint(fewest, max(fewest, most))
        slots.append(Slot(scene, float(frame / fps), float(last / fps)))
        frame = last
    return tuple(slots)


def _pictures(plan: ClipPlan) -> list[NDArray[np.uint8]]:
    """Frames, uint8 [84, 84, 3]; a slot's shape drifts a little while it is shown."""
    pictures = []
    for place, slot in enumerate(plan.slots):
        num_frames = round((slot.end_s - slot.start_s) * plan.fps)
        for frame in range(num_frames):
            # The same generator for all frames of a slot: only the drift differs between them.
            rng = random.Random(plan.number + place)
            shift_px = _DRIFT_PX * (frame / num_frames - 0.5)
            pictures.append(np.asarray(draw_scene(slot.scene, rng, shift_px=shift_px)))
    return pictures


def _wave(plan: ClipPlan) -> NDArray[np.float32]:
    """Sound of the whole clip, float32 [S] at 16 kHz; silence between the words."""
    wave = np.zeros(round(plan.audio_s * SAMPLE_RATE_HZ), np.float32)
    for said in plan.spoken:
        word = word_wave(said.word, plan.voice)
        start = round(said.start_s * SAMPLE_RATE_HZ)
        wave[start : start + len(word)] += word
    return wave


def _times(start: int, num_samples: int) -> tuple[float, float]:
    return start / SAMPLE_RATE_HZ, (start + num_samples) / SAMPLE_RATE_HZ
