"""Resize, patches and normalisation against transformers' processors, bit for bit."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    smart_resize as hf_smart_resize,
)

from benchmarks.loads import SPEC
from omni_train.config.errors import DataError
from omni_train.data.image import (
    CLIP_MEAN,
    CLIP_STD,
    by_pixel,
    normalize_patches,
    patchify,
    resize,
    resize_picture,
    smart_resize,
    smart_resize_many,
)

MIN_PIXELS, MAX_PIXELS = 56 * 56, 300 * 300


def picture(height, width, kind, seed=0):
    """uint8 [H, W, 3]: smooth shapes, noise, or the worst case of black and white pixels."""
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "extremes":
        return (rng.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8)
    y, x = np.mgrid[:height, :width]
    shapes = 127 + 127 * np.sin(x / 17) * np.cos(y / 11)
    disc = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(height, width) / 3) ** 2
    return np.stack([shapes, np.where(disc, 255, shapes), 255 - shapes], -1).astype(np.uint8)


def to_frames(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def reference(pixels, *, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS):
    """Patches [P, D] as the processor makes them, back on the scale 0..255, and the grid."""
    processor = Qwen2VLImageProcessorPil(min_pixels=min_pixels, max_pixels=max_pixels)
    out = processor(Image.fromarray(pixels), return_tensors="np")
    values = out["pixel_values"].reshape(len(out["pixel_values"]), 3, -1)
    mean, std = (np.array(v)[:, None] for v in (CLIP_MEAN, CLIP_STD))
    steps = (values * std + mean) * 255
    return out["pixel_values"], steps.reshape(out["pixel_values"].shape), out["image_grid_thw"][0]


SIZES = [(480, 640), (640, 480), (1000, 333), (333, 1000), (291, 307), (300, 300)]
SMALL_SIZES = [(20, 30), (30, 20), (41, 47), (17, 160), (55, 56)]


@pytest.mark.parametrize("kind", ["smooth", "noise", "extremes"])
@pytest.mark.parametrize(("height", "width"), SIZES + SMALL_SIZES)
def test_patches_of_a_picture_equal_those_of_the_pil_processor(height, width, kind):
    pixels = picture(height, width, kind)
    _, expected, grid = reference(pixels)
    size = smart_resize(height, width, factor=28, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    assert (size[0] * size[1] > height * width) == ((height, width) in SMALL_SIZES) or (
        (height, width) in [(291, 307), (300, 300)]
    )
    patches, our_grid = patchify(resize_picture(Image.fromarray(pixels), *size), SPEC)
    assert our_grid == tuple(grid)
    assert patches.dtype == torch.uint8
    assert patches.shape == expected.shape
    assert np.abs(patches.numpy() - expected).max() <= 1e-3


CLIP_SIZES = [((360, 640), (364, 644)), ((640, 360), (364, 196)), ((500, 500), (504, 504)),
              ((97, 131), (364, 504)), ((1000, 333), (84, 336))]  # fmt: skip


@pytest.mark.parametrize("kind", ["smooth", "noise", "extremes"])
@pytest.mark.parametrize(("old", "new"), CLIP_SIZES)
def test_frames_of_a_clip_whatever_their_memory(old, new, kind):
    pixels = picture(*old, kind, seed=3)
    ours = resize(by_pixel(pixels), *new)
    assert torch.equal(resize(by_pixel(pixels).contiguous(), *new), ours)
    # Rounded weights against Pillow's, which takes the height of the last size first: there they
    # differ by more where values are cut off between the passes.
    if new != CLIP_SIZES[-1][1]:
        expected = np.array(Image.fromarray(pixels).resize(new[::-1], Image.Resampling.BICUBIC))
        difference = ours[0].permute(1, 2, 0).numpy().astype(int) - expected
        assert np.abs(difference).max() <= 2
        assert np.abs(difference).mean() < 0.3


@pytest.mark.parametrize("kind", ["smooth", "noise", "extremes"])
@pytest.mark.parametrize(("old", "new"), CLIP_SIZES)
def test_frames_of_a_clip_equal_the_video_processors(old, new, kind):
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    frames = torch.cat([by_pixel(picture(*old, kind, seed=seed)) for seed in (3, 4)])
    how = functional.InterpolationMode.BICUBIC
    expected = functional.resize(frames, list(new), interpolation=how, antialias=True)
    assert torch.equal(resize(frames, *new), expected)


def test_normalised_patches_equal_pixel_values():
    pixels = picture(112, 140, "noise")  # no resizing: the bytes are the same on both sides
    expected, _, _ = reference(pixels)
    patches, _ = patchify(to_frames(pixels), SPEC)
    ours = normalize_patches(patches, torch.float32)
    np.testing.assert_allclose(ours.numpy(), expected, atol=2e-6)
    assert normalize_patches(patches, torch.bfloat16).dtype == torch.bfloat16
    assert normalize_patches(patches[:0], torch.float32).shape == (0, patches.shape[1])


def test_picture_is_two_equal_frames_and_odd_clips_repeat_the_last():
    frames = torch.cat([to_frames(picture(56, 84, "noise", seed)) for seed in range(3)])
    patches, grid = patchify(frames, SPEC)
    assert grid == (2, 4, 6)
    padded, _ = patchify(torch.cat([frames, frames[-1:]]), SPEC)
    assert torch.equal(patches, padded)
    by_frame = patches.reshape(2, 24, 3, 2, 14, 14)
    assert torch.equal(by_frame[1, :, :, 0], by_frame[1, :, :, 1])
    assert not torch.equal(by_frame[0, :, :, 0], by_frame[0, :, :, 1])
    # The first patch is the top left corner of the first two frames.
    assert torch.equal(by_frame[0, 0], frames[:2, :, :14, :14].transpose(0, 1))
    # Patches of one merge window follow each other: right, then below.
    assert torch.equal(by_frame[0, 1, :, 0], frames[0, :, :14, 14:28])
    assert torch.equal(by_frame[0, 2, :, 0], frames[0, :, 14:28, :14])
    assert torch.equal(by_frame[0, 4, :, 0], frames[0, :, :14, 28:42])


def test_frames_are_resized_alike_alone_and_together():
    frames = torch.cat([to_frames(picture(61, 90, "noise", seed)) for seed in range(3)])
    together = resize(frames, 56, 84)
    alone = torch.cat([resize(frame[None], 56, 84) for frame in frames])
    assert torch.equal(together, alone)
    assert resize(frames, 61, 90).equal(frames)


def test_patchify_refuses_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="not a multiple of 28"):
        patchify(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), SPEC)


def test_smart_resize_equals_transformers():
    rng = np.random.default_rng(1)
    heights = np.concatenate([rng.integers(1, 4_000, 2_000), [14, 42, 70, 126, 28]])
    widths = np.concatenate([rng.integers(1, 4_000, 2_000), [42, 14, 70, 350, 28]])
    bounds = {"min_pixels": 128 * 28 * 28, "max_pixels": 768 * 28 * 28}
    many = smart_resize_many(heights, widths, factor=28, **bounds)
    compared = 0
    for i, (height, width) in enumerate(zip(heights.tolist(), widths.tolist(), strict=True)):
        if max(height, width) / min(height, width) > 200:
            with pytest.raises(ValueError, match="aspect ratio"):
                hf_smart_resize(height, width, **bounds)
            with pytest.raises(DataError) as caught:
                smart_resize(height, width, factor=28, **bounds)
            assert caught.value.reason == "aspect_ratio"
            continue
        expected = hf_smart_resize(height, width, **bounds)
        assert smart_resize(height, width, factor=28, **bounds) == expected
        assert (int(many[0][i]), int(many[1][i])) == expected
        compared += 1
    assert compared > 1_900
