"""Base classes of the rewards that evaluate a neural network.

Legend: n images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..arguments import check_batch_size, check_choice
from ..images import check_inputs
from ..spec import Value, written
from ..towers.dual_encoder import Towers

__all__ = ["Card", "CosineReward", "NetworkReward", "Scale"]

# cosine (n,), t = exp(logit_scale) and the bias b (0 without one) -> scores (n,)
Scale = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Card:
    """Facts about a reward that a user can read before loading it.

    Every built-in reward has a card as its class attribute `card`. `weights` is the default source,
    or "" if nothing is learned, `size` the memory that these weights take in float32, and `licence`
    that of the weights, or "unknown".
    """

    weights: str
    size: str
    licence: str
    range: str
    citation: str


class NetworkReward:
    """Base class of the rewards that evaluate a network on batches of images.

    A subclass defines `__init__`, whose arguments `spec` records, and `_score`. The network is on
    `device`, or follows the images if that is None.
    """

    title: ClassVar[str]
    scales: ClassVar[Mapping[str, Any]] = {}
    card: ClassVar[Card]
    differentiable = True
    wants_references = False
    range: tuple[float | None, float | None] = (None, None)

    def __init__(
        self,
        name: str,
        *,
        batch_size: int,
        device: torch.device | str | None,
        **arguments: Value,
    ) -> None:
        if "scale" in arguments:
            check_choice(f"the {self.title} scale", arguments["scale"], self.scales)
        check_batch_size(batch_size)
        self.name = name
        self.spec = written(name, type(self), batch_size=batch_size, **arguments)
        self.scale: Any = arguments.get("scale")
        self.batch_size = batch_size
        self.device = None if device is None else torch.device(device)

    def __call__(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Tensor:
        check_inputs(images, prompts)
        if not len(images):
            return images.new_zeros(0, dtype=torch.float32)
        device = self.device or images.device
        return self._score(images, prompts, references, device).to(images.device)

    def _score(
        self, images: Tensor, prompts: Sequence[str], references: Any, device: torch.device
    ) -> Tensor:
        """Return scores (n,) of n >= 1 images; move the network to `device` first."""
        raise NotImplementedError


class CosineReward(NetworkReward):
    """Base class of the rewards that are a function of the cosine of image and prompt.

    `scales` names these functions. A subclass loads its towers and passes them to `_use`.
    """

    scales: ClassVar[Mapping[str, Scale]]
    prefixes: ClassVar[Mapping[str, str]] = {}

    @torch.inference_mode(False)  # logit_scale and logit_bias may meet gradients later
    def _use(self, towers: Towers) -> None:
        self.towers = towers
        self.logit_scale = towers.number("logit_scale").exp().cpu()
        self.logit_bias = towers.number("logit_bias").cpu()
        ends = torch.tensor([-1.0, 1.0])
        low, high = self.scales[self.scale](ends, self.logit_scale, self.logit_bias).tolist()
        self.range = (low, high)

    def _score(
        self, images: Tensor, prompts: Sequence[str], references: Any, device: torch.device
    ) -> Tensor:
        self.towers.to(device)
        prefix = self.prefixes.get(self.scale, "")
        texts = [prefix + prompt for prompt in prompts]
        cosine = self.towers.cosines(images, texts, self.batch_size)
        t, b = (x.to(cosine.device) for x in (self.logit_scale, self.logit_bias))
        return self.scales[self.scale](cosine, t, b)
