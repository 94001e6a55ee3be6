"""Critics and pictures for the tests of critics."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.models.critic import CriticHead, CriticReward, FeatureModel, PreferenceModel

PROMPTS = ["a red circle", "two stars", "a cross", "four squares", "a star", "three triangles"]
N = len(PROMPTS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(seed: int, tint: float = 0.0, size: int = 40) -> Tensor:
    """N pictures of blobs, redder by `tint`."""
    coarse = torch.rand(N, 3, 5, 5, generator=generator(seed))
    x = F.interpolate(coarse, (size, size), mode="bilinear").clamp(0, 1)
    x[:, 0] = (x[:, 0] + tint).clamp(0, 1)
    return x


def untrained(**settings: Any) -> CriticReward:
    return CriticReward(FeatureModel("random:0", hidden=16, **settings))


def preference(layers: int = 1) -> CriticReward:
    return CriticReward(PreferenceModel("random:0", layers=layers))


class Colours:
    """A critic of nothing but colours, quickly made: whatever has the protocol can be trained."""

    paired = False

    def __init__(self) -> None:
        self.module = CriticHead(3, 8, generator()).requires_grad_(False)

    def __call__(self, images: Tensor, prompts: Any) -> Tensor:
        return self.score(self.logits(self.features(images), prompts))

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        patches = F.adaptive_avg_pool2d(images, 4).flatten(2).mT
        return patches.mean(1), patches

    def logits(self, features: Any, prompts: Any) -> tuple[Tensor, ...]:
        return tuple(self.module(part) for part in features)

    def score(self, logits: Any) -> Tensor:
        return logits[0]

    def save(self, folder: Any) -> None:
        raise NotImplementedError


MAKERS = {"colours": Colours, "features": untrained, "preference": preference}


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}
