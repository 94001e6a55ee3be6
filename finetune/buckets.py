"""Micro-batches of groups whose images have different sizes: each is of one kind.

Groups are of one kind if one call of the network can evaluate them: their latents have one shape,
their conditioning has one form, and its tensors have equal shapes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Generator, Tensor

__all__ = ["dealt", "noises"]


def noises(shapes: Sequence[tuple[int, ...]], each: int, generator: Generator) -> list[Tensor]:
    """Draw noise (each, *shape) for every group: all of the first shape, then of the next."""
    found: dict[int, Tensor] = {}
    for shape in dict.fromkeys(shapes):
        own = [i for i, other in enumerate(shapes) if other == shape]
        drawn = torch.randn(len(own), each, *shape, generator=generator)
        found |= dict(zip(own, drawn, strict=True))
    return [found[i] for i in range(len(shapes))]


def dealt(kinds: Sequence[Hashable], rank: int, world: int, most: int) -> list[list[int]]:
    """Return the micro-batches of process `rank` of `world`: numbers of groups, at most `most`.

    kinds: of each group. Groups of one kind are neighbours, and they are dealt to the processes in
    turn. A micro-batch ends where that of any process would get a second kind, so that all
    processes have micro-batches of equal sizes, as FSDP needs, if they have equally many groups.
    """
    order = [i for kind in dict.fromkeys(kinds) for i, own in enumerate(kinds) if own == kind]
    turns = [order[i : i + world] for i in range(0, len(order), world)]
    batches: list[list[list[int]]] = []
    for turn in turns:
        last = batches[-1] if batches else []
        # only the last turn may be shorter, since some processes have no more groups
        alike = bool(last) and all(kinds[last[-1][i]] == kinds[g] for i, g in enumerate(turn))
        if alike and len(last) < most:
            last.append(turn)
        else:
            batches.append([turn])
    mine = [[turn[rank] for turn in batch if rank < len(turn)] for batch in batches]
    return [batch for batch in mine if batch]
