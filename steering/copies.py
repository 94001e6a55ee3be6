"""Arguments of a network with one row for each copy of the particles, not for each particle.

Guidance evaluates a network on two copies of the particles, without and with the prompt. A pipeline
may then pass two timesteps, one per copy, which works in its own call with a single particle. In a
larger batch, and in its parts, every row needs the timestep of its copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from steering.axes import Axes, Path, Unclear, leaves, take
from steering.networks import out_of_memory

__all__ = ["as_many_as_copies", "deal", "of_copies"]

_MOST = 4  # arguments that are tried together; each further one doubles the number of trials

Call = dict[str | int, Any]


def as_many_as_copies(name: str, call: Call, axes: Axes, copies: int) -> list[Path]:
    """Return the paths of tensors that seem shared by all rows but have one entry per copy."""
    return [
        path
        for path, value in leaves(call, axes, (name,))
        if axes[path] is None and isinstance(value, Tensor) and value.shape[:1] == (copies,)
    ]


def of_copies(
    name: str, call: Call, axes: Axes, paths: list[Path], ask: Callable[[Call], int | None]
) -> frozenset[Path]:
    """Return those of `paths` that have one row per copy, by trial calls of the network.

    Called with one row of its batch, the network returns one row only if each per-copy argument is
    cut to one row and each shared argument is not; otherwise it fails or returns more rows.
    ask: returns the number of output rows of a call. Raises Unclear if no trial returns one row.
    """
    one = take(call, axes, (name,), slice(0, 1))
    for number in range(min(len(paths), _MOST) + 1):
        for chosen in combinations(paths, number):
            if _gives_one_row(ask, _cut(name, one, chosen, slice(0, 1))):
                return frozenset(chosen)
    where = ", ".join(str(list(path[1:])) for path in paths)
    raise Unclear(name, f"it is not clear whether {where} has one row per guidance copy")


def deal(name: str, call: Call, paths: Iterable[Path], copies: int, n: int) -> Call:
    """Return the call with the arguments at `paths` repeated n times for each copy, one per row."""
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
