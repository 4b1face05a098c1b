"""Settings of the model: which preset, which tokenizer, where the weights come from.

Only schemas: nothing here imports transformers or builds anything (that is presets.py, build.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum

from omni_train.config.errors import ConfigError


class ModelPreset(Enum):
    """Sizes of a model; a checkpoint's own config.json goes before the preset's."""

    tiny = "tiny"
    qwen2_5_omni_3b = "qwen2_5_omni_3b"
    qwen2_5_omni_7b = "qwen2_5_omni_7b"


# One attention head of the tiny model; half of it is what mrope_section must add up to.
TINY_HEAD_DIM = 32
_WIDTHS = ("text_width", "audio_width", "vision_width", "talker_width")


@dataclass(kw_only=True, slots=True)
class TinySizes:
    """Sizes of the `tiny` preset; ignored by the others. Heads are 32 wide.

    Args:
        text_width, text_layers: hidden size and depth of the language model.
        audio_width, audio_layers: of the audio tower.
        vision_width, vision_layers: of the vision tower; its last block has full attention.
        talker_width, talker_layers: of the Talker.
        num_codes: size of the speech codebook; the Talker's control ids follow it.
    """

    text_width: int = 128
    text_layers: int = 3
    audio_width: int = 128
    audio_layers: int = 2
    vision_width: int = 64
    vision_layers: int = 2
    talker_width: int = 192
    talker_layers: int = 4
    num_codes: int = 128

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if value < 1:
                raise ConfigError(
                    key=f"model.tiny.{spec.name}",
                    value=value,
                    rule="must be at least 1",
                    remedy="raise it",
                )
            if spec.name in _WIDTHS and value % (2 * TINY_HEAD_DIM):
                raise ConfigError(
                    key=f"model.tiny.{spec.name}",
                    value=value,
                    rule=f"an even number of heads of {TINY_HEAD_DIM} is needed",
                    remedy=f"use a multiple of {2 * TINY_HEAD_DIM}",
                )


@dataclass(kw_only=True, slots=True)
class ModelParts:
    """Directories that a Thinker is put together from; their config.json decide its sizes.

    Args:
        llm: of Qwen2.5; needed where another part is given.
        vision: of Qwen2.5-VL, whose vision tower is taken; empty starts one of the preset's size.
        audio: of Whisper, whose encoder is taken; empty likewise.
    """

    llm: str = ""
    vision: str = ""
    audio: str = ""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which model is trained and where its weights come from.

    Args:
        preset: sizes, where no checkpoint says otherwise.
        tokenizer: directory of a saved tokenizer.
        init_from: directory with the weights to start from: a checkpoint, a run, or safetensors
            in the layout of Qwen2.5-Omni; empty starts from a seeded random initialisation.
        parts: build from these instead of `init_from`, for the first stages of a real run.
        init_groups: other directory for the weights of a parameter group, by group name, for
            example the vision groups of the vision stage; goes before `init_from`
            and `parts`.
        tiny: sizes of the `tiny` preset.
        speakers: token of the tokenizer by the name that the data use for a voice; empty takes the
            release's two, or for `tiny` its speaker tokens under their own names.
        rope_theta: base of the Thinker's rotary positions, for longer contexts; None keeps that of
            the weights' config.json, else the preset's 1,000,000. A stage that starts from a run
            with a base of its own must name the same one.
        new_speakers: names among `speakers` that get a fresh row, the mean of the others'.
    """

    preset: ModelPreset = ModelPreset.tiny
    tokenizer: str
    init_from: str = ""
    parts: ModelParts = field(default_factory=ModelParts)
    init_groups: dict[str, str] = field(default_factory=dict)
    tiny: TinySizes = field(default_factory=TinySizes)
    speakers: dict[str, str] = field(default_factory=dict)
    new_speakers: list[str] = field(default_factory=list)
    rope_theta: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("llm", "vision", "audio") if getattr(self.parts, name)]
        if given and (self.init_from or not self.parts.llm):
            raise ConfigError(
                key="model.parts",
                value=given,
                rule="parts are put together around a language model, instead of init_from",
                remedy="give model.parts.llm, and leave model.init_from out",
            )
        if self.rope_theta is not None and self.rope_theta <= 1.0:
            raise ConfigError(
                key="model.rope_theta",
                value=self.rope_theta,
                rule="a base is greater than 1",
                remedy="use 1e6, Qwen2.5's, or more",
            )
        for name in self.new_speakers:
            if name not in self.speakers:
                raise ConfigError(
                    key="model.new_speakers",
                    value=name,
                    rule="a new speaker needs a token",
                    remedy=f"name one: model.speakers.{name}=TOKEN",
                )
        if not self.tokenizer:
            raise ConfigError(
                key="model.tokenizer",
                value=self.tokenizer,
                rule="a tokenizer directory is needed",
                remedy="give the directory of a saved tokenizer",
            )
