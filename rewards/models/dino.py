"""Similarity to reference images in the feature space of DINO, differentiable.

Legend: n images, m references of one image, p patches of an image, d features; c and x_i are the
unit vectors of an image (CLS token, patch i), r and y_j those of a reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_choice, check_number
from ..images import check_inputs
from ..references import POOLS, each_once, entries_of, pictures_of
from ..towers.dino_backbone import Tokens, view
from .base import Card, NetworkReward

__all__ = ["MODES", "DinoReward", "aligned", "cls_cosine", "patch_max"]


def cls_cosine(image: Tokens, references: Tokens) -> Tensor:
    """Return c·r, (m,)."""
    return (image.cls * references.cls).sum(-1)


def patch_max(image: Tokens, references: Tokens) -> Tensor:
    """Return mean_i max_j x_i·y_j, (m,), which compares each patch with its best match."""
    return (image.patches @ references.patches.transpose(-1, -2)).amax(-1).mean(-1)


def aligned(image: Tokens, references: Tokens) -> Tensor:
    """Return mean_i x_i·y_i, (m,), which compares patches at the same position."""
    return (image.patches * references.patches).sum(-1).mean(-1)


MODES: dict[str, Callable[[Tokens, Tokens, float], Tensor]] = {
    "cls": lambda x, y, w: cls_cosine(x, y),
    "patch_max": lambda x, y, w: patch_max(x, y),
    "aligned": lambda x, y, w: aligned(x, y),
    "hybrid": lambda x, y, w: w * cls_cosine(x, y) + (1 - w) * patch_max(x, y),
}


class DinoReward(NetworkReward):
    """Cosine similarity of an image and its references in the space of a DINO.

    It uses DINOv2 (Oquab et al. 2023) or DINOv3. The modes are cls, c·r; patch_max, mean_i max_j
    x_i·y_j; aligned, mean_i x_i·y_i; and hybrid, w·cls + (1 - w)·patch_max. w = 0.7 and the maximum
    over several references are Adv-GRPO's (Mao et al. 2025), which draws 64 random patches; here
    all are used, without register tokens. The shortest side is resized to `size`, bicubic and
    antialiased, and the centre square is cropped. Adv-GRPO squashes images to 518 x 518 without
    antialiasing, with which no DINO was trained: `size=518` reproduces only the size, not its
    scores.

    Args:
        source: The weights, see `rewards.towers.dino_backbone`.
        mode: One of `MODES`.
        size: Side of the input in pixels; None is 224, or the model's own size if that is less.
        pool: max or mean over the references of an image.
        cls_weight: w of the hybrid mode.
        batch_size: Number of images evaluated at once.
        device: Device of the model; None follows the images.
    """

    wants_references = True
    range = (-1.0, 1.0)
    card = Card(
        weights="facebook/dinov2-base",
        size="346 MB",
        licence="Apache-2.0 (DINOv2); DINOv3 License, gated (DINOv3)",
        range="[-1, 1]",
        citation="Oquab et al. 2023, DINOv2, arXiv 2304.07193; Siméoni et al. 2025, DINOv3, "
        "arXiv 2508.10104; Mao et al. 2025, Adv-GRPO, arXiv 2511.20256",
    )

    def __init__(
        self,
        source: str = "facebook/dinov2-base",
        mode: str = "cls",
        *,
        size: int | None = None,
        pool: str = "max",
        cls_weight: float = 0.7,
        batch_size: int = 32,
        device: torch.device | str | None = None,
    ) -> None:
        check_choice("the DINO mode", mode, MODES)
        check_choice("the DINO pool", pool, POOLS)
        check_number("cls_weight", cls_weight, 0, 1)
        own = {"source": source, "mode": mode, "size": size, "pool": pool, "cls_weight": cls_weight}
        super().__init__("dino", batch_size=batch_size, device=device, **own)
        self.mode, self.pool, self.cls_weight = mode, pool, cls_weight
        self.view = view(source, size, device)

    def _score(
        self, images: Tensor, prompts: Sequence[str], references: Any, device: torch.device
    ) -> Tensor:
        entries = entries_of("the DINO reward", references, len(images))
        tokens = self._tokens(images)
        scores = [
            self._likeness(Tokens(tokens.cls[i], tokens.patches[i]), known)
            for i, known in enumerate(each_once(entries, self._references))
        ]
        return torch.stack(scores)

    def _references(self, entry: Any, index: int) -> Tokens:
        found = [self.view.reference(picture) for picture in pictures_of(entry, index)]
        return Tokens(*(torch.stack(part) for part in zip(*found, strict=True)))

    def image_features(self, images: Tensor) -> Tensor:
        """Return the CLS tokens of images (n, 3, h, w) in [0, 1] as unit float32 vectors (n, d)."""
        check_inputs(images, [""] * len(images))
        if not len(images):
            raise ValueError("image_features() got no images; pass at least one")
        return self._tokens(images).cls.to(images.device)

    def _tokens(self, images: Tensor) -> Tokens:
        self.view.to(self.device or images.device)
        return self.view.tokens(images, self.batch_size)

    def _likeness(self, image: Tokens, references: Tokens) -> Tensor:
        with torch.autocast(image.cls.device.type, enabled=False):
            return POOLS[self.pool](MODES[self.mode](image, references, self.cls_weight))
