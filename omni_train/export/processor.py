"""Processor files of an export, and a processor for machines without torchvision.

transformers (5.23) has no Qwen2.5-Omni processor without torchvision: its constructor looks the
video processor's class up and fails. The files are therefore written from what they say, and
`load_processor` puts the same parts together without video where torchvision is missing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5OmniProcessor,
    WhisperFeatureExtractor,
)
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available

from omni_train.data.chatml import CHAT_TEMPLATE
from omni_train.data.image import CLIP_MEAN, CLIP_STD
from omni_train.data.tokenizer import CHAT_TOKENS
from omni_train.data.types import ModelSpec, ProcessingConfig
from omni_train.speech.mel import HOP_SAMPLES, NUM_FFT, SAMPLE_RATE_HZ

# Sound is padded to this by transformers' processor, and cut: the release's value.
_MAX_AUDIO_S = 300
_TURN_TOKENS = ("im_start", "im_end")


def write_processor(
    folder: Path, tokenizer: PreTrainedTokenizerFast, processing: ProcessingConfig, spec: ModelSpec
) -> None:
    """Write tokenizer, chat template and the settings of picture, clip and sound.

    Args:
        folder: of the export.
        tokenizer: the model's.
        processing: how media became tokens in training.
        spec: sizes of patches and mel bins.
    """
    # What transformers' processor asks its tokenizer for: `image_token` and so on.
    named = {f"{name}_token": t for name, t in CHAT_TOKENS.items() if name not in _TURN_TOKENS}
    exported = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=CHAT_TOKENS["im_end"],
        pad_token=tokenizer.pad_token,
        extra_special_tokens=named,
    )
    exported.chat_template = CHAT_TEMPLATE
    exported.save_pretrained(str(folder))
    frames = _MAX_AUDIO_S * SAMPLE_RATE_HZ // HOP_SAMPLES
    sound = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "chunk_length": _MAX_AUDIO_S,
        "dither": 0.0,
        "feature_size": spec.num_mel_bins,
        "hop_length": HOP_SAMPLES,
        "n_fft": NUM_FFT,
        "n_samples": _MAX_AUDIO_S * SAMPLE_RATE_HZ,
        "nb_max_frames": frames,
        "padding_value": 0.0,
        "padding_side": "left",
        "return_attention_mask": True,
        "sampling_rate": SAMPLE_RATE_HZ,
    }
    picture = {
        **_pixels(spec),
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": processing.image_min_pixels,
        "max_pixels": processing.image_max_pixels,
    }
    video = {
        **_pixels(spec),
        "video_processor_type": "Qwen2VLVideoProcessor",
        "size": {
            "shortest_edge": processing.video_min_pixels,
            "longest_edge": processing.video_max_pixels,
        },
        "fps": processing.video_fps,
        "max_frames": processing.video_max_frames,
    }
    name = {"processor_class": "Qwen2_5OmniProcessor"}
    _write(folder / "preprocessor_config.json", {**sound, **picture, **name})
    _write(folder / "video_preprocessor_config.json", {**video, **name})


def _pixels(spec: ModelSpec) -> dict[str, Any]:
    return {
        "patch_size": spec.patch_size,
        "temporal_patch_size": spec.temporal_patch_size,
        "merge_size": spec.merge_size,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


class ImageAudioProcessor(Qwen2_5OmniProcessor):
    """transformers' processor without its video part, which alone needs torchvision."""

    def __init__(
        self,
        image_processor: Any = None,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
    ) -> None:
        ProcessorMixin.__init__(
            self, image_processor, feature_extractor, tokenizer, chat_template=chat_template
        )
        for kind in ("image", "audio", "video"):
            setattr(self, f"{kind}_token", getattr(tokenizer, f"{kind}_token"))
            setattr(self, f"{kind}_token_id", getattr(tokenizer, f"{kind}_token_id"))
        for kind in ("vision", "audio"):
            for end in ("bos", "eos"):
                name = f"{kind}_{end}_token"
                setattr(self, name, getattr(tokenizer, name))


def load_processor(folder: str | Path) -> Qwen2_5OmniProcessor:
    """Return an export's processor; for pictures and sound alone where torchvision is missing."""
    path = str(folder)
    if is_torchvision_available():
        return Qwen2_5OmniProcessor.from_pretrained(path, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return ImageAudioProcessor(
        AutoImageProcessor.from_pretrained(path, local_files_only=True),
        WhisperFeatureExtractor.from_pretrained(path, local_files_only=True),
        tokenizer,
        tokenizer.chat_template,
    )
