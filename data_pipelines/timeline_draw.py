"""Two back ends for one list of shapes: a PNG by Pillow, and SVG for a page.

Done here: turning shapes into pixels and into text, escaped. Not done here: what is drawn where
(timeline.py). Units are pixels, y goes down.
"""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# Drawn so much larger and then reduced: Pillow's shapes have no antialiasing of their own.
_OVERSAMPLING = 2
_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}


@dataclass(frozen=True, slots=True)
class Box:
    """A filled rectangle.

    Args:
        fill: colour as #rrggbb, or "" for none.
        stroke: colour of its outline, or "" for none.
        title: what a page shows when the pointer rests on it.
        name: what the box stands for, to find it by.
    """

    x: float
    y: float
    width: float
    height: float
    fill: str = ""
    stroke: str = ""
    title: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A line through points; closed and filled where `fill` is a colour."""

    points: tuple[tuple[float, float], ...]
    color: str
    width: float = 1.0
    fill: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Label:
    """Text on a baseline; anchor is start, middle or end."""

    x: float
    y: float
    text: str
    size: int = 14
    color: str = "#1f2933"
    anchor: str = "start"


@dataclass(frozen=True, slots=True)
class Raster:
    """A picture, uint8 [H, W, 3], stretched into a rectangle."""

    x: float
    y: float
    width: float
    height: float
    pixels: NDArray[np.uint8]


Shape = Box | Line | Label | Raster


@dataclass(slots=True)
class Drawing:
    """Shapes in the order in which they are painted."""

    width: int
    height: int = 0
    shapes: list[Shape] = field(default_factory=list)

    def add(self, *shapes: Shape) -> None:
        """Paint over all that is there."""
        self.shapes += shapes


def text_width(text: str, size: int) -> float:
    """Width of a text in the PNG; a page's own font may differ by a little."""
    return float(_font(size).getlength(text))


def to_png(drawing: Drawing) -> bytes:
    """Render on white; the same drawing gives the same bytes."""
    scale = _OVERSAMPLING
    canvas = Image.new("RGB", (drawing.width * scale, drawing.height * scale), "white")
    pen = ImageDraw.Draw(canvas)
    for shape in drawing.shapes:
        match shape:
            case Box():
                _paint_box(pen, shape, scale)
            case Line():
                _paint_line(pen, shape, scale)
            case Label():
                pen.text(
                    (shape.x * scale, shape.y * scale),
                    shape.text,
                    fill=shape.color,
                    font=_font(shape.size * scale),
                    anchor=_ANCHORS[shape.anchor],
                )
            case Raster():
                size = (max(1, round(shape.width * scale)), max(1, round(shape.height * scale)))
                picture = Image.fromarray(shape.pixels).resize(size, Image.Resampling.BILINEAR)
                canvas.paste(picture, (round(shape.x * scale), round(shape.y * scale)))
    small = canvas.resize((drawing.width, drawing.height), Image.Resampling.BOX)
    sink = io.BytesIO()
    small.save(sink, format="PNG", optimize=True)
    return sink.getvalue()


def to_svg(drawing: Drawing) -> str:
    """Render as an SVG element for an HTML page; texts are escaped, pictures are data URIs."""
    # No xmlns: inside HTML it is not needed, and a page of ours names no address at all.
    size = f'width="{drawing.width}" height="{drawing.height}"'
    view = f'viewBox="0 0 {drawing.width} {drawing.height}"'
    lines = [f'<svg {size} {view} font-family="sans-serif" role="img">']
    lines += [_svg_of(shape) for shape in drawing.shapes]
    return "\n".join([*lines, "</svg>"])


def data_uri(data: bytes, media_type: str) -> str:
    """Bytes as an address that needs no file."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


@lru_cache(maxsize=64)
def _font(size: int) -> Any:
    # The font inside Pillow: every machine draws the same. It has Latin letters only; a page uses
    # the browser's fonts and shows any script.
    return ImageFont.load_default(size)


def _paint_box(pen: ImageDraw.ImageDraw, box: Box, scale: int) -> None:
    x0, y0 = round(box.x * scale), round(box.y * scale)
    x1 = max(x0, round((box.x + box.width) * scale) - 1)
    y1 = max(y0, round((box.y + box.height) * scale) - 1)
    if box.fill:
        pen.rectangle((x0, y0, x1, y1), fill=box.fill)
    if box.stroke:
        pen.rectangle((x0, y0, x1, y1), outline=box.stroke, width=scale)


def _paint_line(pen: ImageDraw.ImageDraw, line: Line, scale: int) -> None:
    points = [(x * scale, y * scale) for x, y in line.points]
    if line.fill:
        pen.polygon(points, fill=line.fill)
    else:
        pen.line(points, fill=line.color, width=max(1, round(line.width * scale)))


def _svg_of(shape: Shape) -> str:
    match shape:
        case Box():
            attributes = f'fill="{shape.fill or "none"}"'
            if shape.stroke:
                attributes += f' stroke="{shape.stroke}"'
            title = f"<title>{html.escape(shape.title)}</title>" if shape.title else ""
            return f"<rect {_place(shape)} {attributes}>{title}</rect>"
        case Line():
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
            if shape.fill:
                return f'<polygon points="{points}" fill="{shape.fill}"/>'
            stroke = f'fill="none" stroke="{shape.color}" stroke-width="{shape.width:g}"'
            return f'<polyline points="{points}" {stroke}/>'
        case Label():
            place = f'x="{shape.x:.1f}" y="{shape.y:.1f}" font-size="{shape.size}"'
            look = f'fill="{shape.color}" text-anchor="{shape.anchor}" xml:space="preserve"'
            # The width of the PNG's font: neighbours stay clear of each other in any font.
            width = text_width(shape.text, shape.size)
            fit = f'textLength="{width:.1f}" lengthAdjust="spacingAndGlyphs"' if width else ""
            return f"<text {place} {look} {fit}>{html.escape(shape.text)}</text>"
        case Raster():
            sink = io.BytesIO()
            Image.fromarray(shape.pixels).save(sink, format="PNG")
            uri = data_uri(sink.getvalue(), "image/png")
            return f'<image {_place(shape)} preserveAspectRatio="none" href="{uri}"/>'


def _place(shape: Box | Raster) -> str:
    return (
        f'x="{shape.x:.2f}" y="{shape.y:.2f}" width="{shape.width:.2f}" height="{shape.height:.2f}"'
    )
