"""The part of the token timeline that shows one medium: pictures, sound and tokens in time."""

from __future__ import annotations

from math import ceil

import numpy as np
from numpy.typing import NDArray

from data_pipelines.timeline_data import MediumView, TokenKind
from data_pipelines.timeline_draw import Box, Drawing, Label, Line, Raster, text_width
from data_pipelines.timeline_style import (
    BAND,
    BORDER,
    COLORS,
    FAINT,
    INK,
    LEFT,
    MUTED,
    NARROWEST_BLOCK,
    PLOT,
    Scale,
    axis_name,
    heading,
    round_steps,
    row_name,
)
from omni_train.data.types import MediaKind
from omni_train.speech.mel import HOP_SAMPLES, SAMPLE_RATE_HZ

_THUMB_HEIGHT = 96
_WAVE_HEIGHT = 76
_MEL_HEIGHT = 96
_IMAGE_HEIGHT = 220
_IMAGE_WIDTH = 560
_MAX_COLUMNS = 2 * PLOT
# Tokens narrower than so many pixels are not told apart.
_NARROWEST = 2.0
# From quiet to loud: dark blue, violet, orange, pale yellow; lightness rises all the way.
_HEAT = np.array(
    [(12, 12, 60), (80, 20, 120), (180, 50, 100), (240, 130, 50), (253, 240, 170)], dtype=np.float64
)


def draw_medium(
    drawing: Drawing, view: MediumView, y: float, *, number: int, token_s: float
) -> float:
    """Draw one medium; return where the next section starts.

    Args:
        drawing: where it goes.
        view: the medium.
        y: top.
        number: of the medium in the dialogue, from 1.
        token_s: length of one sound token.
    """
    y = heading(drawing, f"Medium {number}: {_describe(view)}", y)
    if view.info.kind is MediaKind.image:
        return _draw_image(drawing, view, y)
    scale = Scale(0.0, view.duration_s)
    y = _draw_blocks(drawing, view, scale, y)
    top = y
    if view.frames:
        y = _draw_frames(drawing, view, scale, y)
    if len(view.wave):
        y = _draw_sound(drawing, view, scale, y)
    y = _draw_tokens(drawing, view, scale, y, token_s=token_s)
    narrow = scale(view.block_s) - scale(0) < NARROWEST_BLOCK
    for edge in [] if narrow else block_borders(view):
        x = scale(edge)
        drawing.add(Line(((x, top), (x, y)), BORDER, 1.2, name=f"border:{edge:g}"))
    for tick in round_steps(view.duration_s, 12):
        drawing.add(Line(((scale(tick), y), (scale(tick), y + 5)), MUTED))
        drawing.add(Label(scale(tick), y + 20, f"{tick:g} s", 14, MUTED, "middle"))
    axis_name(drawing, "time", y + 20)
    return y + 40


def block_borders(view: MediumView) -> list[float]:
    """Where a block ends and another begins, seconds."""
    count = ceil(view.duration_s / view.block_s)
    return [view.block_s * number for number in range(1, count)]


def _describe(view: MediumView) -> str:
    info = view.info
    parts = [f"{info.member}, {info.kind.value}"]
    if info.width:
        parts.append(f"{info.width} x {info.height} px")
    if info.kind is not MediaKind.image:
        parts.append(f"{info.duration_us / 1e6:.2f} s")
    if info.fps:
        parts.append(f"{info.fps:.4g} frames/s, {len(view.frames)} of {info.num_frames} used")
    if info.kind is MediaKind.video and not len(view.wave):
        parts.append("sound left out" if info.has_audio else "no sound")
    elif len(view.wave):
        parts.append(f"sound at {info.sample_rate_hz / 1000:g} kHz")
    if view.grid[0]:
        parts.append(f"{view.grid[0]} x {view.grid[1]} x {view.grid[2]} vision tokens")
    if len(view.sound_times_s):
        parts.append(f"{len(view.sound_times_s)} sound tokens")
    return ", ".join(parts)


def _draw_image(drawing: Drawing, view: MediumView, y: float) -> float:
    """The picture as the model gets it, with the border of each token."""
    pixels = view.frames[0][1]
    zoom = min(_IMAGE_HEIGHT / pixels.shape[0], _IMAGE_WIDTH / pixels.shape[1])
    width, height = pixels.shape[1] * zoom, pixels.shape[0] * zoom
    drawing.add(Raster(LEFT, y, width, height, pixels))
    _, rows, columns = view.grid
    for row in range(1, rows):
        at = y + height * row / rows
        drawing.add(Line(((LEFT, at), (LEFT + width, at)), "#ffffff", 0.7))
    for column in range(1, columns):
        at = LEFT + width * column / columns
        drawing.add(Line(((at, y), (at, y + height)), "#ffffff", 0.7))
    drawing.add(Box(LEFT, y, width, height, stroke=COLORS[TokenKind.image]))
    x = LEFT + width + 20
    for line, text in enumerate(
        (
            f"seen as {pixels.shape[1]} x {pixels.shape[0]} px",
            f"{rows} rows x {columns} columns = {rows * columns} tokens",
            "each cell is one token, row by row",
        )
    ):
        drawing.add(Label(x, y + 18 + 22 * line, text, 15, MUTED))
    return y + height + 22


def _draw_blocks(drawing: Drawing, view: MediumView, scale: Scale, y: float) -> float:
    row_name(drawing, "two-second blocks", y + 17)
    if scale(view.block_s) - scale(0) < NARROWEST_BLOCK:
        drawing.add(Box(LEFT, y, PLOT, 24, BAND[0], FAINT))
        text = f"{len(view.blocks):,} blocks, too narrow to draw"
        drawing.add(Label(LEFT + PLOT / 2, y + 17, text, 14, INK, "middle"))
        return y + 30
    for number, block in enumerate(view.blocks):
        x0, x1 = scale(block.start_s), scale(min(block.end_s, view.duration_s))
        drawing.add(Box(x0, y, x1 - x0, 24, BAND[number % 2], FAINT))
        parts = [(block.num_video, "video"), (block.num_audio, "audio")]
        tokens = " + ".join(f"{count} {name}" for count, name in parts if count)
        for text in (f"{block.start_s:g}-{block.end_s:g} s: {tokens} tokens", tokens):
            if text_width(text, 14) < x1 - x0 - 8:
                drawing.add(Label((x0 + x1) / 2, y + 17, text, 14, INK, "middle"))
                break
    return y + 30


def _draw_frames(drawing: Drawing, view: MediumView, scale: Scale, y: float) -> float:
    """Thumbnails at their times, left edge on the time; as many as fit, a tick for every frame."""
    row_name(drawing, "frames", y + _THUMB_HEIGHT / 2 + 5)
    free_from = float("-inf")
    for time_s, pixels in view.frames:
        width = min(_THUMB_HEIGHT * pixels.shape[1] / pixels.shape[0], PLOT / 4)
        x = scale(time_s)
        drawing.add(Line(((x, y + _THUMB_HEIGHT), (x, y + _THUMB_HEIGHT + 8)), MUTED, 1.5))
        if x < free_from:
            continue
        height = width * pixels.shape[0] / pixels.shape[1]
        small = pixels[:: max(1, pixels.shape[0] // 300), :: max(1, pixels.shape[1] // 300)]
        drawing.add(Raster(x, y + _THUMB_HEIGHT - height, width, height, small))
        drawing.add(Box(x, y + _THUMB_HEIGHT - height, width, height, stroke="#ffffff"))
        free_from = x + width
    return y + _THUMB_HEIGHT + 14


def _draw_sound(drawing: Drawing, view: MediumView, scale: Scale, y: float) -> float:
    start = view.sound_start_s
    x0, x1 = scale(start), scale(start + len(view.wave) / SAMPLE_RATE_HZ)
    middle = y + _WAVE_HEIGHT / 2
    row_name(drawing, "waveform", middle + 5)
    drawing.add(Box(LEFT, y, PLOT, _WAVE_HEIGHT, "#fbfcfd", FAINT))
    peak = float(np.abs(view.wave).max(initial=0.0))
    low, high = envelope(view.wave, max(1, round(x1 - x0)))
    xs = np.linspace(x0, x1, len(low))
    reach = (_WAVE_HEIGHT / 2 - 4) / max(peak, 1e-9)
    upper = [(float(x), float(middle - v * reach)) for x, v in zip(xs, high, strict=True)]
    lower = [(float(x), float(middle - v * reach)) for x, v in zip(xs, low, strict=True)]
    blue = COLORS[TokenKind.audio]
    drawing.add(Line((*upper, *reversed(lower)), blue, fill=blue))
    drawing.add(Line(((x0, middle), (x1, middle)), blue, 1.0))
    drawing.add(Label(LEFT + PLOT + 6, y + 14, f"peak {peak:.2f}", 13, MUTED))
    y += _WAVE_HEIGHT + 8

    row_name(drawing, "log-mel", y + _MEL_HEIGHT / 2 + 5)
    drawing.add(Box(LEFT, y, PLOT, _MEL_HEIGHT, "#fbfcfd", FAINT))
    end = scale(min(start + view.mel.shape[1] * HOP_SAMPLES / SAMPLE_RATE_HZ, view.duration_s))
    drawing.add(Raster(x0, y, end - x0, _MEL_HEIGHT, heat(view.mel)))
    drawing.add(Label(LEFT + PLOT + 6, y + 12, "8 kHz", 13, MUTED))
    drawing.add(Label(LEFT + PLOT + 6, y + _MEL_HEIGHT - 2, "0", 13, MUTED))
    return y + _MEL_HEIGHT + 8


def envelope(
    wave: NDArray[np.float32], columns: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the lowest and highest value, float32 [columns] each, of so many equal stretches."""
    edges = np.linspace(0, len(wave), min(columns, len(wave)) + 1).astype(np.int64)[:-1]
    return np.minimum.reduceat(wave, edges), np.maximum.reduceat(wave, edges)


def heat(mel: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Colour log-mel features [bins, L], low frequencies below: uint8 [bins, L, 3]."""
    thin = mel[::-1, :: -(-mel.shape[1] // _MAX_COLUMNS)]
    low, high = float(thin.min()), float(thin.max())
    level = (thin - low) / max(high - low, 1e-9) * (len(_HEAT) - 1)
    below = np.minimum(level.astype(np.int64), len(_HEAT) - 2)
    share = (level - below)[..., None]
    colors: NDArray[np.float64] = _HEAT[below] * (1 - share) + _HEAT[below + 1] * share
    return colors.round().astype(np.uint8)


def _draw_tokens(
    drawing: Drawing, view: MediumView, scale: Scale, y: float, *, token_s: float
) -> float:
    """Each temporal patch and each sound token at the time that its position says."""
    shown_until = view.frames[-1][0] + view.frame_s if view.frames else 0.0
    ends = [*view.patch_times_s[1:].tolist(), shown_until]
    per_patch = view.grid[1] * view.grid[2]
    if per_patch:
        row_name(drawing, "video tokens", y + 17)
        for start, end in zip(view.patch_times_s.tolist(), ends, strict=True):
            x0, x1 = scale(start), scale(max(end, start + token_s))
            drawing.add(Box(x0, y, x1 - x0 - 1, 24, COLORS[TokenKind.video]))
            text = f"{view.grid[1]} x {view.grid[2]}"
            if text_width(text, 13) < x1 - x0 - 4:
                drawing.add(Label((x0 + x1) / 2, y + 17, text, 13, INK, "middle"))
        y += 30
    if len(view.sound_times_s):
        row_name(drawing, "sound tokens", y + 17)
        color, starts = COLORS[TokenKind.audio], view.sound_times_s.tolist()
        if scale(token_s) - scale(0) < _NARROWEST:
            # Sound tokens follow one another without a gap: one box stands for all of them.
            starts, token_s = starts[:1], token_s * len(starts)
        for start in starts:
            x0, x1 = scale(start), scale(min(start + token_s, view.duration_s))
            gap = 1.0 if x1 - x0 > 4 else 0.0
            drawing.add(Box(x0, y, x1 - x0 - gap, 24, color))
        y += 30
    return y
