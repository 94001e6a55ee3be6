"""Images as tensors: conversion, checks, and a differentiable resize that equals PIL's.

Legend: n images, h w their size. Images are float ``(n, 3, h, w)`` in [0, 1], RGB.
"""

from collections.abc import Mapping, Sequence, Set
from functools import lru_cache
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from .evaluation_cache import shared

__all__ = [
    "check_inputs",
    "check_prompts",
    "normalize",
    "resize",
    "resize_matrix",
    "rgb",
    "to_images",
    "to_uint8",
]

TOLERANCE = 1e-3  # decoders exceed [0, 1] by rounding; larger values mean another range
FILTERS = {"bilinear": 1.0, "bicubic": 2.0}  # name -> support in source pixels
FIXED_POINT = 1 << 22  # PIL stores 8-bit resampling weights as integers with this divisor
PILLOW = int(PIL.__version__.partition(".")[0])


def check_inputs(images: Tensor, prompts: Sequence[str]) -> None:
    """Require float images ``(n, 3, h, w)`` in [0, 1] (tolerance 1e-3) and n prompts."""
    shape = tuple(images.shape) if isinstance(images, Tensor) else ()
    if len(shape) != 4 or shape[1] != 3 or min(shape[2:]) < 1:
        raise ValueError(
            "a reward takes images of shape (n, 3, h, w), h and w at least 1, but got "
            f"{shape or type(images).__name__}; convert them with rewards.images.to_images()"
        )
    if not images.is_floating_point():
        raise ValueError(
            f"a reward takes float images in [0, 1] but got {images.dtype}; "
            "convert them with rewards.images.to_images()"
        )
    check_prompts(prompts)
    if len(prompts) != len(images):
        raise ValueError(
            f"{len(images)} images need a list of {len(images)} prompts but got {len(prompts)}"
        )
    if images.numel() == 0:
        return
    low, high = shared("extremes", images, lambda: _extremes(images))
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
        raise ValueError(
            f"a reward takes images in [0, 1] but these lie in [{low:.4g}, {high:.4g}]; "
            "scale them to [0, 1] first ((x + 1) / 2 for a VAE's [-1, 1], x / 255 for bytes)"
        )


def check_prompts(prompts: Any) -> None:
    """Require a sequence of strings that UTF-8 can encode."""
    a_list = hasattr(prompts, "__len__") and not isinstance(prompts, str | Mapping | Set)
    if not a_list:
        got = "one string" if isinstance(prompts, str) else f"{prompts!r:.80}"
        raise ValueError(f"prompts must be a list of texts, one for each image, but got {got}")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ValueError(f"a prompt is {prompt!r:.80} but must be text; give '' for no prompt")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"the prompt {prompt!r:.80} holds half a character (a lone surrogate); read it as "
                "UTF-8"
            ) from None


def _extremes(images: Tensor) -> list[float]:
    return torch.stack(images.detach().aminmax()).tolist()


def to_images(pictures: Any, device: torch.device | str | None = None) -> Tensor:
    """Convert one image or several to float32 ``(n, 3, h, w)`` in [0, 1].

    Takes a PIL image (see `rgb`), a NumPy array (h, w, 3) or (n, h, w, 3), a tensor (3, h, w) or
    (n, 3, h, w) (or channels last, if only that fits), or a sequence of these of one size.
    Bytes are divided by 255; floats must already be in [0, 1]. Raises ValueError for anything else.
    """
    if isinstance(pictures, Sequence) and not isinstance(pictures, str | bytes):
        parts = [to_images(picture, device) for picture in pictures]
        if not parts:
            raise ValueError("to_images() got an empty sequence; pass at least one image")
        sizes = {tuple(part.shape[2:]) for part in parts}
        if len(sizes) > 1:
            raise ValueError(f"images of one size are needed but got (h, w) {sorted(sizes)}")
        return torch.cat(parts)
    if isinstance(pictures, Image.Image):
        pictures = np.array(rgb(pictures))
    if isinstance(pictures, np.ndarray):
        x = _channels_first(torch.from_numpy(np.array(pictures)), last=True)
    elif isinstance(pictures, Tensor):
        x = _channels_first(pictures, last=False)
    else:
        raise ValueError(
            "to_images() takes PIL images, NumPy arrays or tensors but got a "
            f"{type(pictures).__name__}; open files with PIL.Image.open()"
        )
    x = x.contiguous()  # strided channels would slow down everything that follows
    if x.dtype == torch.uint8:
        x = x.to(device).float() / 255
    elif x.is_floating_point():
        x = x.to(device).float()
    else:
        raise ValueError(f"images are bytes or floats in [0, 1] but got {x.dtype}")
    check_inputs(x, [""] * len(x))
    return x


def rgb(picture: Image.Image) -> Image.Image:
    """Convert a PIL image of any 8-bit mode to RGB.

    Transparency is dropped, not blended, as in CLIP's own preprocessing. Raises ValueError for
    modes with more bits, such as I and F: Pillow clips them at 255, which would turn a 16-bit
    image white.
    """
    if picture.mode.partition(";")[0] in ("I", "F"):
        raise ValueError(
            f"an image has PIL's mode {picture.mode!r}, with more than 8 bits per pixel, whose "
            "value of white is not known; save it with 8 bits per channel"
        )
    return picture.convert("RGB")


def _channels_first(x: Tensor, *, last: bool) -> Tensor:
    """Convert (h, w, 3), (n, h, w, 3), (3, h, w) or (n, 3, h, w) to (n, 3, h, w)."""
    shape = tuple(x.shape)
    x = x.unsqueeze(0) if x.ndim == 3 else x
    if x.ndim == 4:
        fits_last, fits_first = x.shape[-1] == 3, x.shape[1] == 3
        if fits_last and (last or not fits_first):
            return x.permute(0, 3, 1, 2)
        if fits_first:
            return x
    raise ValueError(f"images have three channels, (n, h, w, 3) or (n, 3, h, w), but got {shape}")


def to_uint8(images: Tensor) -> np.ndarray:
    """Bytes (n, h, w, 3), rounded to the nearest as diffusers does when it saves a PNG."""
    x = images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return np.ascontiguousarray(x.permute(0, 2, 3, 1).cpu().numpy())


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (x - mean) / std for each colour channel."""
    m, s = (images.new_tensor(v).view(1, 3, 1, 1) for v in (mean, std))
    return (images - m) / s


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # the cached tensor may take part in autograd later
def resize_matrix(
    source: int, target: int, filter: str = "bicubic", window: tuple[int, int] | None = None
) -> Tensor:
    """Return the (target, source) weights of one antialiased pass, float64, each row summing to 1.

    Pixel i of the result is centred at (i + 1/2)·source/target; downscaling widens the kernel by
    the same factor. The bicubic kernel is Keys' with a = -1/2, as in PIL. `window` selects the
    rows from its first number up to its second.
    """
    scale = source / target
    width = max(scale, 1.0)
    reach = FILTERS[filter] * width
    centre = (torch.arange(*(window or (0, target)), dtype=torch.float64) + 0.5) * scale
    first = (centre - reach + 0.5).long().clamp(min=0)  # long() truncates, as C does
    end = (centre + reach + 0.5).long().clamp(max=source)
    pixel = torch.arange(source)
    t = ((pixel + 0.5 - centre[:, None]) / width).abs()
    if filter == "bilinear":
        weight = (1 - t).clamp(min=0)
    else:
        near = (1.5 * t - 2.5) * t * t + 1
        far = ((-0.5 * t + 2.5) * t - 4) * t + 2
        weight = torch.where(t < 1, near, torch.where(t < 2, far, torch.zeros_like(t)))
    weight = weight * ((pixel >= first[:, None]) & (pixel < end[:, None]))
    return weight / weight.sum(1, keepdim=True)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _bands(
    source: int, target: int, filter: str, window: tuple[int, int]
) -> list[tuple[int, int, Tensor]]:
    """Return the weights in bands of an eighth of the rows, without columns that are 0 in a band.

    Each entry is (first column, end column, weights). Pixels depend on their neighbourhood only,
    so this saves at least half of the arithmetic.
    """
    bands = []
    matrix = resize_matrix(source, target, filter, window)
    for rows in matrix.split(max(16, -(-len(matrix) // 8))):
        used = (rows != 0).any(0).nonzero().flatten()
        first, end = int(used[0]), int(used[-1]) + 1
        bands.append((first, end, rows[:, first:end].contiguous()))
    return bands


def resize(
    images: Tensor,
    size: tuple[int, int],
    filter: str = "bicubic",
    exact: bool = False,
    window: tuple[tuple[int, int], tuple[int, int]] | None = None,
) -> Tensor:
    """Resize as PIL does, antialiased and differentiably: two matrix products, clamped in between.

    PIL clips to bytes after each of its two passes. Without the clip between them a sharp image
    that is enlarged differs by up to 46/255.

    Args:
        images: Float (n, 3, h, w) in [0, 1].
        size: The new size (H, W).
        filter: bicubic or bilinear.
        exact: Whether to repeat PIL's integer arithmetic and return exactly its bytes, with a
            straight-through gradient. False leaves out PIL's rounding only, which changes images
            of bytes by at most 1.5/255.
        window: The rows and columns of the result to compute, ((top, bottom), (left, right)).

    Returns:
        Images of the same dtype and device; half precision is computed in float32.
    """
    if filter not in FILTERS:
        raise ValueError(f"filter is {filter!r} but resize() knows {sorted(FILTERS)}")
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size is {size} but must be (H, W) of positive integers")
    dtype = torch.promote_types(images.dtype, torch.float32)
    if exact and images.device.type != "mps":  # without float64 the error is at most 2/255
        dtype = torch.float64
    h, w = images.shape[2:]
    rows, columns = window or ((0, height), (0, width))
    x = images.to(dtype)
    x = x if width != w else x[..., slice(*columns)]
    x = x if height != h else x[..., slice(*rows), :]
    x = _round(x * 255) if exact else x
    passes = ["width"] * (width != w) + ["height"] * (height != h)
    # Pillow 13 reduces the height first if that is faster; the clip makes the order matter
    if PILLOW >= 13 and h - height > max(0, 2 * (w - width)):
        passes.reverse()
    with torch.autocast(images.device.type, enabled=False):
        for axis in passes:
            part = (w, width, filter, columns) if axis == "width" else (h, height, filter, rows)
            x = _resample(x, axis, _bands(*part), exact)
            x = _round(x) if exact else x.clamp(0, 1)
    return (x / 255 if exact else x).to(images.dtype)


def _resample(x: Tensor, axis: str, bands: list[tuple[int, int, Tensor]], exact: bool) -> Tensor:
    """Multiply one axis of x by the weights in bands."""
    parts = []
    for first, end, weights in bands:
        weights = (weights * FIXED_POINT).round() / FIXED_POINT if exact else weights
        weights = weights.to(x.dtype).to(x.device)
        if axis == "width":
            parts.append(x[..., first:end] @ weights.T)
        else:
            parts.append(weights @ x[..., first:end, :])
    return torch.cat(parts, -1 if axis == "width" else -2)


def _round(x: Tensor) -> Tensor:
    """Clip to [0, 255] and round halves up, as PIL does, with a straight-through gradient."""
    x = x.clamp(0, 255)
    whole = (x.detach() + 0.5).floor()
    return whole + (x - x.detach())
