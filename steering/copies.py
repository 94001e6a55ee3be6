"""Arguments of a network with one row for each copy of the particles, not for each particle.

Guidance asks a network for its particles twice, without and with the prompt. A pipeline may hand it
two timesteps then, one a copy, however many particles a copy holds; its own call works with one
particle alone. The rows of a larger batch, and of its parts, each need that of their copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from steering.axes import Axes, Path, Unclear, leaves, take
from steering.decoding import out_of_memory

__all__ = ["as_many_as_copies", "deal", "of_copies"]

_MOST = 4  # arguments that are tried together: each more doubles the tries

Call = dict[str | int, Any]


def as_many_as_copies(name: str, call: Call, axes: Axes, copies: int) -> list[Path]:
    """What all rows seem to share, and what has as many entries as the batch has copies."""
    return [
        path
        for path, value in leaves(call, axes, (name,))
        if axes[path] is None and isinstance(value, Tensor) and value.shape[:1] == (copies,)
    ]


def of_copies(
    name: str, call: Call, axes: Axes, paths: list[Path], ask: Callable[[Call], int | None]
) -> frozenset[Path]:
    """Which of `paths` have a row for each copy: those that one row of the batch needs one of.

    The network tells it. Shown one row of its batch it gives one row if what all rows share is as
    it was, and what has a row for each copy is cut to one too; otherwise it fails, or gives more.
    ask: how many rows the network gives for a call. Raises Unclear where it never gives one.
    """
    one = take(call, axes, (name,), slice(0, 1))
    for number in range(min(len(paths), _MOST) + 1):
        for chosen in combinations(paths, number):
            if _gives_one_row(ask, _cut(name, one, chosen, slice(0, 1))):
                return frozenset(chosen)
    where = ", ".join(str(list(path[1:])) for path in paths)
    raise Unclear(name, f"whether {where} has a row for each guidance copy cannot be told")


def deal(name: str, call: Call, paths: Iterable[Path], copies: int, n: int) -> Call:
    """The call in which each of copies * n rows, copy by copy, has what `paths` say of its copy."""
    return _cut(name, call, paths, torch.arange(copies).repeat_interleave(n))


def _cut(name: str, call: Call, paths: Iterable[Path], rows: slice | Tensor) -> Call:
    return take(call, dict.fromkeys(paths, 0), (name,), rows)


def _gives_one_row(ask: Callable[[Call], int | None], call: Call) -> bool:
    try:
        return ask(call) == 1
    except Exception as error:
        if out_of_memory(error):
            raise
        return False
