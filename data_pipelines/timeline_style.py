"""Colours, measures and small shapes that all parts of the token timeline share."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, log10

from data_pipelines.timeline_data import TokenKind
from data_pipelines.timeline_draw import Drawing, Label, Line

WIDTH = 1400
LEFT = 168
RIGHT = 80
PLOT = WIDTH - LEFT - RIGHT

INK = "#1f2933"
MUTED = "#5d6b79"
FAINT = "#d5dbe1"
# Blocks narrower than so many pixels would be a hatching; they are counted instead.
NARROWEST_BLOCK = 16.0
BORDER = "#1f2933"
BAND = ("#eef2f6", "#dbe3ea")
SUPERVISED = "#1b9e5a"
IGNORED = "#e3e7eb"
# Told apart by people who do not tell red from green, and by their lightness in print.
COLORS = {
    TokenKind.text: "#b4c0cc",
    TokenKind.chat: "#66788a",
    TokenKind.bracket: "#1f2933",
    TokenKind.image: "#c979b0",
    TokenKind.video: "#f0a830",
    TokenKind.audio: "#2f7fc1",
}


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps [low, high] to the plot's left and right edge, in pixels."""

    low: float
    high: float

    def __call__(self, value: float) -> float:
        """Return x of a value."""
        return LEFT + PLOT * (value - self.low) / max(self.high - self.low, 1e-9)


def heading(drawing: Drawing, text: str, y: float) -> float:
    """Draw a section's heading with a rule under it; return where its content starts."""
    drawing.add(Label(24, y + 22, text, 19))
    drawing.add(Line(((24, y + 30), (WIDTH - 24, y + 30)), FAINT, 1.0))
    return y + 42


def row_name(drawing: Drawing, text: str, y: float) -> None:
    """Name a row at the left of the plot."""
    drawing.add(Label(LEFT - 12, y, text, 15, MUTED, "end"))


def axis_name(drawing: Drawing, text: str, y: float) -> None:
    """Name an axis, clear of the number under its left end."""
    drawing.add(Label(LEFT - 30, y, text, 15, MUTED, "end"))


def round_steps(high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from 0 to `high`, at most `most` of them."""
    power = 10.0 ** floor(log10(max(high, 1e-6) / most))
    step = next(power * s for s in (1, 2, 5, 10, 20) if high / (power * s) <= most - 1)
    return [round(step * number, 6) for number in range(floor(high / step + 1e-9) + 1)]
