"""What the demo corpus's worker processes do: media from plans, and how well a voice is understood.

Imports neither torch nor transformers, so that a worker starts in a fraction of a second.
"""

from __future__ import annotations

import io
import random
from functools import lru_cache

import jiwer
import soundfile

from data_pipelines.clips import ClipPlan, render_clip
from data_pipelines.demo_content import VOCABULARY
from data_pipelines.demo_tasks import MediaPlan, Picture, Speech
from data_pipelines.pictures import draw_scene, png
from data_pipelines.voices import SAMPLE_RATE_HZ, speak
from omni_train.speech.asr import PocketSphinxRecognizer


def render_media(plans: dict[str, MediaPlan]) -> dict[str, bytes]:
    """Render the media of one sample, by member name."""
    return {member: _render(plan) for member, plan in plans.items()}


def measure_voice(voice: str, texts: list[str]) -> float:
    """Word error rate of PocketSphinx on `texts` spoken by `voice`, before any codec or model."""
    recognizer = _recognizer()
    heard = [recognizer.transcribe(speak(text, voice)).text for text in texts]
    return float(jiwer.wer(texts, heard))


def _render(plan: MediaPlan) -> bytes:
    if isinstance(plan, ClipPlan):
        return render_clip(plan)
    if isinstance(plan, Picture):
        return png(draw_scene(plan.scene, random.Random(plan.number)))
    assert isinstance(plan, Speech), plan
    sink = io.BytesIO()
    wave = speak(plan.text, plan.voice)
    soundfile.write(sink, wave, SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    return sink.getvalue()


@lru_cache(maxsize=1)
def _recognizer() -> PocketSphinxRecognizer:
    return PocketSphinxRecognizer(VOCABULARY)
