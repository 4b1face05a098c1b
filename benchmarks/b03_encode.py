"""B3: one whole sample from its bytes to what the model takes, against `Qwen2_5OmniProcessor`.

    python -m pip install --no-deps --target DIR torchvision==0.28.0
    python -m benchmarks B3 --torchvision DIR

The processor's image and video back end needs torchvision, which this project does not. It is
installed apart, only for this comparison (see operators.py); without it nothing is timed.

Both sides start from the same bytes. Pictures and sound are decoded by the same functions; frames
for the peer by transformers' own PyAV loader and, in a row of its own, by ours. Ours also gives
labels and TMRoPE positions, which the processor leaves to the model. Before anything is timed, ids,
patches and mel frames are compared; a picture's patches with the PIL image processor's too.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks import loads, media
from benchmarks.operators import HAS_TORCHVISION
from benchmarks.report import NO_TORCHVISION, Row, compare, mean_row, not_taken, parser, show
from omni_train.data.chatml import DEFAULT_SYSTEM, count_text_tokens, media_pieces
from omni_train.data.encode import encode
from omni_train.data.image import normalize_patches
from omni_train.data.media import decode_audio, decode_image, decode_video, probe
from omni_train.data.tokenizer import CHAT_TOKENS, special_tokens, train_tokenizer
from omni_train.data.types import IndexRow, ProcessingConfig, RawSample
from omni_train.data.video import plan_clip

TEXTS = ["what is seen and heard in this recording", "a short answer in a few plain words"]
TOKENIZER = train_tokenizer(TEXTS, vocab_size=400)
CONFIG = ProcessingConfig()
SPEC = replace(loads.SPEC, tokens=special_tokens(TOKENIZER))
WHY = (
    "Half of our time is decoding frames that others are made from, which has no exact way around, "
    "then come resizing and patches (profile in NOTES.md, Encoding)"
)
IMAGE_BOUNDS, VIDEO_BOUNDS = (
    {"shortest_edge": low, "longest_edge": high}
    for low, high in (
        (CONFIG.image_min_pixels, CONFIG.image_max_pixels),
        (CONFIG.video_min_pixels, CONFIG.video_max_pixels),
    )
)


@dataclass(frozen=True, slots=True)
class Case:
    """A sample, and how the peer is handed its medium."""

    name: str
    raw: RawSample
    text: str
    peer_inputs: Callable[[], dict[str, Any]]
    goal: float
    why: str = ""


def raw_sample(kind: str, member: str, data: bytes) -> RawSample:
    """A question about one medium, with its answer."""
    question: list[dict[str, str]] = [
        {"type": kind, kind: member},
        {"type": "text", "text": TEXTS[0]},
    ]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": TEXTS[1]},
    ]
    infos = [probe(data, piece.member) for piece in media_pieces(messages)]
    row = IndexRow("sample", 0, 0, "", infos, *count_text_tokens(messages, TOKENIZER))
    return RawSample(row, {"messages": messages}, {member: data})


def chat(placeholder: str) -> str:
    """The same dialogue as text with one placeholder, as the processor takes it."""
    turns = [("system", DEFAULT_SYSTEM), ("user", placeholder + TEXTS[0]), ("assistant", TEXTS[1])]
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


def cases() -> list[Case]:
    """The three samples of the table, the last one twice."""
    from transformers.video_utils import read_video_pyav  # imports torchvision

    image, sound = media.jpeg(768, 1_024), media.wav(10.0)
    video = media.clip(30.0, height=360, width=640)
    raw_image = raw_sample("image", "0.jpg", image)
    raw_sound = raw_sample("audio", "0.wav", sound)
    raw_video = raw_sample("video", "0.mkv", video)
    sound_info, video_info = raw_sound.row.media[0], raw_video.row.media[0]

    chosen = plan_clip(video_info, CONFIG, SPEC).frames

    def video_inputs(frames: object) -> dict[str, Any]:
        return {
            "videos": [frames],
            "audio": [decode_audio(video, video_info).numpy()],
            "audio_from_video_indices": [0],
            "load_audio_from_video": True,
            "videos_kwargs": {
                "fps": CONFIG.video_fps,
                "do_sample_frames": False,
                "cap_pixels_per_frame": False,
            },
        }

    def with_its_loader() -> dict[str, Any]:
        frames, _ = read_video_pyav(io.BytesIO(video), lambda metadata, **_: chosen)
        return video_inputs(frames)

    def with_our_loader() -> dict[str, Any]:
        return video_inputs(decode_video(video, chosen, video_info))

    return [
        Case("text + image 1024x768", raw_image, chat("<|vision_bos|><|IMAGE|><|vision_eos|>"),
             lambda: {"images": [decode_image(image)[0]]}, 0.0),
        Case("text + audio 10 s", raw_sound, chat("<|audio_bos|><|AUDIO|><|audio_eos|>"),
             lambda: {"audio": [decode_audio(sound, sound_info).numpy()]}, 0.0),
        Case("text + audio-video 30 s 640x360", raw_video,
             chat("<|vision_bos|><|VIDEO|><|vision_eos|>"), with_its_loader, 5.0, WHY),
        Case("the same, peer given our frames", raw_video,
             chat("<|vision_bos|><|VIDEO|><|vision_eos|>"), with_our_loader, 0.0),
    ]  # fmt: skip


def build_peer() -> Any:
    """Return the processor with the released settings, or None where torchvision is missing."""
    if not HAS_TORCHVISION:
        return None
    from transformers import Qwen2_5OmniProcessor, WhisperFeatureExtractor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    tokenizer = train_tokenizer(TEXTS, vocab_size=400)
    for name, token in CHAT_TOKENS.items():
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    return Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(size=IMAGE_BOUNDS),
        video_processor=Qwen2VLVideoProcessor(size=VIDEO_BOUNDS),
        feature_extractor=WhisperFeatureExtractor(
            feature_size=128, n_fft=400, hop_length=160, chunk_length=300
        ),
        tokenizer=tokenizer,
    )


def check_equal(case: Case, peer: Any) -> None:
    """Hold ids, patches and mel frames of both sides to each other."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    ours = encode(case.raw, TOKENIZER, CONFIG, SPEC)
    theirs = peer(text=[case.text], return_tensors="pt", **case.peer_inputs())
    assert torch.equal(ours.input_ids[None], theirs["input_ids"]), case.name
    patches = normalize_patches(ours.patches, torch.float32)
    if "pixel_values_videos" in theirs:
        assert (patches - theirs["pixel_values_videos"]).abs().max() < 1e-5, case.name
    if "pixel_values" in theirs:
        # The peer resizes pictures by torchvision's 8-bit weights, which is up to two steps of
        # 1 / 255 / 0.26 off Pillow. Ours is what the PIL image processor gives.
        assert (patches - theirs["pixel_values"]).abs().max() < 2.01 / 255 / 0.26, case.name
        by_pillow = Qwen2VLImageProcessorPil(size=IMAGE_BOUNDS)
        expected = by_pillow(case.peer_inputs()["images"][0], return_tensors="pt")
        assert (patches - expected["pixel_values"]).abs().max() < 1e-5, case.name
    if "input_features" in theirs:
        kept = theirs["input_features"][0][:, : ours.mel.shape[1]]
        assert int(theirs["feature_attention_mask"].sum()) == ours.mel.shape[1]
        assert np.abs(ours.mel.numpy() - np.asarray(kept)).max() < 1e-4, case.name


def main() -> int:
    """Run the table."""
    args = parser("Encoding against Qwen2_5OmniProcessor.").parse_args()
    torch.set_num_threads(1)
    peer = build_peer()
    if peer is None:
        return not_taken(NO_TORCHVISION, as_json=args.json)
    rows: list[Row] = []
    for case in cases():
        check_equal(case, peer)
        rows.append(
            compare(
                case.name,
                lambda case=case: encode(case.raw, TOKENIZER, CONFIG, SPEC),  # type: ignore[misc]
                lambda case=case: peer(  # type: ignore[misc]
                    text=[case.text], return_tensors="pt", **case.peer_inputs()
                ),
                goal=case.goal,
                pairs=args.pairs,
                why=case.why,
            )
        )
    rows.append(mean_row("mean of the first three", rows[:3], 3.0))
    packages = ("torch", "transformers", "torchvision", "av", "numpy")
    return show(rows, packages, [], as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
