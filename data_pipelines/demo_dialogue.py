"""Dialogues of the demo corpus, as plans: several turns, and questions by voice and in writing.

    dialogue  two or three turns about a text, a picture, speech, a clip with sound, or several
    question  picture and questions about it, spoken or written; the held-out ones in both ways

Not done here: sound, pixels, files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_pipelines.clips import FRAME_RATES, Sound, plan_clip
from data_pipelines.demo_content import SIZES, Scene, Split, draw_words, pick, scenes
from data_pipelines.demo_tasks import (
    ASR_PROMPTS,
    CAPTION_PROMPTS,
    NOTHING_SAID,
    SAID_PROMPTS,
    SHOWN_PROMPTS,
    MediaPlan,
    Picture,
    Recipe,
    SamplePlan,
    Speech,
    reply_message,
    sample_record,
    stutter,
    user_message,
)

# What is asked of a picture -> wordings; the answer is the scene's value.
QUESTIONS = {
    "color": ("What colour is it?", "Which colour does it have?"),
    "shape": ("What shape is it?", "Which shape do you see?"),
    "size": ("Is it small or large?", "How big is it?"),
    "place": ("Where is it?", "In which place is it?"),
}
_QUESTIONS_PER_PICTURE = 3
_SOUNDS = (Sound.full, Sound.none, Sound.shorter, Sound.full, Sound.longer, Sound.full)


class _Draft:
    """A dialogue that grows turn by turn."""

    def __init__(self, key: str, number: int, recipe: Recipe, subset: str) -> None:
        self.key, self.number, self.recipe = key, number, recipe
        self.rng = recipe.rng(f"{subset} {number}")
        self.voice = recipe.voices[self.rng.randrange(len(recipe.voices))]
        self.messages: list[dict[str, Any]] = []
        self.media: dict[str, MediaPlan] = {}
        self.words: list[str] = []
        self.scenes: list[Scene] = []
        self.voiced = False

    def draw_words(self) -> tuple[str, ...]:
        """Draw two or three words."""
        return draw_words(self.rng, self.rng.randint(2, 3), self.recipe.split, self.recipe.seed)

    def add(self, suffix: str, medium: MediaPlan) -> str:
        """Add a medium and return its member."""
        member = f"{len(self.media)}{suffix}"
        self.media[member] = medium
        return member

    def picture(self) -> tuple[Scene, str]:
        """Add a picture; return its scene and member."""
        scene = self.rng.choice(scenes(self.recipe.split, self.recipe.seed))
        self.scenes.append(scene)
        return scene, self.add(".png", Picture(scene, self.rng.getrandbits(32)))

    def show(self) -> Scene:
        """Add a turn with a picture and its caption."""
        scene, member = self.picture()
        self.ask(pick(CAPTION_PROMPTS, f"{self.key} {member}"), scene.caption, ("image", member))
        return scene

    def say(self, words: tuple[str, ...]) -> None:
        """Add a turn with speech and its words."""
        text = " ".join(words)
        member = self.add(".wav", Speech(text, self.voice))
        self.words.append(text)
        self.voiced = True
        self.ask(pick(ASR_PROMPTS, f"{self.key} {member}"), text, ("audio", member))

    def write(self, words: tuple[str, ...]) -> None:
        """Add a turn with stuttered words and the words."""
        prompt = pick(ASR_PROMPTS, f"{self.key} text")
        self.words.append(" ".join(words))
        self.ask(f"{stutter(words, self.rng)}\n{prompt}", " ".join(words))

    def ask(self, question: str, answer: str, *media: tuple[str, str]) -> None:
        """Add a turn."""
        self.messages += [user_message(*media, question), reply_message(answer)]

    def ask_of(self, scene: Scene, count: int) -> None:
        """Add questions about a scene that was shown."""
        for about in self.rng.sample(sorted(QUESTIONS), count):
            self.put(about, scene, [], by_voice=False)

    def put(
        self, about: str, scene: Scene, media: list[tuple[str, str]], *, by_voice: bool
    ) -> None:
        """Add a question about a scene, spoken or written."""
        question = QUESTIONS[about][self.rng.randrange(len(QUESTIONS[about]))]
        answer = reply_message(getattr(scene, about))
        if by_voice:
            heard = ("audio", self.add(".wav", Speech(question, self.voice)))
            self.messages += [user_message(*media, heard), answer]
            self.voiced = True
        else:
            self.messages += [user_message(*media, question), answer]

    def ask_word(self, words: tuple[str, ...]) -> None:
        """Ask for the first or the last of several words."""
        first = self.rng.random() < 0.5
        self.ask(f"What was the {'first' if first else 'last'} word?", words[0 if first else -1])

    def plan(self, task: str, **meta: Any) -> SamplePlan:
        """Return the sample."""
        meta = {"words": self.words, "scenes": [scene.content for scene in self.scenes], **meta}
        voice = self.voice if self.voiced else ""
        return SamplePlan(
            self.key, sample_record(self.messages, task, meta, voice), dict(self.media)
        )


def plan_dialogue(recipe: Recipe) -> Iterator[SamplePlan]:
    """Dialogues of two or three turns; the kinds come in turn."""
    kinds = {
        "text": _about_text,
        "picture": _about_picture,
        "speech": _about_speech,
        "clip": _about_clip,
        "picture and speech": _about_both,
        "two pictures": _about_two_pictures,
    }
    for number, key in enumerate(recipe.keys("dialogue")):
        kind = list(kinds)[number % len(kinds)]
        draft = _Draft(key, number, recipe, "dialogue")
        kinds[kind](draft)
        yield draft.plan("dialogue", group=kind)


def plan_question(recipe: Recipe) -> Iterator[SamplePlan]:
    """Questions about a picture, spoken and written.

    In training several to a picture, each in either way. Held out is one to a picture, and every
    one comes in both ways: nothing but the voice differs.
    """
    paired = recipe.split is Split.heldout
    for number, key in enumerate(recipe.keys("question")):
        draft = _Draft(key, number // 2 if paired else number, recipe, "question")
        scene, member = draft.picture()
        if paired:
            spoken = [number % 2 == 0]
            asked = [sorted(QUESTIONS)[draft.number % len(QUESTIONS)]]
        else:
            asked = draft.rng.sample(sorted(QUESTIONS), _QUESTIONS_PER_PICTURE)
            spoken = [draft.rng.random() < 0.5 for _ in asked]
        for turn, (about, by_voice) in enumerate(zip(asked, spoken, strict=True)):
            media = [("image", member)] if turn == 0 else []
            draft.put(about, scene, media, by_voice=by_voice)
        group = {True: "voice", False: "text"}[spoken[0]] if paired else ""
        yield draft.plan("question", group=group, about=asked)


def _about_text(draft: _Draft) -> None:
    words = draft.draw_words()
    draft.write(words)
    draft.ask_word(words)


def _about_picture(draft: _Draft) -> None:
    scene = draft.show()
    draft.ask_of(scene, 3)


def _about_speech(draft: _Draft) -> None:
    words = draft.draw_words()
    draft.say(words)
    draft.ask_word(words)


def _about_clip(draft: _Draft) -> None:
    """Ask what was shown, then what was said; some clips are silent, some sounds end apart."""
    recipe, turn = draft.recipe, draft.number // 6
    clip = plan_clip(
        draft.rng,
        fps=FRAME_RATES[turn % len(FRAME_RATES)],
        sound=_SOUNDS[turn // len(FRAME_RATES) % len(_SOUNDS)],
        voice=draft.voice,
        split=recipe.split,
        seed=recipe.seed,
    )
    member = draft.add(".mp4", clip)
    draft.scenes += [slot.scene for slot in clip.slots]
    said = " ".join(spoken.word for spoken in clip.spoken)
    draft.words += [said] if said else []
    draft.voiced = bool(said)
    shown = ", ".join(slot.scene.name for slot in clip.slots)
    draft.ask(pick(SHOWN_PROMPTS, draft.key), shown, ("video", member))
    draft.ask(pick(SAID_PROMPTS, draft.key), said or NOTHING_SAID)


def _about_both(draft: _Draft) -> None:
    scene = draft.show()
    draft.say(draft.draw_words())
    draft.ask_of(scene, 1)


def _about_two_pictures(draft: _Draft) -> None:
    first, second = draft.show(), draft.show()
    order = SIZES.index(first.size) - SIZES.index(second.size)
    answers = {-1: "the second one", 0: "both are the same size", 1: "the first one"}
    draft.ask("Which picture has the larger shape?", answers[order])
