"""Reference images as rewards receive them: an entry for each image, which holds one or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from .images import to_images

__all__ = ["POOLS", "each_once", "entries_of", "pictures_of"]

T = TypeVar("T")
# scores (m,) of one image and its references -> the score ()
POOLS: dict[str, Callable[[Tensor], Tensor]] = {"max": Tensor.amax, "mean": Tensor.mean}
WANTED = "one entry for each image, an image or a list of images"


def entries_of(reward: str, references: Any, count: int) -> Sequence[Any]:
    """Return one entry for each of `count` images; raises ValueError if there are others."""
    if references is None:
        raise ValueError(f"{reward} compares with references= but got none; pass {WANTED}")
    if not hasattr(references, "__len__") or len(references) != count:
        got = len(references) if hasattr(references, "__len__") else type(references).__name__
        raise ValueError(
            f"{count} images need references of {count} entries but got {got}; pass {WANTED}"
        )
    return list(references)


def pictures_of(entry: Any, index: int) -> list[Tensor]:
    """Return the images (1, 3, h, w) of an entry: one image, a tensor of several, or a list."""
    if entry is not None and not (hasattr(entry, "__len__") and not len(entry)):
        parts = entry if isinstance(entry, list | tuple) else [entry]
        return [row for part in parts for row in to_images(part).split(1)]
    raise ValueError(f"references has no image for image {index}; give at least one")


def each_once(entries: Sequence[Any], read: Callable[[Any, int], T]) -> list[T]:
    """Return read(entry, index) of each entry; one and the same object is read once.

    The particles of a prompt have the same entry.
    """
    known: dict[int, T] = {}
    for i, entry in enumerate(entries):
        if id(entry) not in known:
            known[id(entry)] = read(entry, i)
    return [known[id(entry)] for entry in entries]
