"""Features of images, computed once for all rewards of one evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["shared", "sharing"]

T = TypeVar("T")
# None outside `sharing()`, so that a reward called by itself caches nothing
_TABLE: ContextVar[dict[Any, tuple[Any, ...]] | None] = ContextVar("shared features", default=None)


@contextmanager
def sharing() -> Iterator[None]:
    """A context in which `shared` caches. A sum of rewards opens one for each evaluation."""
    if _TABLE.get() is not None:  # a nested sum uses the outer cache
        yield
        return
    token = _TABLE.set({})
    try:
        yield
    finally:
        _TABLE.reset(token)


def shared(owner: Any, images: Tensor, make: Callable[[], T]) -> T:
    """Return `make()`, the features of `images` by `owner`, or the cached result.

    `images` is compared by identity. Features that were computed without gradients are not used
    while gradients are enabled; those with gradients are used for both.
    """
    table = _TABLE.get()
    if table is None:
        return make()
    key = (id(owner), id(images), True)
    if not torch.is_grad_enabled() and key not in table:
        key = (id(owner), id(images), False)
    if key not in table:
        table[key] = (make(), owner, images)  # holding these keeps their ids from being reused
    return table[key][0]
