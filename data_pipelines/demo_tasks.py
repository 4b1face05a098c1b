"""Samples of the demo corpus as plans: dialogue, facts, and what its media are rendered from.

    text      words stuttered or asked for, shapes and clips in words -> the reply of the media task
    asr       speech of 1 to 3 words -> the words
    caption   picture of one shape -> `a large red circle`
    av        clip -> what was shown, what was said, what was shown when a word was said

Dialogues of several turns are demo_dialogue.py's.
The text tasks end in the wordings of the media tasks, so that a frozen language model knows each
reply's form. A sample's wording follows from its key. `meta` lists the content that the split is
about: `words`, `scenes`. Not done here: sound, pixels, files.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice, product
from typing import Any

from data_pipelines.clips import FRAME_RATES, ClipPlan, Sound, plan_clip
from data_pipelines.demo_content import (
    MAX_WORDS,
    Scene,
    Split,
    draw_words,
    pick,
    scenes,
    word_sequences,
)

ASR_PROMPTS = (
    "Write down the words.",
    "What is said here?",
    "Transcribe the speech.",
    "Which words do you hear?",
)
CAPTION_PROMPTS = (
    "Describe the picture.",
    "What does the picture show?",
    "What can you see here?",
    "Give a caption for this.",
)
SHOWN_PROMPTS = (
    "What is shown, in order?",
    "Name the shapes one after the other.",
    "What appears in the clip?",
)
SAID_PROMPTS = (
    "Which words are said in the clip?",
    "What does the voice say?",
    "Write down what the speaker says.",
)
WHEN_PROMPTS = (
    "What is shown when the voice says {word}?",
    "Which shape do you see while {word} is said?",
    "The voice says {word}. What is on the screen then?",
)
SAY_PROMPTS = (
    "Say {words}.",
    "Please say: {words}",
    "Repeat after me: {words}",
    "Read this aloud: {words}",
)
NOTHING_SAID = "nothing is said"
_FILLERS = ("um", "er", "well", "hmm")
# Share of 1, 2 and 3 words; there are few different single words.
_LENGTH_SHARES = (0.06, 0.40, 0.54)
_SOUNDS = (Sound.full, Sound.none, Sound.full, Sound.shorter, Sound.full, Sound.longer)


@dataclass(frozen=True, slots=True)
class Speech:
    """A wav of `text` spoken by `voice`."""

    text: str
    voice: str


@dataclass(frozen=True, slots=True)
class Picture:
    """A png of a scene; `number` seeds the small differences."""

    scene: Scene
    number: int


MediaPlan = Speech | Picture | ClipPlan


@dataclass(slots=True)
class SamplePlan:
    """A sample whose media are still to be rendered, by member name."""

    key: str
    record: dict[str, Any]
    media: dict[str, MediaPlan] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What every planner needs: how many, from which side, in which voices, from which seed."""

    count: int
    split: Split
    voices: tuple[str, ...]
    seed: int

    def rng(self, subset: str) -> random.Random:
        """Return a generator of its own for a subset, so that the size of one changes no other."""
        return random.Random(f"{self.seed} {subset} {self.split.name}")

    def keys(self, subset: str) -> list[str]:
        """Sample keys."""
        return [f"{subset}-{self.split.name}-{number:06d}" for number in range(self.count)]


def plan_text(recipe: Recipe) -> Iterator[SamplePlan]:
    """Plain text: three of five repeat words, one in four describes a picture, the rest a clip."""
    rng = recipe.rng("text")
    for key in recipe.keys("text"):
        share = rng.random()
        if share < 0.15:
            yield _text_say(key, rng, recipe)
        elif share < 0.6:
            yield _text_copy(key, rng, recipe)
        elif share < 0.85:
            yield _text_caption(key, rng, recipe)
        else:
            yield _text_clip(key, rng, recipe)


def plan_asr(recipe: Recipe) -> Iterator[SamplePlan]:
    """Speech; a pair of word sequence and voice comes once as long as there are others."""
    drawn = draw_utterances(recipe, "asr", _LENGTH_SHARES, recipe.voices)
    for key, (words, voice) in zip(recipe.keys("asr"), drawn, strict=True):
        text = " ".join(words)
        messages = [user_message(("audio", "0.wav"), pick(ASR_PROMPTS, key)), reply_message(text)]
        meta = {"words": [text], "scenes": []}
        yield SamplePlan(
            key, sample_record(messages, "asr", meta, voice), {"0.wav": Speech(text, voice)}
        )


def draw_utterances(
    recipe: Recipe, subset: str, shares: tuple[float, ...], voices: tuple[str, ...]
) -> list[tuple[tuple[str, ...], str]]:
    """Draw words and voice of each sample; a pair comes once as long as there are others.

    Args:
        recipe, subset: how many, and whose generator.
        shares: of 1, 2 and 3 words.
        voices: every one as often as any other.
    """
    rng = recipe.rng(subset)
    drawn: list[tuple[tuple[str, ...], str]] = []
    for length, share in enumerate(shares, 1):
        pairs = list(product(word_sequences(length, recipe.split, recipe.seed), voices))
        rng.shuffle(pairs)
        wanted = recipe.count - len(drawn) if length == MAX_WORDS else round(share * recipe.count)
        drawn += islice(cycle(pairs), wanted)
    rng.shuffle(drawn)
    return drawn


def plan_caption(recipe: Recipe) -> Iterator[SamplePlan]:
    """Pictures; every scene of the side comes equally often."""
    rng = recipe.rng("caption")
    pool = list(scenes(recipe.split, recipe.seed))
    rng.shuffle(pool)
    for key, scene in zip(recipe.keys("caption"), cycle(pool), strict=False):
        messages = [
            user_message(("image", "0.png"), pick(CAPTION_PROMPTS, key)),
            reply_message(scene.caption),
        ]
        meta = {"words": [], "scenes": [scene.content]}
        media: dict[str, MediaPlan] = {"0.png": Picture(scene, rng.getrandbits(32))}
        yield SamplePlan(key, sample_record(messages, "caption", meta), media)


def plan_av(recipe: Recipe) -> Iterator[SamplePlan]:
    """Clips; 24 in a row have every frame rate with every layout of the sound.

    A training clip is asked everything there is to ask of it, in turns; a held-out one is asked one
    thing, so that no earlier turn gives anything away.
    """
    rng = recipe.rng("av")
    for number, key in enumerate(recipe.keys("av")):
        plan = plan_clip(
            rng,
            fps=FRAME_RATES[number % len(FRAME_RATES)],
            sound=_SOUNDS[number // len(FRAME_RATES) % len(_SOUNDS)],
            voice=recipe.voices[rng.randrange(len(recipe.voices))],
            split=recipe.split,
            seed=recipe.seed,
        )
        names = [slot.scene.name for slot in plan.slots]
        heard = [(said.word, names[said.slot]) for said in plan.spoken if said.slot >= 0]
        kinds = _clip_kinds(heard)
        rng.shuffle(kinds)
        asked = kinds if recipe.split is Split.train else kinds[:1]
        messages: list[dict[str, Any]] = []
        for kind in asked:
            words = [s.word for s in plan.spoken]
            prompt, answer = _clip_question(key, kind, rng, names, words, heard)
            clip = [] if messages else [("video", "0.mp4")]
            messages += [user_message(*clip, prompt), reply_message(answer)]
        meta = {"questions": asked, **_schedule(plan)}
        yield SamplePlan(key, sample_record(messages, "av", meta, plan.voice), {"0.mp4": plan})


def stutter(words: tuple[str, ...], rng: random.Random) -> str:
    """Say each word one to six times, with fillers before, between and after."""
    said: list[str] = []
    for word in words:
        for _ in range(rng.randint(1, 6)):
            if rng.random() < 0.25:
                said.append(rng.choice(_FILLERS))
            said.append(word)
    return " ".join(said)


def _text_copy(key: str, rng: random.Random, recipe: Recipe) -> SamplePlan:
    words = draw_words(rng, rng.randint(1, 4), recipe.split, recipe.seed)
    prompt = pick(ASR_PROMPTS, key)
    messages = [user_message(f"{stutter(words, rng)}\n{prompt}"), reply_message(" ".join(words))]
    meta = {"words": [" ".join(words)], "scenes": []}
    return SamplePlan(key, sample_record(messages, "text_copy", meta))


def _text_say(key: str, rng: random.Random, recipe: Recipe) -> SamplePlan:
    text = " ".join(draw_words(rng, rng.randint(1, 4), recipe.split, recipe.seed))
    messages = [user_message(say_prompt(key, text)), reply_message(text)]
    return SamplePlan(key, sample_record(messages, "text_say", {"words": [text], "scenes": []}))


def say_prompt(key: str, text: str) -> str:
    """Return a request for a spoken reply, as the language model knows it from plain text."""
    return pick(SAY_PROMPTS, key).format(words=text)


def _text_caption(key: str, rng: random.Random, recipe: Recipe) -> SamplePlan:
    scene = rng.choice(scenes(recipe.split, recipe.seed))
    facts = [scene.size, scene.color, scene.shape, scene.place]
    rng.shuffle(facts)
    prompt = pick(CAPTION_PROMPTS, key)
    messages = [
        user_message(f"{stutter(tuple(facts), rng)}\n{prompt}"),
        reply_message(scene.caption),
    ]
    meta = {"words": [], "scenes": [scene.content]}
    return SamplePlan(key, sample_record(messages, "text_caption", meta))


def _text_clip(key: str, rng: random.Random, recipe: Recipe) -> SamplePlan:
    """Write a clip as the sequence that the model will read: what is seen, then what is heard."""
    shown = [rng.choice(scenes(recipe.split, recipe.seed)) for _ in range(rng.randint(3, 4))]
    words: tuple[str, ...] = ()
    if rng.random() < 0.8:
        words = draw_words(rng, rng.randint(2, 3), recipe.split, recipe.seed)
    places = sorted(rng.sample(range(len(shown)), len(words)))
    said = dict(zip(places, words, strict=True))
    parts = []
    for place, scene in enumerate(shown):
        seen = " ".join([scene.name] * rng.randint(1, 3))
        parts.append(f"{seen} {stutter((said[place],), rng)}" if place in said else seen)
    names = [scene.name for scene in shown]
    heard = [(word, names[place]) for place, word in said.items()]
    kind = rng.choice(_clip_kinds(heard))
    prompt, answer = _clip_question(key, kind, rng, names, list(words), heard)
    messages = [user_message(f"{', '.join(parts)}\n{prompt}"), reply_message(answer)]
    meta = {
        "questions": [kind],
        "words": [" ".join(words)] if words else [],
        "scenes": [scene.content for scene in shown],
    }
    return SamplePlan(key, sample_record(messages, "text_clip", meta))


def _clip_kinds(heard: list[tuple[str, str]]) -> list[str]:
    """Kinds of questions that a clip can be asked."""
    return ["shown", "said", "when"] if heard else ["shown", "said"]


def _clip_question(
    key: str,
    kind: str,
    rng: random.Random,
    names: list[str],
    words: list[str],
    heard: list[tuple[str, str]],
) -> tuple[str, str]:
    """Return prompt and answer; `heard` pairs words with the shape shown meanwhile."""
    if kind == "shown":
        return pick(SHOWN_PROMPTS, key), ", ".join(names)
    if kind == "said":
        return pick(SAID_PROMPTS, key), " ".join(words) or NOTHING_SAID
    word, name = rng.choice(heard)
    return pick(WHEN_PROMPTS, key).format(word=word), name


def _schedule(plan: ClipPlan) -> dict[str, Any]:
    """Facts of a clip, times in seconds from the first frame."""
    words = " ".join(said.word for said in plan.spoken)
    return {
        "words": [words] if words else [],
        "scenes": [slot.scene.content for slot in plan.slots],
        "fps": float(plan.fps),
        "sound": plan.sound.name,
        "video_s": plan.video_s,
        "audio_s": plan.audio_s,
        "slots": [
            {"color": s.scene.color, "shape": s.scene.shape, "start_s": s.start_s, "end_s": s.end_s}
            for s in plan.slots
        ],
        "spoken": [
            {"word": s.word, "start_s": s.start_s, "end_s": s.end_s, "slot": s.slot}
            for s in plan.spoken
        ],
    }


def user_message(*items: tuple[str, str] | str) -> dict[str, Any]:
    """Return a turn of text and of media, each (kind, member)."""
    typed = [("text", item) if isinstance(item, str) else item for item in items]
    return {"role": "user", "content": [{"type": kind, kind: value} for kind, value in typed]}


def reply_message(text: str, speech: str = "") -> dict[str, Any]:
    """Return a turn of the assistant; `speech` is the member that says it."""
    content = [{"type": "text", "text": text}]
    if speech:
        content.append({"type": "speech", "speech": speech})
    return {"role": "assistant", "content": content}


def sample_record(
    messages: list[dict[str, Any]], task: str, meta: dict[str, Any], voice: str = ""
) -> dict[str, Any]:
    """Return the JSON member of a sample."""
    return {
        "messages": messages,
        "task": task,
        "language": "en",
        "speaker": voice,
        "source": "demo",
        "meta": meta,
    }


def texts_of(record: dict[str, Any]) -> list[str]:
    """All text of a dialogue with the names of its roles, for the tokenizer."""
    texts = []
    for turn in record["messages"]:
        texts.append(f"{turn['role']}\n")
        texts += [item["text"] for item in turn["content"] if item["type"] == "text"]
    return texts
