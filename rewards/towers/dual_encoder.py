"""Dual encoders: the image tower and the text tower of CLIP and similar models.

`rewards.towers.sources` loads them.

Legend: n images, d features, R the tower's input side.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..evaluation_cache import shared
from ..images import normalize, resize, resize_matrix
from .checkpoints import moved
from .model_cache import loaded_once

__all__ = ["Towers", "prepare", "shared_towers"]

CACHED_PROMPTS = 4096
MODES = ("shortest", "squash", "longest")
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(eq=False)
class Towers:
    """An image tower and a text tower with the preprocessing they were trained with.

    `encode_image` takes normalised pixels (n, 3, R, R) and `encode_text` a list of n strings;
    both return (n, width) before L2 normalisation. Text features are cached by prompt. `filter`,
    `mode` and `floor` are arguments of `prepare`.
    """

    model: nn.Module
    encode_image: Callable[[Tensor], Tensor]
    encode_text: Callable[[list[str]], Tensor]
    size: tuple[int, int]
    width: int
    mean: Sequence[float] = OPENAI_MEAN
    std: Sequence[float] = OPENAI_STD
    filter: str = "bicubic"
    mode: str = "shortest"
    floor: bool = False
    _features: OrderedDict[str, Tensor] = field(default_factory=OrderedDict, repr=False)
    _lock: Any = field(default_factory=threading.RLock, repr=False)

    def __post_init__(self) -> None:
        self.model.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def number(self, name: str) -> Tensor:
        """Return a scalar parameter of the model, float32 of shape (); 0 if it is missing."""
        found = getattr(self.model, name, None)
        return torch.zeros(()) if found is None else found.detach().float().reshape(())

    def to(self, device: torch.device) -> None:
        """Move both towers; cached text features are moved when they are next used."""
        with self._lock:
            if self.device != device:
                moved(self.model, device)

    def image_features(self, images: Tensor, batch_size: int = 32) -> Tensor:
        """Unit vectors (n, d), float32, of images in [0, 1] of any size, `batch_size` at once.

        Within `rewards.evaluation_cache.sharing()` the features of a tensor are computed once.
        """
        return shared(self, images, lambda: self._look(images, batch_size))

    def _look(self, images: Tensor, batch_size: int) -> Tensor:
        chunks = images.split(batch_size)
        return torch.cat([_unit(self.encode_image(self.pixels(chunk))) for chunk in chunks])

    def pixels(self, images: Tensor) -> Tensor:
        """Return the input of `encode_image`, on its device, for images in [0, 1] of any size."""
        x = prepare(images.to(self.device), self.size, self.filter, self.mode, self.floor)
        return normalize(x, self.mean, self.std)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (n, d), float32; equal prompts are encoded once.

        Each prompt is encoded by itself and in full precision, so that its features do not depend
        on other prompts, and outside inference mode, so that they may take part in autograd later.
        """
        device = self.device
        with self._lock, torch.inference_mode(False), torch.no_grad():
            for prompt in dict.fromkeys(prompts):
                if prompt not in self._features:
                    with torch.autocast(device.type, enabled=False):
                        self._features[prompt] = _unit(self.encode_text([prompt]))[0].to(device)
                self._features.move_to_end(prompt)
            rows = torch.stack([self._features[prompt].to(device) for prompt in prompts])
            while len(self._features) > CACHED_PROMPTS:
                self._features.popitem(last=False)
        return rows

    def cosines(self, images: Tensor, prompts: Sequence[str], batch_size: int = 32) -> Tensor:
        """Return the cosine (n,) of each image and its prompt, float32, on the towers' device."""
        text = self.text_features(prompts)
        image = self.image_features(images, batch_size)
        with torch.autocast(image.device.type, enabled=False):
            return (image * text).sum(-1)


def _unit(features: Tensor) -> Tensor:
    # in half precision, by weights or autocast, rounding could change the order of scores
    with torch.autocast(features.device.type, enabled=False):
        return F.normalize(features.float(), dim=-1)


def prepare(
    images: Tensor, size: tuple[int, int], filter: str, mode: str, floor: bool = False
) -> Tensor:
    """Resize and crop (n, 3, h, w) to (n, 3, *size), float32, before normalisation.

    `shortest` resizes the shortest side and crops the centre, as OpenAI's CLIP does; `squash`
    changes the aspect ratio; `longest` resizes the longest side and pads with black. If the crop
    begins between two pixels, `floor` takes the lower one, as transformers does; otherwise the even
    one is taken, as by torchvision, which OpenAI, open_clip, timm and ImageReward use.
    """
    if mode not in MODES:
        raise ValueError(f"the resize mode is {mode!r} but must be one of {list(MODES)}")
    images = images.float()
    if mode == "squash":
        return resize(images, size, filter)
    if mode == "longest":
        return _longest(images, size, filter)
    h, w = images.shape[2:]
    height, width = size
    # all these libraries round the longer side down
    by_height = height * w >= width * h
    tall, wide = (height, height * w // h) if by_height else (width * h // w, width)
    top, left = ((n // 2) if floor else round(n / 2) for n in (tall - height, wide - width))
    # only the part inside the crop is resized, since an elongated image may be huge
    window = (top, top + height), (left, left + width)
    return resize(images, (tall, wide), filter, window=window)


def _longest(images: Tensor, size: tuple[int, int], filter: str) -> Tensor:
    """HPSv2's ResizeMaxSize on float tensors: antialiased and without clipping."""
    h, w = images.shape[2:]
    side = max(size)
    scale = side / max(h, w)
    tall, wide = max(1, round(h * scale)), max(1, round(w * scale))
    with torch.autocast(images.device.type, enabled=False):
        if wide != w:
            images = images @ resize_matrix(w, wide, filter).to(images).T
        if tall != h:
            images = resize_matrix(h, tall, filter).to(images) @ images
    left, top = (side - wide) // 2, (side - tall) // 2
    return F.pad(images, (left, side - wide - left, top, side - tall - top))


def shared_towers(
    kind: str, source: str, device: torch.device | str | None, load: Callable[[], Towers]
) -> Towers:
    """Return the towers that `load` returns, loaded once for each kind, source and device."""
    found = loaded_once(kind, source, device, load)
    if device is not None:
        found.to(torch.device(device))
    return found
