"""Pictures of one coloured shape, 84 x 84 pixels, drawn by Pillow; the same for the same number.

Small displacements, sizes and backgrounds differ from picture to picture, so that a caption is
learned from shapes, not from exact pixels. Sides are a multiple of 28 px: nothing is resized.
"""

from __future__ import annotations

import io
import random

from PIL import Image, ImageDraw

from data_pipelines.demo_content import COLORS, PLACES, Scene

SIDE = 84
_OVERSAMPLING = 4
_RADIUS = {"small": 13.0, "large": 24.0}
_STEP = {"small": 24.0, "large": 13.0}
_JITTER = 2.5
_BACKGROUNDS = (16, 32, 48, 64)


def draw_scene(scene: Scene, rng: random.Random, *, shift_px: float = 0.0) -> Image.Image:
    """Draw a scene, RGB [84, 84].

    Args:
        scene: what is drawn.
        rng: moves, scales and backs it slightly.
        shift_px: further to the right by so much, for shapes that move.
    """
    radius = _RADIUS[scene.size] * rng.uniform(0.92, 1.08)
    across, down = PLACES[scene.place]
    step = _STEP[scene.size]
    x = SIDE / 2 + across * step + rng.uniform(-_JITTER, _JITTER) + shift_px
    y = SIDE / 2 + down * step + rng.uniform(-_JITTER, _JITTER)
    grey = rng.choice(_BACKGROUNDS)
    return _draw(scene.shape, COLORS[scene.color], (x, y), radius, (grey, grey, grey))


def png(picture: Image.Image) -> bytes:
    """Encode losslessly; no date and no version are written."""
    sink = io.BytesIO()
    picture.save(sink, format="PNG")
    return sink.getvalue()


def _draw(
    shape: str,
    color: tuple[int, int, int],
    center: tuple[float, float],
    radius: float,
    background: tuple[int, int, int],
) -> Image.Image:
    # Drawn larger and reduced: Pillow's drawing has no antialiasing of its own.
    scale = _OVERSAMPLING
    canvas = Image.new("RGB", (SIDE * scale, SIDE * scale), background)
    draw = ImageDraw.Draw(canvas)
    x, y, r = center[0] * scale, center[1] * scale, radius * scale
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "square":
        half = 0.95 * r
        draw.rectangle((x - half, y - half, x + half, y + half), fill=color)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], fill=color)
    elif shape == "cross":
        arm = 0.3 * r
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=color)
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=color)
    else:
        raise ValueError(f"no drawing for a {shape}")
    return canvas.resize((SIDE, SIDE), Image.Resampling.BOX)
