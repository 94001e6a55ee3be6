"""CLIP similarity of an image and its prompt, differentiable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from ..towers.sources import towers
from .base import Card, CosineReward, Scale

__all__ = ["ClipReward"]


class ClipReward(CosineReward):
    """Cosine of image and prompt in CLIP's space (Radford et al. 2021), or a published scale of it.

    Images are always resized as the tower was trained, bicubic and antialiased. DiffusionNFT and
    Adv-GRPO resize theirs bilinearly, which changes a score by about 1 %, so compare scores of
    `diffusion_nft` and `adv_grpo`, which only reproduce the scale, with each other.

    Args:
        source: The weights, see `rewards.towers.sources`.
        scale: One of `scales`; `hessel` also puts "A photo depicts" before each prompt.
        batch_size: Number of images evaluated at once.
        device: Device of the towers; None follows the images.
    """

    title = "CLIP"
    scales: ClassVar[Mapping[str, Scale]] = {
        "cosine": lambda cosine, t, b: cosine,
        "percent": lambda cosine, t, b: 100 * cosine,  # torchmetrics, for one image
        "logit": lambda cosine, t, b: t * cosine,
        # Hessel et al. 2021, "CLIPScore", §3
        "hessel": lambda cosine, t, b: 2.5 * cosine.clamp(min=0),
        "diffusion_nft": lambda cosine, t, b: t * cosine / 100,
        "adv_grpo": lambda cosine, t, b: t * cosine / 30,
    }
    prefixes: ClassVar[Mapping[str, str]] = {"hessel": "A photo depicts "}
    card = Card(
        weights="ViT-L-14/openai",
        size="1.7 GB",
        licence="MIT",
        range="[-1, 1]; a matching pair has 0.2 to 0.35",
        citation="Radford et al. 2021, Learning Transferable Visual Models From Natural Language "
        "Supervision, arXiv:2103.00020",
    )

    def __init__(
        self,
        source: str = "ViT-L-14/openai",
        scale: str = "cosine",
        *,
        batch_size: int = 32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__("clip", source=source, scale=scale, batch_size=batch_size, device=device)
        self._use(towers(source, device))
        if getattr(self.towers.model, "logit_bias", None) is not None:
            raise ValueError(f"{source} is a SigLIP model; use siglip({source})")
