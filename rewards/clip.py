"""CLIP similarity of picture and prompt, differentiable. Where weights come from: rewards.towers.

Legend: n images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .card import Card
from .images import check_inputs
from .openclip import WordTokenizer, build
from .sources import towers
from .spec import written
from .towers import check_batch_size, check_scale

__all__ = ["SCALES", "ClipReward", "WordTokenizer", "build"]


@dataclass(frozen=True)
class Scale:
    """How a published score is made from the cosine and exp(logit_scale)."""

    apply: Callable[[Tensor, Tensor], Tensor]
    prefix: str = ""


SCALES = {
    "cosine": Scale(lambda cosine, logit: cosine),
    "percent": Scale(lambda cosine, logit: 100 * cosine),  # torchmetrics, an item
    "logit": Scale(lambda cosine, logit: logit * cosine),
    # Hessel et al. 2021, "CLIPScore", §3
    "hessel": Scale(lambda cosine, logit: 2.5 * cosine.clamp(min=0), prefix="A photo depicts "),
    # of these two the scale alone, see ClipReward
    "diffusion_nft": Scale(lambda cosine, logit: logit * cosine / 100),
    "adv_grpo": Scale(lambda cosine, logit: logit * cosine / 30),
}


class ClipReward:
    """Cosine of picture and prompt in CLIP's space (Radford et al. 2021), or a preset of it.

    A preset is a scale and a prefix. Pictures are always resized as the tower was trained,
    bicubic and antialiased; DiffusionNFT and Adv-GRPO resize theirs bilinearly, which moves a
    score by about 1 %, so compare those with themselves.

    Args: source, see the module; scale, one of SCALES; batch_size, images evaluated at once;
    device, where the towers live (None: where the images are).
    """

    differentiable = True
    wants_references = False
    card = Card(
        weights="ViT-L-14/openai",
        size="1.7 GB",
        licence="MIT",
        range="[-1, 1]; a fitting pair has 0.2 to 0.35",
        citation="Radford et al. 2021, Learning Transferable Visual Models From Natural Language "
        "Supervision, arXiv:2103.00020",
    )

    @torch.inference_mode(False)  # the scale meets gradients later
    def __init__(
        self,
        source: str = "ViT-L-14/openai",
        scale: str = "cosine",
        *,
        batch_size: int = 32,
        device: torch.device | str | None = None,
    ) -> None:
        check_scale(scale, SCALES, "CLIP")
        check_batch_size(batch_size)
        self.name = "clip"
        self.spec = written("clip", ClipReward, source=source, scale=scale, batch_size=batch_size)
        self.scale = scale
        self.batch_size = batch_size
        self.device = None if device is None else torch.device(device)
        self.towers = towers(source, device)
        if getattr(self.towers.model, "logit_bias", None) is not None:
            raise ValueError(f"{source} is a SigLIP model; write siglip({source})")
        logit = self.towers.model.get_parameter("logit_scale").detach().float().exp().cpu()
        self.logit_scale = logit.reshape(())
        ends = torch.tensor([-1.0, 1.0])
        low, high = SCALES[scale].apply(ends, self.logit_scale).tolist()
        self.range = (low, high)

    def __call__(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Tensor:
        check_inputs(images, prompts)
        if not len(images):
            return images.new_zeros(0, dtype=torch.float32)
        self.towers.to(self.device or images.device)
        scale = SCALES[self.scale]
        prefixed = [scale.prefix + prompt for prompt in prompts]
        cosine = self.towers.cosines(images, prefixed, self.batch_size)
        return scale.apply(cosine, self.logit_scale.to(cosine.device)).to(images.device)
