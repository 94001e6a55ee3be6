"""SigLIP and SigLIP 2 similarity of an image and its prompt, differentiable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ..towers.dual_encoder import Towers, shared_towers
from ..towers.openclip import bpe_tokenizer
from ..towers.sources import randomise, seed_of, towers
from ..towers.transformers_clip import HALF, lower, transformers_towers
from .base import Card, CosineReward, Scale

__all__ = ["SiglipReward"]


class SiglipReward(CosineReward):
    """Cosine of image and prompt in SigLIP's space, its logit, or the sigmoid of the logit.

    The probability that image and prompt belong together is sigmoid(t * cosine + b) (Zhai et al.
    2023, "Sigmoid Loss for Language Image Pre-Training", eq. 1), with the learned scale t and
    bias b.

    Args:
        source: A SigLIP of open_clip or transformers, see `rewards.towers.sources`.
        scale: One of `scales`.
        batch_size: Number of images evaluated at once.
        device: Device of the towers; None follows the images.
    """

    title = "SigLIP"
    scales: ClassVar[Mapping[str, Scale]] = {
        "cosine": lambda cosine, t, b: cosine,
        "logit": lambda cosine, t, b: t * cosine + b,
        "probability": lambda cosine, t, b: (t * cosine + b).sigmoid(),
    }
    card = Card(
        weights="google/siglip2-base-patch16-224",
        size="1.5 GB",
        licence="Apache-2.0",
        range="cosine [-1, 1]; probability [0, 1], near 0 for most pairs",
        citation="Zhai et al. 2023, arXiv:2303.15343; Tschannen et al. 2025, SigLIP 2, "
        "arXiv:2502.14786",
    )

    def __init__(
        self,
        source: str = "google/siglip2-base-patch16-224",
        scale: str = "cosine",
        *,
        batch_size: int = 32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__("siglip", source=source, scale=scale, batch_size=batch_size, device=device)
        seed = seed_of(source)
        self._use(
            towers(source, device)
            if seed is None
            else shared_towers("siglip", source, device, lambda: _open_random(seed))
        )
        if getattr(self.towers.model, "logit_bias", None) is None:
            raise ValueError(f"{source} has no logit_bias, so it is a CLIP; use clip({source})")


def _open_random(seed: int) -> Towers:
    from transformers import BatchEncoding, SiglipConfig, SiglipModel

    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shared |= {"num_attention_heads": 2}
    text = shared | {"vocab_size": 49408, "max_position_embeddings": 64}
    vision = shared | {"image_size": 32, "patch_size": 8}
    model: Any = randomise(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)), seed)
    model.logit_scale.fill_(2.302585)  # log 10 and -10 are the initial values of training, §3.2
    model.logit_bias.fill_(-10.0)

    def tokenizer(prompts: list[str], **options: Any) -> BatchEncoding:
        return BatchEncoding({"input_ids": bpe_tokenizer(64)(prompts)})

    given = {"size": {"height": 32, "width": 32}}
    return transformers_towers(model, tokenizer, given, HALF, HALF, lower)
