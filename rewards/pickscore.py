"""PickScore: which of two pictures the users of Pick-a-Pic would have preferred, differentiable.

Legend: n images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .card import Card
from .images import check_inputs
from .sources import seed_of, towers
from .spec import written
from .towers import Towers, check_batch_size, check_scale, kept
from .transformers_clip import POSITION_IDS, check_hidden_act, load_tokenizer, transformers_towers
from .weights import fetch, fit, local, read_state

__all__ = ["CONFIG", "SCALES", "PickScoreReward", "build"]

TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
FILES = ("model.safetensors", "pytorch_model.bin")
# CLIP ViT-H/14 as transformers describes it
CONFIG = {
    "projection_dim": 1024,
    "text_config": {
        "vocab_size": 49408,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "projection_dim": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
        "eos_token_id": 49407,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "projection_dim": 1024,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
}
# of cosine and exp(logit_scale)
SCALES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "logit": lambda cosine, logit: logit * cosine,  # Kirstain et al. 2023, eq. 1
    "cosine": lambda cosine, logit: cosine,
    "flow_grpo": lambda cosine, logit: logit * cosine / 26,  # Liu et al. 2025: about 0 to 1
}


class PickScoreReward:
    """exp(logit_scale) * cosine in a CLIP ViT-H/14 trained on preferences, or a preset of it.

    Two pictures of one prompt compare by the sigmoid of the difference of their logits. The
    preprocessing is CLIP's at 224 pixels, centre crop included.

    Args: source, a hub id, a folder or a file (model.safetensors or pytorch_model.bin, keys as
    transformers' CLIPModel), or random:<seed>; scale, one of SCALES; batch_size, images
    evaluated at once; device, where the towers live (None: where the images are).
    """

    differentiable = True
    wants_references = False
    card = Card(
        weights="yuvalkirstain/PickScore_v1",
        size="3.9 GB",
        licence="unknown (the code is MIT; the model's card names none)",
        range="logit: 17 to 24 is usual; flow_grpo: about [0, 1]; cosine [-1, 1]",
        citation="Kirstain et al. 2023, Pick-a-Pic, arXiv:2305.01569",
    )

    @torch.inference_mode(False)  # the scale meets gradients later
    def __init__(
        self,
        source: str = "yuvalkirstain/PickScore_v1",
        scale: str = "logit",
        *,
        batch_size: int = 32,
        device: torch.device | str | None = None,
    ) -> None:
        check_scale(scale, SCALES, "PickScore")
        check_batch_size(batch_size)
        self.name = "pickscore"
        self.spec = written(
            "pickscore", PickScoreReward, source=source, scale=scale, batch_size=batch_size
        )
        self.scale = scale
        self.batch_size = batch_size
        self.device = None if device is None else torch.device(device)
        if seed_of(source) is None:
            self.towers = kept("pickscore", source, device, lambda: _open(source))
        else:
            self.towers = towers(source, device)
        logit = self.towers.model.get_parameter("logit_scale").detach().float().exp().cpu()
        self.logit_scale = logit.reshape(())
        low, high = SCALES[scale](torch.tensor([-1.0, 1.0]), self.logit_scale).tolist()
        self.range = (low, high)

    def __call__(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Tensor:
        check_inputs(images, prompts)
        if not len(images):
            return images.new_zeros(0, dtype=torch.float32)
        self.towers.to(self.device or images.device)
        cosine = self.towers.cosines(images, prompts, self.batch_size)
        return SCALES[self.scale](cosine, self.logit_scale.to(cosine.device)).to(images.device)


def build() -> Any:
    """The untrained ViT-H/14, a transformers CLIPModel."""
    from transformers import CLIPConfig, CLIPModel

    model: nn.Module = CLIPModel(CLIPConfig.from_dict(CONFIG))
    return model.float()


def _open(source: str) -> Towers:
    path = fetch(source, *FILES)
    model = build()
    check_hidden_act(model, CONFIG, "gelu", source)
    fit(model, read_state(path), path, ignore=POSITION_IDS)
    return transformers_towers(model, _tokenizer(source, path.parent), {})


def _tokenizer(source: str, folder: Path) -> Any:
    """CLIP's vocabulary: the one beside local weights, else the one the authors score with."""
    if local(source).exists():
        beside = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
        return load_tokenizer(str(folder) if beside else TOKENIZER)
    try:
        return load_tokenizer(TOKENIZER)
    except ValueError:
        return load_tokenizer(source)
