"""Rewards of plain formulas, for the tests of rewards made of rewards."""

import torch
from torch import Tensor

import rewards

HERE = __name__


N = 5


IMAGES = torch.rand(N, 3, 12, 10, generator=torch.Generator().manual_seed(0))


PROMPTS = ["a", "b", "c", "d", "e"]


RED, GREEN, BLUE = (IMAGES[:, i].mean((1, 2)) for i in range(3))


class Channel:
    """Mean of a colour channel, scaled: differentiable, in [low, high]."""

    name, differentiable, wants_references = "channel", True, False

    def __init__(self, index: int, low: float = 0.0, high: float = 1.0, nan: int = -1) -> None:
        self.index, self.nan = index, nan
        self.range: tuple[float | None, float | None] = (low, high)
        self.calls: list[int] = []

    def __call__(self, images, prompts, *, references=None):
        self.calls.append(len(images))
        low, high = self.range
        assert low is not None
        assert high is not None
        scores = low + (high - low) * images[:, self.index].float().mean((1, 2))
        bad = torch.arange(len(images)) == self.nan
        return torch.where(bad, torch.nan, scores)


def noisy_size(images, prompts):
    return images.flatten(1).std(1)


def of_references(images, prompts, references):
    return torch.tensor([float(len(entry)) for entry in references])


PARTS = {
    "r": f"r={HERE}:Channel(0)",
    "g": f"g={HERE}:Channel(1)",
    "b": f"b={HERE}:Channel(2)",
    "w": f"w={HERE}:Channel(0, -1, 1)",
    "n": f"n={HERE}:Channel(0, nan=2)",
}


def load(spec: str):
    return rewards.load(spec.format(**PARTS), imports=True)


def values(spec: str, **keywords) -> Tensor:
    return load(spec)(IMAGES, PROMPTS, **keywords)
