"""PickScore, which predicts what Pick-a-Pic's users prefer, differentiable."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..towers.checkpoints import fetch, fit, local, read_state
from ..towers.dual_encoder import Towers, shared_towers
from ..towers.sources import seed_of, towers
from ..towers.transformers_clip import (
    POSITION_IDS,
    check_hidden_act,
    load_tokenizer,
    transformers_towers,
)
from .base import Card, CosineReward, Scale

__all__ = ["CONFIG", "PickScoreReward", "build"]

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


class PickScoreReward(CosineReward):
    """exp(logit_scale) * cosine in a CLIP ViT-H/14 trained on preferences, or a scale of it.

    The sigmoid of the difference of two logits is the probability that the first of two images
    of one prompt is preferred. The preprocessing is that of CLIP at 224 pixels, with a centre
    crop.

    Args:
        source: A hub id, a folder or a file (model.safetensors or pytorch_model.bin with the keys
            of transformers' CLIPModel), or `random:<seed>`.
        scale: One of `scales`.
        batch_size: Number of images evaluated at once.
        device: Device of the towers; None follows the images.
    """

    title = "PickScore"
    scales: ClassVar[Mapping[str, Scale]] = {
        "logit": lambda cosine, t, b: t * cosine,  # Kirstain et al. 2023, eq. 1
        "cosine": lambda cosine, t, b: cosine,
        "flow_grpo": lambda cosine, t, b: t * cosine / 26,  # Liu et al. 2025: about 0 to 1
    }
    card = Card(
        weights="yuvalkirstain/PickScore_v1",
        size="3.9 GB",
        licence="unknown (the code is MIT; the model's card names none)",
        range="logit: 17 to 24 is usual; flow_grpo: about [0, 1]; cosine [-1, 1]",
        citation="Kirstain et al. 2023, Pick-a-Pic, arXiv:2305.01569",
    )

    def __init__(
        self,
        source: str = "yuvalkirstain/PickScore_v1",
        scale: str = "logit",
        *,
        batch_size: int = 32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            "pickscore", source=source, scale=scale, batch_size=batch_size, device=device
        )
        if seed_of(source) is None:
            self._use(shared_towers("pickscore", source, device, lambda: _open(source)))
        else:
            self._use(towers(source, device))


def build() -> Any:
    """Return the untrained ViT-H/14, a transformers CLIPModel."""
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
    """Load the tokenizer in the folder of local weights, or else the one that the authors use."""
    if local(source).exists():
        beside = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
        return load_tokenizer(str(folder) if beside else TOKENIZER)
    try:
        return load_tokenizer(TOKENIZER)
    except ValueError:
        return load_tokenizer(source)
