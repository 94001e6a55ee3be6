"""SigLIP and SigLIP 2: match of picture and prompt, differentiable. Sources: rewards.towers.

Legend: n images, t = exp(logit_scale) and b the learned scale and bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .card import Card
from .images import check_inputs
from .openclip import bpe_tokenizer
from .sources import randomise, seed_of, towers
from .spec import written
from .towers import Towers, check_batch_size, check_scale, kept
from .transformers_clip import HALF, lower, transformers_towers

__all__ = ["SCALES", "SiglipReward"]

# Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", eq. 1: of cosine, t and b
SCALES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cosine": lambda cosine, t, b: cosine,
    "logit": lambda cosine, t, b: t * cosine + b,
    "probability": lambda cosine, t, b: (t * cosine + b).sigmoid(),
}


class SiglipReward:
    """Cosine of picture and prompt, t * cosine + b, or the sigmoid of that: do they belong?

    Args: source, see rewards.towers (a SigLIP of open_clip or transformers, or random:<seed>);
    scale, one of SCALES; batch_size, images evaluated at once; device, where the towers live
    (None: where the images are).
    """

    differentiable = True
    wants_references = False
    card = Card(
        weights="google/siglip2-base-patch16-224",
        size="1.5 GB",
        licence="Apache-2.0",
        range="cosine [-1, 1]; probability [0, 1], near 0 for most pairs",
        citation="Zhai et al. 2023, arXiv:2303.15343; Tschannen et al. 2025, SigLIP 2, "
        "arXiv:2502.14786",
    )

    @torch.inference_mode(False)  # the scale meets gradients later
    def __init__(
        self,
        source: str = "google/siglip2-base-patch16-224",
        scale: str = "cosine",
        *,
        batch_size: int = 32,
        device: torch.device | str | None = None,
    ) -> None:
        check_scale(scale, SCALES, "SigLIP")
        check_batch_size(batch_size)
        self.name = "siglip"
        self.spec = written(
            "siglip", SiglipReward, source=source, scale=scale, batch_size=batch_size
        )
        self.scale = scale
        self.batch_size = batch_size
        self.device = None if device is None else torch.device(device)
        self.towers = _open(source, device)
        if getattr(self.towers.model, "logit_bias", None) is None:
            raise ValueError(f"{source} has no logit_bias, so it is a CLIP; write clip({source})")
        self.t, self.b = (
            self.towers.model.get_parameter(name).detach().float().cpu().reshape(())
            for name in ("logit_scale", "logit_bias")
        )
        self.t = self.t.exp()
        low, high = SCALES[scale](torch.tensor([-1.0, 1.0]), self.t, self.b).tolist()
        self.range = (low, high)

    def __call__(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Tensor:
        check_inputs(images, prompts)
        if not len(images):
            return images.new_zeros(0, dtype=torch.float32)
        self.towers.to(self.device or images.device)
        cosine = self.towers.cosines(images, prompts, self.batch_size)
        t, b = self.t.to(cosine.device), self.b.to(cosine.device)
        return SCALES[self.scale](cosine, t, b).to(images.device)


def _open(source: str, device: torch.device | str | None) -> Towers:
    seed = seed_of(source)
    if seed is None:
        return towers(source, device)
    return kept("siglip", source, device, lambda: _open_random(seed))


def _open_random(seed: int) -> Towers:
    from transformers import BatchEncoding, SiglipConfig, SiglipModel

    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shared |= {"num_attention_heads": 2}
    text = shared | {"vocab_size": 49408, "max_position_embeddings": 64}
    vision = shared | {"image_size": 32, "patch_size": 8}
    model: Any = randomise(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)), seed)
    model.logit_scale.fill_(2.302585)  # log 10 and -10 are what training starts from, §3.2
    model.logit_bias.fill_(-10.0)

    def tokenizer(prompts: list[str], **options: Any) -> BatchEncoding:
        return BatchEncoding({"input_ids": bpe_tokenizer(64)(prompts)})

    given = {"size": {"height": 32, "width": 32}}
    return transformers_towers(model, tokenizer, given, HALF, HALF, lower)
