"""Features of the same pictures, computed once for all rewards that look at them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["shared", "sharing"]

T = TypeVar("T")
# None outside `sharing()`: a reward called by itself keeps nothing of its pictures
_TABLE: ContextVar[dict[Any, tuple[Any, ...]] | None] = ContextVar("shared features", default=None)


@contextmanager
def sharing() -> Iterator[None]:
    """Within it, `shared` remembers. A sum of rewards opens it for each evaluation."""
    if _TABLE.get() is not None:  # a sum inside a sum uses the outer one's
        yield
        return
    token = _TABLE.set({})
    try:
        yield
    finally:
        _TABLE.reset(token)


def shared(owner: Any, images: Tensor, make: Callable[[], T]) -> T:
    """`make()`, the features that `owner` (a tower) sees in `images`, or what it gave before.

    The very same tensor object is asked for. Features made without gradients are no substitute
    for those with; these do for both.
    """
    table = _TABLE.get()
    if table is None:
        return make()
    key = (id(owner), id(images), True)
    if not torch.is_grad_enabled() and key not in table:
        key = (id(owner), id(images), False)
    if key not in table:
        table[key] = (make(), owner, images)  # the last two keep their ids from being used again
    return table[key][0]
