"""Likeness to reference pictures in DINO's features. Where weights come from: rewards.vit.

Legend: n images, m references of one, p patches of a picture, d features; c and x_i are the unit
vectors of an image (CLS token, patch i), r and y_j those of a reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from .card import Card
from .images import check_inputs, to_images
from .spec import written
from .towers import check_batch_size
from .vit import Tokens, view

__all__ = ["MODES", "DinoReward", "aligned", "cls_cosine", "patch_max"]


def cls_cosine(image: Tokens, references: Tokens) -> Tensor:
    """c·r, (m,)."""
    return (image.cls * references.cls).sum(-1)


def patch_max(image: Tokens, references: Tokens) -> Tensor:
    """mean_i max_j x_i·y_j, (m,): every patch of the image finds its like, wherever that lies."""
    return (image.patches @ references.patches.transpose(-1, -2)).amax(-1).mean(-1)


def aligned(image: Tokens, references: Tokens) -> Tensor:
    """mean_i x_i·y_i, (m,): patches are compared with those in the same place."""
    return (image.patches * references.patches).sum(-1).mean(-1)


MODES: dict[str, Callable[[Tokens, Tokens, float], Tensor]] = {
    "cls": lambda x, y, w: cls_cosine(x, y),
    "patch_max": lambda x, y, w: patch_max(x, y),
    "aligned": lambda x, y, w: aligned(x, y),
    "hybrid": lambda x, y, w: w * cls_cosine(x, y) + (1 - w) * patch_max(x, y),
}
POOLS: dict[str, Callable[[Tensor], Tensor]] = {"max": Tensor.amax, "mean": Tensor.mean}


class DinoReward:
    """Cosine of an image and its references in the space of DINOv2 (Oquab et al. 2023) or v3.

    cls c·r; patch_max mean_i max_j x_i·y_j; aligned mean_i x_i·y_i; hybrid w·cls +
    (1 - w)·patch_max. w = 0.7 and the largest value over several references are Adv-GRPO's
    (Mao et al. 2025), which draws 64 patches at random where all are taken here. Registers are
    no patches. Pictures are resized to `size` (shortest side, bicubic and antialiased, centre
    square). Adv-GRPO squashes them to 518 x 518 without antialiasing, which no DINO was trained
    with: `size=518` takes over the size alone, and its scores are not to be had here.

    Args: source and size (None: 224, or what the model was made for where that is less), see
    rewards.vit; pool, max or mean over the references of an image; cls_weight, w
    of hybrid; batch_size, images evaluated at once; device, where the model lives (None: where
    the images are).
    """

    differentiable = True
    wants_references = True
    range: tuple[float | None, float | None] = (-1.0, 1.0)
    card = Card(
        weights="facebook/dinov2-base",
        size="346 MB",
        licence="Apache-2.0 (DINOv2); DINOv3 License, gated (DINOv3)",
        range="[-1, 1]",
        citation="Oquab et al. 2023, DINOv2, arXiv 2304.07193; Siméoni et al. 2025, DINOv3, "
        "arXiv 2508.10104; Mao et al. 2025, Adv-GRPO, arXiv 2511.20256",
    )

    def __init__(
        self,
        source: str = "facebook/dinov2-base",
        mode: str = "cls",
        *,
        size: int | None = None,
        pool: str = "max",
        cls_weight: float = 0.7,
        batch_size: int = 32,
        device: torch.device | str | None = None,
    ) -> None:
        for label, value, known in (("mode", mode, MODES), ("pool", pool, POOLS)):
            if value not in known:
                close = get_close_matches(str(value), known, 1) or [next(iter(known))]
                raise ValueError(
                    f"the DINO {label} {value!r} is unknown; "
                    f"did you mean {close[0]!r} of {list(known)}?"
                )
        if not isinstance(cls_weight, int | float) or not 0 <= cls_weight <= 1:
            raise ValueError(f"cls_weight is {cls_weight!r} but must lie in [0, 1]; 0.7 is usual")
        check_batch_size(batch_size)
        self.name = "dino"
        self.spec = written(
            "dino",
            DinoReward,
            source=source,
            mode=mode,
            size=size,
            pool=pool,
            cls_weight=cls_weight,
            batch_size=batch_size,
        )
        self.mode, self.pool, self.cls_weight = mode, pool, cls_weight
        self.batch_size = batch_size
        self.device = None if device is None else torch.device(device)
        self.view = view(source, size, device)

    def __call__(self, images: Tensor, prompts: Sequence[str], *, references: Any = None) -> Tensor:
        check_inputs(images, prompts)
        if not len(images):
            return images.new_zeros(0, dtype=torch.float32)
        entries = _entries(references, len(images))
        tokens = self._tokens(images)
        known: dict[int, Tokens] = {}  # particles of one prompt have the same list of references
        scores = []
        for i, entry in enumerate(entries):
            if id(entry) not in known:
                found = [self.view.reference(picture) for picture in _pictures(entry, i)]
                known[id(entry)] = Tokens(*(torch.stack(part) for part in zip(*found, strict=True)))
            scores.append(
                self._likeness(Tokens(tokens.cls[i], tokens.patches[i]), known[id(entry)])
            )
        return torch.stack(scores).to(images.device)

    def image_features(self, images: Tensor) -> Tensor:
        """The CLS tokens of images (n, 3, h, w) in [0, 1], as unit vectors (n, d), float32."""
        check_inputs(images, [""] * len(images))
        if not len(images):
            raise ValueError("there are no images to take features of; give at least one")
        return self._tokens(images).cls.to(images.device)

    def _tokens(self, images: Tensor) -> Tokens:
        self.view.to(self.device or images.device)
        return self.view.tokens(images, self.batch_size)

    def _likeness(self, image: Tokens, references: Tokens) -> Tensor:
        with torch.autocast(image.cls.device.type, enabled=False):
            return POOLS[self.pool](MODES[self.mode](image, references, self.cls_weight))


def _entries(references: Any, count: int) -> Sequence[Any]:
    """One entry an image, or ValueError that says how references are given."""
    if references is None:
        raise ValueError(
            "the DINO reward compares with reference pictures but got none; give each prompt its "
            'own, steer(..., references=[...]) or "references": [...] in the lines of a .jsonl file'
        )
    if not hasattr(references, "__len__") or len(references) != count:
        got = len(references) if hasattr(references, "__len__") else type(references).__name__
        raise ValueError(
            f"{count} images need references of {count} entries but got {got}; "
            "give one picture, or a list of pictures, for each"
        )
    return list(references)


def _pictures(entry: Any, index: int) -> list[Tensor]:
    """Each (1, 3, h, w), of an entry that is a picture, m of them in a tensor, or a list."""
    if entry is not None and not (hasattr(entry, "__len__") and not len(entry)):
        parts = entry if isinstance(entry, list | tuple) else [entry]
        return [row for part in parts for row in to_images(part).split(1)]
    raise ValueError(
        f"the DINO reward has no reference picture for image {index}; give it at least one, "
        'steer(..., references=[...]) or "references": [...] in its line of the .jsonl file'
    )
