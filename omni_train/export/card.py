"""The model card of an export: what it is, where it comes from, how it scored, how it is used."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from omni_train.export.facts import Lineage

# A name on the hub; a path is nobody else's.
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Fields of an evaluation event that say how a score was made.
_HOW = ("normalizer", "decoding", "repetition_penalty", "max_new_tokens", "system", "prompt")

_TEXT = """\
from transformers import Qwen2_5OmniForConditionalGeneration
{processor_import}

model = Qwen2_5OmniForConditionalGeneration.from_pretrained("{name}", dtype="auto")
processor = {processor}
messages = [{{"role": "user", "content": [{{"type": "text", "text": "Who are you?"}}]}}]
text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
inputs = processor(text=text, return_tensors="pt")  # images=[...], audio=[...] where it has them
{generate}
print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""

_WITHOUT_TORCHVISION = (
    "transformers' processor needs torchvision. Without it, "
    "`omni_train.export.processor.load_processor` reads the same files for pictures and sound."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What a card is written from.

    Args:
        name: of the directory.
        licence: identifier of the licence, as Hugging Face lists them.
        lineage: runs that made the model.
        scores: evaluation events.
        carried: parts that were taken over unchanged, and from where.
        audio: whether transformers can make sound with it.
        codec: directory beside the weights that audio needs; empty for none.
        logits: hash of the logits on the probe, the same in training precision and reloaded.
        default_speaker: voice that `generate` of the whole model names; empty without audio.
    """

    name: str
    licence: str
    lineage: Lineage
    scores: list[dict[str, Any]]
    carried: dict[str, str]
    audio: bool
    codec: str
    logits: str
    default_speaker: str


def format_card(card: Card) -> str:
    """Return the text of `README.md`."""
    parts = [
        _head(card),
        f"# {card.name}\n\nA Qwen2.5-Omni model trained with omni-train.",
        _use(card),
        _lineage(card),
        _scores(card.scores),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(card: Card) -> str:
    base = [root for root in card.lineage.roots if _HUB_NAME.fullmatch(root)]
    lines = ["---", f"license: {card.licence}", "library_name: transformers"]
    lines += ["pipeline_tag: any-to-any", *(["base_model:"] if base else [])]
    return "\n".join([*lines, *(f"- {root}" for root in base), "---"])


def _use(card: Card) -> str:
    if card.audio:
        call = f'ids = model.generate(**inputs, speaker="{card.default_speaker}", '
        call += 'generation_mode="text")'
    else:
        # Of the whole model, transformers (5.23) reads the Talker even where text is asked for.
        call = "ids = model.thinker.generate(**inputs, do_sample=False)"
    code = _TEXT.format(
        name=card.name,
        processor_import="from transformers import Qwen2_5OmniProcessor",
        processor=f'Qwen2_5OmniProcessor.from_pretrained("{card.name}")',
        generate=call,
    )
    notes = [_WITHOUT_TORCHVISION]
    if card.codec:
        notes.append(
            f"**Audio output needs the codec in `{card.codec}/`**: this model's Talker speaks in "
            "its codes, not in those of Token2Wav. transformers gives text alone; "
            "`omni-train evaluate` speaks."
        )
    elif not card.audio:
        notes.append("This model has no Talker: it gives text alone.")
    return "\n\n".join(["## Use", f"```python\n{code}```", *notes])


def _lineage(card: Card) -> str:
    lines = ["## Where it comes from", "", "| stage | steps | precision | data | code |"]
    lines.append("|---|---|---|---|---|")
    for run in card.lineage.runs:
        data = ", ".join(f"{name} `{value}`" for name, value in run.data.items())
        code = f"`{run.code[:12]}`" if run.code else "unknown"
        lines.append(f"| {run.stage} | {run.step} | {run.precision.name} | {data} | {code} |")
    lines += ["", "The newest stage is first; data are named with the hash of their manifest."]
    lines += [f"It began from `{root}`." for root in card.lineage.roots]
    lines += [f"{part} was taken over unchanged from `{at}`." for part, at in card.carried.items()]
    if card.logits:
        lines.append(
            f"Reloaded in a new process, its logits on a fixed prompt are bit for bit those of the "
            f"trained weights (xxh3 `{card.logits}`)."
        )
    return "\n".join(lines)


def _scores(scores: list[dict[str, Any]]) -> str:
    if not scores:
        return ""
    lines = ["## Scores", "", "| task | metric | value | 95 % interval | n | how |"]
    lines.append("|---|---|---|---|---|---|")
    for event in scores:
        how = ", ".join(f"{key} {event[key]}" for key in _HOW if event.get(key) not in (None, ""))
        # Spoken tasks keep theirs among their figures.
        at = event if "low" in event else event.get("figures", {})
        interval = f"{at['low']:.4g} to {at['high']:.4g}" if "low" in at else ""
        lines.append(
            f"| {event['task']} | {event['metric']} | {float(event['value']):.4g} | {interval} "
            f"| {event['num_samples']} | {how} |"
        )
    return "\n".join(lines)
