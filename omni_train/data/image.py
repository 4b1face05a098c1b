"""Pixels of pictures and frames: size rule, resize, patches, normalisation on the device.

Done here: Qwen2-VL's size rule, resizing as its processors do (pictures by Pillow, frames by
torch), patch order, CLIP normalisation. Not done here: decoding (media.py), choosing frames
(video.py).

Letters: N frames, H and W pixels, P patches before the merge, D = 3 * temporal_patch_size *
patch_size ** 2 values of one patch.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from omni_train.config.errors import DataError
from omni_train.data.types import ModelSpec

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT_RATIO = 200


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Return (height, width) as multiples of `factor` within the pixel bounds, shape kept.

    The rule of Qwen2-VL's image processor.

    Raises:
        DataError: `aspect_ratio` where one side is over 200 times the other.
    """
    check_aspect(height, width)
    heights, widths = smart_resize_many(
        np.array([height]), np.array([width]), factor=factor, min_pixels=min_pixels,
        max_pixels=max_pixels,
    )  # fmt: skip
    return int(heights[0]), int(widths[0])


def check_aspect(height: int, width: int) -> None:
    """Refuse pictures that are all edge (`aspect_ratio`)."""
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise DataError(
            "aspect_ratio", f"{width}x{height} is more than {MAX_ASPECT_RATIO} to 1, the limit"
        )


def smart_resize_many(
    height: NDArray[np.int64],
    width: NDArray[np.int64],
    *,
    factor: int,
    min_pixels: int,
    max_pixels: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the sizes of many pictures by the rule of `smart_resize`, any aspect ratio."""
    area = np.maximum(height * width, 1)
    # rint rounds half to even, as Python's round does.
    plain_h = np.rint(height / factor) * factor
    plain_w = np.rint(width / factor) * factor
    too_large = plain_h * plain_w > max_pixels
    too_small = ~too_large & (plain_h * plain_w < min_pixels)

    shrink = np.sqrt(area / max_pixels)
    shrunk_h = np.maximum(factor, np.floor(height / shrink / factor) * factor)
    shrunk_w = np.maximum(factor, np.floor(width / shrink / factor) * factor)
    grow = np.sqrt(min_pixels / area)
    grown_h = np.ceil(height * grow / factor) * factor
    grown_w = np.ceil(width * grow / factor) * factor

    new_h = np.select([too_large, too_small], [shrunk_h, grown_h], plain_h)
    new_w = np.select([too_large, too_small], [shrunk_w, grown_w], plain_w)
    return new_h.astype(np.int64), new_w.astype(np.int64)


def to_frame(picture: Image.Image) -> Tensor:
    """Return uint8 [1, 3, H, W] of an RGB picture."""
    return by_pixel(np.array(picture))


def by_pixel(pixels: NDArray[np.uint8]) -> Tensor:
    """Return uint8 [1, 3, H, W] over the memory of pixels [H, W, 3]."""
    return torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)


def resize_picture(picture: Image.Image, height: int, width: int) -> Tensor:
    """Return uint8 [1, 3, height, width] of an RGB picture: Pillow's bicubic filter.

    Bit for bit what the PIL image processor does, on Pillow's own copy of the picture.
    """
    return to_frame(picture.resize((width, height), Image.Resampling.BICUBIC))


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """Return uint8 [N, 3, height, width] of frames uint8 [N, 3, H, W]: bicubic, in 8 bits.

    Bit for bit what the video processor does, by way of torchvision. Its weights are rounded, so
    that it may be two steps off Pillow; five times as fast on frames that lie by pixel.
    """
    if frames.shape[-2:] == (height, width):
        return frames
    return torch.nn.functional.interpolate(
        frames, (height, width), mode="bicubic", antialias=True, align_corners=False
    )


def patchify(frames: Tensor, spec: ModelSpec) -> tuple[Tensor, tuple[int, int, int]]:
    """Return the patches of frames uint8 [N, 3, H, W]; see `patchify_each`."""
    return patchify_each(frames.split(1), len(frames), spec)


def patchify_each(
    frames: Iterable[Tensor], num_frames: int, spec: ModelSpec
) -> tuple[Tensor, tuple[int, int, int]]:
    """Return (patches uint8 [P, D], grid of patches in time, height, width).

    The last frame is repeated up to a whole temporal patch, so a picture becomes two equal frames.
    Patches of one merge window are neighbours; a patch is laid out channel, time, height, width.
    Frames are taken one by one, so that each is copied while it is still in the cache.

    Args:
        frames: each uint8 [1, 3, H, W], H and W multiples of patch_size * merge_size.
        num_frames: how many there are, N.
        spec: sizes of the vision tower.
    """
    side, merge, deep = spec.patch_size, spec.merge_size, spec.temporal_patch_size
    # One row of a patch is moved as one item, which halves the time of moving bytes.
    row = np.dtype((np.void, side))
    out = np.empty(0, row)
    planes, rows = np.empty(0, np.uint8), np.empty(0, row)
    grid, number = (0, 0, 0), 0
    for number, frame in enumerate(frames):
        if number == 0:
            _, channels, height, width = frame.shape
            if height % (side * merge) or width % (side * merge):
                raise ValueError(f"{height}x{width} is not a multiple of {side * merge}")
            grid = (-(-num_frames // deep), height // side, width // side)
            blocks = (grid[0], grid[1] // merge, grid[2] // merge)
            out = np.empty((*blocks, merge, merge, channels, deep, side), row)
            # Frames come by pixel; rows of a patch are found in planes, which all frames share.
            planes = np.empty((channels, height, width), np.uint8)
            rows = planes.view(row).reshape(channels, blocks[1], merge, side, blocks[2], merge)
            rows = rows.transpose(1, 4, 2, 5, 0, 3)
        planes[:] = frame[0].numpy()
        out[number // deep, ..., number % deep, :] = rows
    if number + 1 != num_frames:
        raise ValueError(f"{number + 1} frames, not {num_frames}")
    for missing in range(num_frames, grid[0] * deep):
        out[-1, ..., missing % deep, :] = out[-1, ..., (num_frames - 1) % deep, :]
    patches = torch.from_numpy(out.view(np.uint8).reshape(grid[0] * grid[1] * grid[2], -1))
    return patches, grid


def normalize_patches(patches: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [P, D] in `dtype` on the patches' device: 0..255 to CLIP's mean 0, deviation 1.

    Computed in float32; equal to the `pixel_values` of the processor.
    """
    scale, shift = _scale_and_shift(patches.device)
    by_channel = patches.reshape(patches.shape[0], 3, patches.shape[1] // 3).to(torch.float32)
    return (by_channel * scale + shift).reshape(patches.shape).to(dtype)


@lru_cache(maxsize=8)
def _scale_and_shift(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return float32 [3, 1] each, kept on the device so that no step copies them there again."""
    mean = torch.tensor(CLIP_MEAN, dtype=torch.float64)[:, None]
    deviation = torch.tensor(CLIP_STD, dtype=torch.float64)[:, None]
    scale, shift = 1.0 / (255.0 * deviation), -mean / deviation
    return scale.to(device, torch.float32), shift.to(device, torch.float32)
