"""The mean score over random augmentations of a fixed seed, which is robust to a few pixels.

Legend: n images, K draws, h w the size of an image; a draw is a crop, a flip, a change of colours
and noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_number
from ..combine import Aggregate, WeightedSum
from ..images import resize
from .aggregate import build, single

__all__ = ["Draw", "augment", "augmented", "draw"]

MOST_DRAWS = 64
GREY = (0.299, 0.587, 0.114)  # ITU-R 601, the luma of PIL and torchvision


@dataclass(frozen=True)
class Draw:
    """One augmentation: the share of each side to keep, the crop's position, flip and colours."""

    keep: float
    down: float
    across: float
    flip: bool
    brightness: float
    contrast: float
    saturation: float


def augmented(
    *parts: WeightedSum,
    draws: int = 4,
    seed: int = 0,
    crop: float = 0.1,
    flip: bool = False,
    jitter: float = 0.1,
    noise: float = 0.02,
) -> Aggregate:
    """(1/K) Σ_k r(t_k(image)), the expectation over transformations of Athalye et al. 2018.

    The paper (arXiv 1707.07397) uses it to attack a network; here it makes a reward harder to
    hack. The draws t_k depend on `seed` only and are the same for every image and call.
    Components are reported as their means over the draws.

    Args:
        parts: The reward.
        draws: Number of augmentations K.
        seed: Seed of the augmentations.
        crop: Largest share of each side that is cropped before the image is resized back.
        flip: Whether to mirror about half of the draws, which reverses text, left and right.
        jitter: Brightness, contrast and saturation are multiplied by 1 - jitter to 1 + jitter.
        noise: Standard deviation of the added normal noise.
    """
    part = single("augmented", parts)
    if _augments(part):
        raise ValueError("augmented contains another augmented, whose draws multiply; use one")
    options = {"draws": draws, "seed": seed, "crop": crop, "flip": flip}
    options |= {"jitter": jitter, "noise": noise}
    _check(**options)
    chosen = draw(draws, seed, crop, flip, jitter)

    def score(images: Tensor, prompts: Sequence[str], references: Any) -> Any:
        found = []
        for k, one in enumerate(chosen):
            field = noise * _field(seed, k, *images.shape[2:]).to(images.device) if noise else None
            x = augment(images.float(), one, field)
            found.append(part.evaluate(x, prompts, references=references))
        total = torch.stack([one for one, _ in found]).mean(0)
        names = found[0][1]
        return total, {name: torch.stack([c[name] for _, c in found]).mean(0) for name in names}

    return build("augmented", parts, score, part.range, **options)


def _check(*, draws: Any, seed: Any, crop: Any, flip: Any, jitter: Any, noise: Any) -> None:
    if type(draws) is not int or not 1 <= draws <= MOST_DRAWS:
        raise ValueError(f"augmented's draws is {draws!r} but must be from 1 to {MOST_DRAWS}")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"augmented's seed is {seed!r} but must be a whole number, 0 or more")
    if type(flip) is not bool:
        raise ValueError(f"augmented's flip is {flip!r}; give true or false")
    check_number("augmented's crop", crop, 0, 0.9)
    check_number("augmented's jitter", jitter, 0, 1)
    check_number("augmented's noise", noise, least=0)


def _augments(part: WeightedSum) -> bool:
    inner = [p.reward for p in part.parts if isinstance(p.reward, Aggregate)]
    return any(one.name == "augmented" or any(map(_augments, one.members)) for one in inner)


def draw(draws: int, seed: int, crop: float, flip: bool, jitter: float) -> list[Draw]:
    """Return the K draws of a seed, without noise. The first ones do not depend on K."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(draws):
        u = torch.rand(7, generator=generator, dtype=torch.float64).tolist()
        factors = [1 + jitter * (2 * x - 1) for x in u[4:]]
        found.append(Draw(1 - crop * u[0], u[1], u[2], flip and u[3] < 0.5, *factors))
    return found


@lru_cache(maxsize=8)
def _field(seed: int, k: int, h: int, w: int) -> Tensor:
    """Standard normal noise (3, h, w) of draw k, from the CPU, so equal on every device."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.randint(2**62, (k + 1,), generator=generator)[k].item()
    return torch.randn(3, h, w, generator=torch.Generator().manual_seed(int(state)))


def augment(images: Tensor, one: Draw, noise: Tensor | None = None) -> Tensor:
    """Apply a draw to images (n, 3, h, w) in [0, 1]; noise (3, h, w) is added at the end.

    Differentiable, with zero gradient where a pixel is clamped.
    """
    h, w = images.shape[2:]
    height, width = max(1, round(h * one.keep)), max(1, round(w * one.keep))
    top, left = round(one.down * (h - height)), round(one.across * (w - width))
    x = images[:, :, top : top + height, left : left + width]
    x = resize(x, (h, w)).clamp(0, 1)
    x = x.flip(3) if one.flip else x
    x = (one.brightness * x).clamp(0, 1)
    x = _blend(x, _grey(x).mean((2, 3), keepdim=True), one.contrast)
    x = _blend(x, _grey(x), one.saturation)
    return x if noise is None else (x + noise).clamp(0, 1)


def _grey(x: Tensor) -> Tensor:
    return (x * x.new_tensor(GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _blend(x: Tensor, to: Tensor, share: float) -> Tensor:
    return (share * x + (1 - share) * to).clamp(0, 1)
