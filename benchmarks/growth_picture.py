"""Draws the JSON of growth.py: a panel for each kind of size, both axes logarithmic.

python -m benchmarks.growth_picture growth.json docs/growth.png
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, COLUMNS = 480, 330, 3
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 66, 44
INK, GRID = "#222222", "#dddddd"
COLOURS = ("#1f5fa8", "#c2571a")

Point = tuple[float, float]


def panels_of(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the lines by panel, in the order in which they were measured."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for part in found.values():
        for line in part["series"]:
            panels.setdefault(line["panel"], []).append(line)
    return panels


def limits(values: list[float]) -> tuple[float, float]:
    """Return logarithms of the powers of ten around `values`."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def label(power: float) -> str:
    """Return a power of ten as a reader says it."""
    if -3 <= power <= 4:
        return f"{10**power:,.{max(0, -int(power))}f}"
    return f"1e{int(power)}"


def draw_panel(draw: ImageDraw.ImageDraw, x0: int, y0: int, title: str, lines: list[Any]) -> None:
    """Draw one panel with its upper left corner at (x0, y0)."""
    small, large = ImageFont.load_default(13), ImageFont.load_default(15)
    ends_x = limits([x for line in lines for x in line["x"]])
    ends_y = limits([y for line in lines for y in line["y"]])
    box = (x0 + LEFT, y0 + TOP, x0 + WIDTH - RIGHT, y0 + HEIGHT - BOTTOM)

    def place(x: float, y: float) -> Point:
        across = (x - ends_x[0]) / (ends_x[1] - ends_x[0])
        up = (y - ends_y[0]) / (ends_y[1] - ends_y[0])
        return box[0] + across * (box[2] - box[0]), box[3] - up * (box[3] - box[1])

    for power in range(int(ends_x[0]), int(ends_x[1]) + 1):
        x, _ = place(power, ends_y[0])
        draw.line((x, box[1], x, box[3]), fill=GRID)
        draw.text((x, box[3] + 5), label(power), fill=INK, font=small, anchor="ma")
    for power in range(int(ends_y[0]), int(ends_y[1]) + 1):
        _, y = place(ends_x[0], power)
        draw.line((box[0], y, box[2], y), fill=GRID)
        draw.text((box[0] - 6, y), label(power), fill=INK, font=small, anchor="rm")
    draw.rectangle(box, outline=INK)
    draw.text((box[0], y0 + 8), title, fill=INK, font=large)
    for number, line in enumerate(lines):
        colour = COLOURS[number]
        said = f"{line['name']}: exponent {line['exponent']:.2f}"
        draw.text((box[0], y0 + 28 + 17 * number), said, fill=colour, font=small)
        points = [
            place(math.log10(x), math.log10(y)) for x, y in zip(line["x"], line["y"], strict=True)
        ]
        draw.line(points, fill=colour, width=2)
        for x, y in points:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)


def picture(found: dict[str, Any]) -> Image.Image:
    """Return all panels."""
    panels = panels_of(found)
    rows = -(-len(panels) // COLUMNS)
    image = Image.new("RGB", (WIDTH * COLUMNS, HEIGHT * rows), "white")
    draw = ImageDraw.Draw(image)
    for number, (title, lines) in enumerate(panels.items()):
        row, column = divmod(number, COLUMNS)
        draw_panel(draw, column * WIDTH, row * HEIGHT, title, lines)
    return image


def main(arguments: list[str]) -> int:
    """Draw."""
    source, target = map(Path, arguments)
    picture(json.loads(source.read_text(encoding="ascii"))).save(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
