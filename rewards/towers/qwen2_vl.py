"""Images as the vision tower of Qwen2-VL takes them: resized by area and cut into patches.

Both steps are those of qwen-vl-utils and transformers' Qwen2VLImageProcessor, differentiable.

Legend: n images, h w their size, p side of a patch, g number of patches of an image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..images import normalize, resize
from .dual_encoder import OPENAI_MEAN, OPENAI_STD

__all__ = ["area_size", "patches"]

FRAMES = 2  # a patch spans two frames, and an image is a video of two equal ones
MERGED = 2  # 2 x 2 patches are one token of the language model
LONGEST = 200  # largest ratio of the sides


def area_size(height: int, width: int, factor: int, pixels: int) -> tuple[int, int]:
    """Return the size (h, w) of an image after the resize to about `pixels` pixels.

    Both are multiples of `factor`, the ratio is kept as far as possible, and an image with more
    than `pixels` pixels gets at most, one with fewer at least that many. Raises ValueError if one
    side is more than 200 times the other.
    """
    if max(height, width) > LONGEST * min(height, width):
        raise ValueError(
            f"an image of {width} x {height} pixels has a side more than {LONGEST} times as long "
            "as the other, which Qwen2-VL does not take; crop it"
        )
    sides = [max(factor, round(side / factor) * factor) for side in (height, width)]
    scale = math.sqrt(height * width / pixels)
    if math.prod(sides) > pixels:
        sides = [math.floor(side / scale / factor) * factor for side in (height, width)]
    elif math.prod(sides) < pixels:
        # the reciprocal, since its rounding decides whether a side is a multiple already
        scale = math.sqrt(pixels / (height * width))
        sides = [math.ceil(side * scale / factor) * factor for side in (height, width)]
    return sides[0], sides[1]


def patches(images: Tensor, patch: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Return the patches of images and their grid.

    Args:
        images: Float (n, 3, h, w) in [0, 1] of any size.
        patch: Side p of a patch.
        pixels: Number of pixels after the resize, see `area_size`.

    Returns:
        The normalised patches, float32 (n g, 3 * 2 * p * p), in which the four patches of a token
        follow each other, and the grid, int64 (n, 3): 1, and the number of patches down and across.
    """
    factor = patch * MERGED
    size = area_size(images.shape[2], images.shape[3], factor, pixels)
    x = normalize(resize(images.float(), size, exact=True), OPENAI_MEAN, OPENAI_STD)
    n, channels = x.shape[:2]
    down, across = (side // factor for side in size)
    x = x.view(n, channels, down, MERGED, patch, across, MERGED, patch)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    x = x.expand(*x.shape[:6], FRAMES, patch, patch)
    grid = torch.tensor([[1, down * MERGED, across * MERGED]], device=x.device)
    return x.reshape(-1, channels * FRAMES * patch * patch), grid.repeat(n, 1)
