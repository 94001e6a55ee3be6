"""CLIP similarity of picture and prompt, differentiable. Where weights come from: rewards.towers.

Legend: n images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from .images import check_inputs
from .spec import written
from .towers import WordTokenizer, build, towers

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
    "diffusion_nft": Scale(lambda cosine, logit: logit * cosine / 100),
    "adv_grpo": Scale(lambda cosine, logit: logit * cosine / 30),
}


class ClipReward:
    """Cosine of picture and prompt in CLIP's space (Radford et al. 2021), or a preset of it.

    Args: source, see the module; scale, one of SCALES; batch_size, images evaluated at once;
    device, where the towers live (None: where the images are).
    """

    differentiable = True
    wants_references = False

    def __init__(
        self,
        source: str = "ViT-L-14/openai",
        scale: str = "cosine",
        *,
        batch_size: int = 32,
        device: torch.device | str | None = None,
    ) -> None:
        if scale not in SCALES:
            close = get_close_matches(str(scale), SCALES, 1) or ["cosine"]
            raise ValueError(
                f"the CLIP scale {scale!r} is unknown; did you mean {close[0]!r} of {list(SCALES)}?"
            )
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(
                f"batch_size is {batch_size!r} but must be a whole number, at least 1; leave it out"
            )
        self.name = "clip"
        self.spec = written("clip", ClipReward, source=source, scale=scale, batch_size=batch_size)
        self.scale = scale
        self.batch_size = batch_size
        self.device = None if device is None else torch.device(device)
        self.towers = towers(source, device)
        logit = self.towers.model.get_parameter("logit_scale").detach().float().exp().cpu()
        self.logit_scale = logit.reshape(())
        ends = torch.tensor([-1.0, 1.0])
        low, high = SCALES[scale].apply(ends, self.logit_scale).tolist()
        self.range = (low, high)

    def __call__(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Tensor:
        check_inputs(images, prompts)
        if not len(images):
            return images.new_zeros(0, dtype=torch.float32)
        device = self.device or images.device
        self.towers.to(device)
        scale = SCALES[self.scale]
        text = self.towers.text_features([scale.prefix + prompt for prompt in prompts])
        chunks = images.split(self.batch_size)
        image = torch.cat([self.towers.image_features(chunk.to(device)) for chunk in chunks])
        with torch.autocast(device.type, enabled=False):
            cosine = (image * text).sum(-1)
            return scale.apply(cosine, self.logit_scale.to(device)).to(images.device)
