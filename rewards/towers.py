"""Pairs of towers, one for pictures and one for text, that CLIP and its kin consist of.

`rewards.sources` opens them.

Legend: n images, d features, R the tower's input side.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .images import normalize, resize, resize_matrix
from .sharing import shared
from .weights import local, moved, untouched

__all__ = ["Towers", "check_batch_size", "check_scale", "kept", "prepare"]

CACHED_PROMPTS = 4096
MODES = ("shortest", "squash", "longest")
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(eq=False)
class Towers:
    """An image and a text tower with the preprocessing they were trained with.

    `encode_image` takes pixels (n, 3, R, R), normalised; `encode_text` one list of strings.
    Both give (n, width) before L2 normalisation. Text features are kept by prompt. `filter`,
    `mode` and `floor` are those of `prepare`.
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

    def to(self, device: torch.device) -> None:
        """Move both towers; remembered text features follow when they are next used."""
        with self._lock:
            if self.device != device:
                moved(self.model, device)

    def image_features(self, images: Tensor, batch_size: int = 32) -> Tensor:
        """Unit vectors (n, d), float32, of images in [0, 1] of any size, `batch_size` at once.

        Within `rewards.sharing.sharing()` the same tensor is looked at once.
        """
        return shared(self, images, lambda: self._look(images, batch_size))

    def _look(self, images: Tensor, batch_size: int) -> Tensor:
        chunks = images.split(batch_size)
        return torch.cat([_unit(self.encode_image(self.pixels(chunk))) for chunk in chunks])

    def pixels(self, images: Tensor) -> Tensor:
        """What `encode_image` takes, on its device, of images in [0, 1] of any size."""
        x = prepare(images.to(self.device), self.size, self.filter, self.mode, self.floor)
        return normalize(x, self.mean, self.std)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (n, d), float32; equal prompts are encoded once.

        Each prompt is encoded by itself, in full precision, so that its features are the same
        bits whatever else is asked for, and outside inference mode, so that gradients can pass
        beside them later.
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
        """The cosine (n,) of each picture and its prompt, float32, on the towers' device."""
        text = self.text_features(prompts)
        image = self.image_features(images, batch_size)
        with torch.autocast(image.device.type, enabled=False):
            return (image * text).sum(-1)


def _unit(features: Tensor) -> Tensor:
    # half precision, of weights or of autocast, would round rankings away in the last product
    with torch.autocast(features.device.type, enabled=False):
        return F.normalize(features.float(), dim=-1)


def prepare(
    images: Tensor, size: tuple[int, int], filter: str, mode: str, floor: bool = False
) -> Tensor:
    """Bring (n, 3, h, w) to (n, 3, *size), float32, before normalisation.

    `shortest` resizes the shortest side and crops the centre, as OpenAI's CLIP does; `squash`
    ignores the proportions; `longest` resizes the longest side and fills up with black. Where
    the crop lies between two pixels, `floor` takes the lesser one, as transformers does, else
    the even one, as torchvision, which OpenAI, open_clip, timm and ImageReward use.
    """
    if mode not in MODES:
        raise ValueError(f"pictures are resized by one of {list(MODES)} but this is {mode!r}")
    images = images.float()
    if mode == "squash":
        return resize(images, size, filter)
    if mode == "longest":
        return _longest(images, size, filter)
    h, w = images.shape[2:]
    height, width = size
    # everybody rounds the longer side down
    by_height = height * w >= width * h
    tall, wide = (height, height * w // h) if by_height else (width * h // w, width)
    top, left = ((n // 2) if floor else round(n / 2) for n in (tall - height, wide - width))
    # only what the crop keeps is resized: the rest of a long, thin picture has no end
    window = (top, top + height), (left, left + width)
    return resize(images, (tall, wide), filter, window=window)


def _longest(images: Tensor, size: tuple[int, int], filter: str) -> Tensor:
    """As HPSv2's ResizeMaxSize, on float tensors: antialiased, and nothing is clipped."""
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


def check_batch_size(batch_size: Any) -> None:
    """Refuse anything but a whole number of images, at least 1, that torch can split by."""
    if type(batch_size) is not int or not 1 <= batch_size < 2**31:
        raise ValueError(
            f"batch_size is {batch_size!r} but must be a whole number, at least 1; leave it out"
        )


def check_scale(scale: Any, known: Iterable[str], kind: str) -> None:
    """Refuse a scale that is not among those known for this kind of score."""
    names = list(known)
    if scale not in names:
        close = get_close_matches(str(scale), names, 1) or names
        raise ValueError(
            f"the {kind} scale {scale!r} is unknown; did you mean {close[0]!r} of {names}?"
        )


_TOWERS: WeakValueDictionary[tuple[str, ...], Towers] = WeakValueDictionary()
_TOWERS_LOCK = threading.Lock()


@untouched()
def kept(
    kind: str, source: str, device: torch.device | str | None, make: Callable[[], Towers]
) -> Towers:
    """`make()`, or the towers that were made before of that kind, source and device."""
    folder = local(source)
    place = str(folder.resolve()) if folder.exists() else source
    key = (kind, place, str(device))
    with _TOWERS_LOCK:
        found = _TOWERS.get(key)
        if found is None:
            found = make()
            if device is not None:
                found.to(torch.device(device))
            _TOWERS[key] = found
    return found
