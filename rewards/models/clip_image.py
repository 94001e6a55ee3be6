"""Similarity to reference images in CLIP's space, differentiable.

Legend: n images, m references of one image, d features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_choice
from ..references import POOLS, each_once, entries_of, pictures_of
from ..towers.sources import towers
from .base import Card, NetworkReward

__all__ = ["ClipImageReward"]


class ClipImageReward(NetworkReward):
    """Cosine of an image and its references in CLIP's space, known as CLIP-I.

    It is the likeness of an edited image to its source, or of a picture of a subject to photographs
    of it, over which DreamBooth (Ruiz et al. 2023) averages: pool=mean. The prompt has no effect.

    Args:
        source: The weights of a CLIP or SigLIP, see `rewards.towers.sources`. They are shared with
            the other rewards of the same source.
        pool: max or mean over the references of an image.
        batch_size: Number of images evaluated at once.
        device: Device of the towers; None follows the images.
    """

    title = "CLIP"
    wants_references = True
    range = (-1.0, 1.0)
    card = Card(
        weights="ViT-L-14/openai",
        size="1.7 GB",
        licence="MIT",
        range="[-1, 1]",
        citation="Radford et al. 2021, arXiv 2103.00020; Ruiz et al. 2023, DreamBooth, "
        "arXiv 2208.12242",
    )

    def __init__(
        self,
        source: str = "ViT-L-14/openai",
        pool: str = "max",
        *,
        batch_size: int = 32,
        device: torch.device | str | None = None,
    ) -> None:
        check_choice("the CLIP pool", pool, POOLS)
        super().__init__(
            "clip_image", source=source, pool=pool, batch_size=batch_size, device=device
        )
        self.pool = pool
        self.towers = towers(source, device)

    def _score(
        self, images: Tensor, prompts: Sequence[str], references: Any, device: torch.device
    ) -> Tensor:
        entries = entries_of("the CLIP image reward", references, len(images))
        self.towers.to(device)
        features = self.towers.image_features(images, self.batch_size)
        known = each_once(entries, lambda entry, i: self._features(pictures_of(entry, i)))
        with torch.autocast(features.device.type, enabled=False):
            scores = [POOLS[self.pool](r @ x) for r, x in zip(known, features, strict=True)]
        return torch.stack(scores)

    def _features(self, pictures: Sequence[Tensor]) -> Tensor:
        """Return unit vectors (m, d), in full precision and without gradients."""
        # outside inference mode, because they may take part in autograd later
        with torch.inference_mode(False), torch.no_grad():
            with torch.autocast(self.towers.device.type, enabled=False):
                found = [self.towers.image_features(picture.clone()) for picture in pictures]
            return torch.cat(found)
