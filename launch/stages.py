"""The stages as a table: what each starts from, trains and freezes."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Stage:
    """One row of the recipe.

    Args:
        number: place in the recipe.
        recipe: script under `recipes/`, without suffix.
        override: what selects the phase; empty where the recipe has one.
        starts_from, trained, frozen, data: in words.
        max_tokens: of one packed sequence; 0 where it does not apply.
    """

    number: str
    recipe: str
    override: str
    starts_from: str
    trained: str
    frozen: str
    data: str
    max_tokens: int = 0

    @property
    def name(self) -> str:
        """Recipe and phase."""
        return f"{self.recipe} {self.override}".rstrip()

    def as_dict(self) -> dict[str, Any]:
        """Return the row as plain values."""
        return asdict(self)


STAGES = (
    Stage(
        "-",
        "text_lm",
        "",
        "nothing",
        "LLM",
        "nothing",
        "plain text; stands for Qwen2.5 in the demo",
    ),
    Stage("0", "speech_codec", "", "nothing", "speech tokenizer", "nothing", "speech"),
    Stage(
        "1a",
        "stage1_audio",
        "phase=adapter",
        "LLM + Whisper encoder",
        "audio projection",
        "LLM, audio encoder, vision",
        "audio-text pairs",
        8192,
    ),
    Stage(
        "1b",
        "stage1_audio",
        "phase=encoder",
        "1a",
        "audio encoder + projection",
        "LLM, vision",
        "audio-text pairs",
        8192,
    ),
    Stage(
        "1c",
        "stage1_vision",
        "phase=adapter",
        "LLM + Qwen2.5-VL vision tower",
        "patch merger",
        "LLM, vision blocks, audio",
        "image-text pairs",
        8192,
    ),
    Stage(
        "1d",
        "stage1_vision",
        "phase=encoder",
        "1c",
        "vision tower + merger",
        "LLM, audio",
        "image-text pairs",
        8192,
    ),
    Stage(
        "2",
        "stage2_multimodal",
        "",
        "1b + 1d merged",
        "whole Thinker",
        "nothing",
        "text, image, video, audio, video with sound",
        8192,
    ),
    Stage(
        "3", "stage3_long", "", "2", "whole Thinker", "nothing", "the same, with long media", 32768
    ),
    Stage("4", "thinker_sft", "", "3", "Thinker", "(options)", "ChatML dialogues", 32768),
    Stage(
        "5",
        "talker_icl",
        "",
        "4",
        "Talker",
        "Thinker",
        "dialogues with spoken replies; speech continuation",
        32768,
    ),
    Stage(
        "6",
        "talker_candidates",
        "",
        "5",
        "nothing",
        "all",
        "sampled replies, ranked by WER and pause error",
    ),
    Stage("7", "talker_dpo", "", "5", "Talker", "reference, Thinker", "the pairs of 6"),
    Stage(
        "8", "talker_speaker_sft", "", "7", "Talker + speaker rows", "Thinker", "target speakers"
    ),
    Stage("9", "evaluate", "", "any", "nothing", "all", "held-out sets"),
    Stage(
        "-",
        "alignment_probe",
        "arm=tmrope",
        "1b + 1d merged",
        "whole Thinker",
        "nothing",
        "clips with a schedule; a control of the demo",
    ),
)


def recipe_names() -> list[str]:
    """Return the recipes' names in order, each once."""
    return list(dict.fromkeys(stage.recipe for stage in STAGES))


def find_stages(name: str) -> list[Stage]:
    """Return the rows of one recipe; empty where there is none of that name."""
    return [stage for stage in STAGES if stage.recipe == name]


def format_table(stages: tuple[Stage, ...] = STAGES) -> str:
    """Return the table as aligned text."""
    head = ("#", "stage", "starts from", "trained", "frozen", "max tokens")
    rows = [
        (
            stage.number,
            stage.name,
            stage.starts_from,
            stage.trained,
            stage.frozen,
            str(stage.max_tokens or "-"),
        )
        for stage in stages
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    # What is too wide for the terminal goes on below, in its column.
    # Words stay whole: a name that is cut in two cannot be copied.
    room = shutil.get_terminal_size().columns - 2 * (len(head) - 1)
    words = [[word for row in [head, *rows] for word in row[i].split()] for i in range(len(head))]
    least = [max(map(len, column)) for column in words]
    while sum(widths) > max(room, sum(least)):
        wide = [i for i in range(len(head)) if widths[i] > least[i]]
        widths[max(wide, key=widths.__getitem__)] -= 1
    above, *below = [_lines(row, widths) for row in [head, *rows]]
    lines = [line for row in below for line in row]
    return "\n".join([*above, "-" * max(map(len, [*above, *lines])), *lines])


def _lines(row: tuple[str, ...], widths: list[int]) -> list[str]:
    cells = [
        textwrap.wrap(cell, width, break_on_hyphens=False) or [""]
        for cell, width in zip(row, widths, strict=True)
    ]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in zip_longest(*cells, fillvalue="")
    ]


def format_stage(stage: Stage) -> str:
    """Return one stage in full."""
    lines = [
        f"{stage.number}  {stage.name}",
        f"   starts from  {stage.starts_from}",
        f"   trained      {stage.trained}",
        f"   frozen       {stage.frozen}",
        f"   data         {stage.data}",
        f"   max tokens   {stage.max_tokens or '-'}",
        f"   script       recipes/{stage.recipe}.py",
        f"   command      ./run train {stage.name}",
    ]
    return "\n".join(lines)
