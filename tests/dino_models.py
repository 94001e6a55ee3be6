"""Small DINO models of transformers, and pictures for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from rewards.towers.sources import randomise

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


MODELS = {
    "dinov2": (Dinov2Model, Dinov2Config(**SIZES), 1),
    "dinov2 swiglu": (Dinov2Model, Dinov2Config(**SIZES, use_swiglu_ffn=True), 1),
    "dinov2 with registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**SIZES), 5),
    "dinov3": (DINOv3ViTModel, DINOv3ViTConfig(**SIZES, num_register_tokens=4), 5),
}


def pictures(n: int, height: int = 32, width: int = 32, seed: int = 7) -> Tensor:
    x = torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed))
    return (x * 255).round() / 255


def disturbed(model: Any, seed: int = 1) -> Any:
    """Weights from a seed, such that no two of one shape could be exchanged unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    randomise(model, seed).requires_grad_(True)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.3 * noise if parameter.ndim == 1 else 0.02 * noise
    return model.eval()


def stored(kind: str, folder: Path) -> tuple[Any, int]:
    cls, config, prefix = MODELS[kind]
    model = disturbed(cls(config))
    model.save_pretrained(folder)
    return model, prefix
