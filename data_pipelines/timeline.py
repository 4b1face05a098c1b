"""The token timeline of one sample as shapes: what is seen and heard when, and as which tokens.

    heading, legend, dialogue
    per medium    frames at their times, waveform, mel, tokens in time; borders every two seconds
    all tokens    blocks, ids, loss mask and the three position axes over the token index
    tokens read   every token in order, text spelled out

Done here: where everything goes. Not done here: reading a sample (timeline_data.py), pixels and SVG
(timeline_draw.py).

Letters: T tokens of the sample.
"""

from __future__ import annotations

from data_pipelines.timeline_data import Timeline, TokenKind
from data_pipelines.timeline_draw import Box, Drawing, Label, Line, text_width
from data_pipelines.timeline_media import draw_medium
from data_pipelines.timeline_style import (
    BAND,
    BORDER,
    COLORS,
    FAINT,
    IGNORED,
    INK,
    LEFT,
    MUTED,
    NARROWEST_BLOCK,
    PLOT,
    RIGHT,
    SUPERVISED,
    WIDTH,
    Scale,
    axis_name,
    heading,
    round_steps,
    row_name,
)

AXES = (("time", "#d1495b"), ("height", "#2e7d5b"), ("width", "#5b4bb7"))
_AXIS_HEIGHT = 86
_MAX_MEDIA = 6
_MAX_CHIPS = 400
_MAX_TURNS = 8
_LINES_PER_TURN = 3


def draw_timeline(timeline: Timeline) -> Drawing:
    """Lay out one sample."""
    drawing = Drawing(WIDTH)
    y = _draw_head(drawing, timeline)
    y = _draw_dialogue(drawing, timeline, y)
    for number, view in enumerate(timeline.media[:_MAX_MEDIA], 1):
        y = draw_medium(drawing, view, y, number=number, token_s=timeline.token_s)
    if (more := len(timeline.media) - _MAX_MEDIA) > 0:
        drawing.add(Label(LEFT, y + 10, f"{more} more media are not drawn", 15, MUTED))
        y += 30
    y = _draw_tokens(drawing, timeline, y)
    y = _draw_chips(drawing, timeline, y)
    drawing.height = round(y + 16)
    return drawing


def _draw_head(drawing: Drawing, timeline: Timeline) -> float:
    drawing.add(Label(WIDTH - RIGHT, 40, timeline.shard, 15, MUTED, "end"))
    drawing.add(Label(24, 42, timeline.key, 28))
    facts = [f"{name} {value}" for name, value in timeline.facts.items()]
    supervised = int(timeline.supervised.sum())
    facts.append(f"{timeline.num_tokens:,} tokens, {supervised:,} of them supervised")
    drawing.add(Label(24, 68, "   |   ".join(facts), 16, MUTED))
    x = 24.0
    entries = [(kind.value, COLORS[kind]) for kind in TokenKind if kind in set(timeline.kinds)] + [
        ("the loss reads it", SUPERVISED),
        ("the loss ignores it", IGNORED),
    ]
    for name, color in entries:
        drawing.add(Box(x, 84, 16, 16, color, MUTED if color == IGNORED else ""))
        drawing.add(Label(x + 22, 97, name, 15))
        x += 22 + text_width(name, 15) + 22
    return 112.0


def _draw_dialogue(drawing: Drawing, timeline: Timeline, y: float) -> float:
    y = heading(drawing, "Dialogue", y)
    turns = timeline.turns[:_MAX_TURNS]
    for role, text in turns:
        drawing.add(Label(LEFT - 12, y + 16, role, 15, MUTED, "end"))
        for line in wrap(text, PLOT, 16, max_lines=_LINES_PER_TURN):
            drawing.add(Label(LEFT, y + 16, line, 16))
            y += 21
        y += 4
    if (more := len(timeline.turns) - len(turns)) > 0:
        drawing.add(Label(LEFT, y + 16, f"{more} more turns", 15, MUTED))
        y += 24
    return y + 10


def wrap(text: str, width: float, size: int, *, max_lines: int) -> list[str]:
    """Break a text into lines that fit; a text that is too long ends in three dots."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and text_width(longer, size) > width:
            lines.append(line)
            longer = word
        # One word wider than the line is cut rather than drawn over the edge.
        while text_width(longer, size) > width:
            keep = max(1, int(len(longer) * width / text_width(longer, size)) - 1)
            lines.append(longer[:keep])
            longer = longer[keep:]
        line = longer
    lines.append(line)
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], lines[max_lines - 1][:-3] + "..."]
    return lines


def _draw_tokens(drawing: Drawing, timeline: Timeline, y: float) -> float:
    """Everything over the token index, on one scale."""
    y = heading(drawing, "All tokens in order", y)
    scale = Scale(0.0, float(timeline.num_tokens))
    top = y
    y = _draw_blocks(drawing, timeline, scale, y)
    borders_from = y
    _draw_strip(drawing, timeline, scale, y)
    y += 44
    row_name(drawing, "loss mask", y + 13)
    for start, end in timeline.runs():
        color = SUPERVISED if timeline.supervised[start] else IGNORED
        drawing.add(Box(scale(start), y, scale(end) - scale(start), 18, color))
    y += 28
    high = int(timeline.positions.max())
    for axis, (name, color) in enumerate(AXES):
        row_name(drawing, f"position: {name}", y + _AXIS_HEIGHT / 2 + 5)
        _draw_axis(drawing, timeline, scale, y, axis=axis, color=color, high=high)
        y += _AXIS_HEIGHT + 10
    for at in _block_edges(timeline):
        drawing.add(Line(((scale(at), borders_from), (scale(at), y - 8)), BORDER, 1.0))
    for tick in round_steps(timeline.num_tokens, 14):
        drawing.add(Line(((scale(tick), y - 6), (scale(tick), y)), MUTED))
        drawing.add(Label(scale(tick), y + 15, f"{tick:g}", 14, MUTED, "middle"))
    axis_name(drawing, "token index", y + 15)
    return y + 40 if y > top else top


def _draw_strip(drawing: Drawing, timeline: Timeline, scale: Scale, y: float) -> None:
    """Each token once: runs of one kind as one box, borders between tokens where there is room."""
    row_name(drawing, "token ids", y + 22)
    cell = scale(1) - scale(0)
    for start, end in timeline.runs():
        kind = timeline.kinds[start]
        drawing.add(
            Box(
                scale(start),
                y,
                scale(end) - scale(start),
                34,
                COLORS[kind],
                title=f"tokens {start} to {end - 1}: {kind.value}",
                name=f"tokens:{start}:{end}",
            )
        )
        if cell >= 4:
            for at in range(start + 1, end):
                drawing.add(Line(((scale(at), y), (scale(at), y + 34)), "#ffffff", 0.7))


def _draw_blocks(drawing: Drawing, timeline: Timeline, scale: Scale, y: float) -> float:
    blocks = [block for view in timeline.media for block in view.blocks]
    if not blocks:
        return y
    row_name(drawing, "two-second blocks", y + 17)
    if not _blocks_fit(timeline):
        x0, x1 = scale(blocks[0].first), scale(blocks[-1].end)
        drawing.add(Box(x0, y, x1 - x0, 24, BAND[0], BORDER))
        text = f"{len(blocks):,} blocks, too narrow to draw"
        drawing.add(Label((x0 + x1) / 2, y + 17, text, 14, INK, "middle"))
        return y + 28
    for number, block in enumerate(blocks):
        x0, x1 = scale(block.first), scale(block.end)
        drawing.add(Box(x0, y, x1 - x0, 24, BAND[number % 2], BORDER))
        text = f"{block.start_s:g}-{block.end_s:g} s"
        if text_width(text, 14) < x1 - x0 - 6:
            drawing.add(Label((x0 + x1) / 2, y + 17, text, 14, INK, "middle"))
    return y + 28


def _blocks_fit(timeline: Timeline) -> bool:
    """Whether blocks are wide enough to be told apart, on the whole."""
    blocks = [block for view in timeline.media for block in view.blocks]
    held = sum(block.end - block.first for block in blocks)
    return held * PLOT / timeline.num_tokens >= NARROWEST_BLOCK * len(blocks)


def _block_edges(timeline: Timeline) -> list[int]:
    if not _blocks_fit(timeline):
        return []
    edges = {at for view in timeline.media for b in view.blocks for at in (b.first, b.end)}
    return sorted(edges)


def _draw_axis(
    drawing: Drawing,
    timeline: Timeline,
    scale: Scale,
    y: float,
    *,
    axis: int,
    color: str,
    high: int,
) -> None:
    """One position axis as dots and steps; all three share one scale so that they compare."""
    drawing.add(Box(LEFT, y, PLOT, _AXIS_HEIGHT, "#fbfcfd", FAINT))
    values = timeline.positions[axis]
    cell = scale(1) - scale(0)
    points: list[tuple[float, float]] = []
    for at, value in enumerate(values.tolist()):
        level = y + _AXIS_HEIGHT - 5 - (_AXIS_HEIGHT - 10) * value / max(1, high)
        points += [(scale(at), level), (scale(at) + cell, level)]
    drawing.add(Line(tuple(points), color, 1.6, name=f"axis:{axis}"))
    drawing.add(Label(LEFT + PLOT + 6, y + 14, f"{high}", 13, MUTED))
    drawing.add(Label(LEFT + PLOT + 6, y + _AXIS_HEIGHT - 2, "0", 13, MUTED))


def _draw_chips(drawing: Drawing, timeline: Timeline, y: float) -> float:
    """Every token as a person reads it: text spelled out, placeholders as how many of what."""
    y = heading(drawing, "The same, spelled out (underlined: the loss reads it)", y)
    x, drawn = float(LEFT), 0
    for text, kind, supervised in _chips(timeline):
        if drawn == _MAX_CHIPS:
            drawing.add(Label(x + 4, y + 19, "...", 16, MUTED))
            break
        width = text_width(text, 15) + 10
        if x + width > LEFT + PLOT and x > LEFT:
            x, y = float(LEFT), y + 36
        drawing.add(Box(x, y, width, 25, COLORS[kind]))
        drawing.add(Label(x + 5, y + 18, text, 15, text_color(COLORS[kind])))
        if supervised:
            drawing.add(Box(x, y + 26, width, 4, SUPERVISED))
        x, drawn = x + width + 3, drawn + 1
    return y + 44


def _chips(timeline: Timeline) -> list[tuple[str, TokenKind, bool]]:
    chips = []
    for start, end in timeline.runs():
        kind, supervised = timeline.kinds[start], bool(timeline.supervised[start])
        if any(timeline.pieces[start:end]):
            for piece in timeline.pieces[start:end]:
                shown = piece.replace(" ", "\u00b7") if not piece.strip() else piece
                chips.append((shown[:60], kind, supervised))
        else:
            chips.append((f"{kind.value} x {end - start}", kind, supervised))
    return chips


def text_color(background: str) -> str:
    """Black or white, whichever is read more easily on a colour."""
    red, green, blue = (int(background[at : at + 2], 16) for at in (1, 3, 5))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"
