"""What belongs to a row beside its latents, in the order of the lineage.

Resampling replaces rows of the latents. A pipeline may keep more of each row: a control image that
was encoded with the row's own noise, which it hands its networks at every step, or the momentum of
its guidance. Both have to follow, or a row would go on with what belongs to another.

n rows in the order of the start, a network's batch holds them c times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steering.axes import Axes, Unclear, rows_in, take

if TYPE_CHECKING:
    from steering.schedulers import Chain

__all__ = ["follow_momentum", "followed"]


def followed(
    name: str, call: dict[str | int, Any], axes: Axes, chain: Chain, sample: str | int
) -> dict[str | int, Any]:
    """The call of a network with all that is not latents in the order of the lineage.

    `sample` is the argument that holds the latents, perhaps with more beside them.
    """
    lineage, rows = chain.lineage, rows_in(name, call, axes)
    if lineage is None or rows is None:
        return call
    n = len(lineage)
    order = torch.cat([lineage.cpu() + i * n for i in range(rows // n)])
    moved = take(call, axes, (name,), order)
    moved[sample] = _beside(name, call[sample], moved[sample], chain.last, axes.get((name, sample)))
    return moved


def _beside(name: str, x: Any, moved: Any, latents: Tensor | None, axis: Any) -> Any:
    """x, of which what stands beside the latents is taken from `moved`."""
    if not isinstance(x, Tensor) or latents is None or axis != 0 or x.ndim != latents.ndim:
        return x
    longer = [d for d in range(1, x.ndim) if x.shape[d] != latents.shape[d]]
    if not longer:
        return x
    (along, *others), size = longer, latents.shape[longer[0]]
    if not others and size < x.shape[along]:
        ours = latents.repeat(len(x) // len(latents), *[1] * (x.ndim - 1)).to(x.dtype)
        for start in (0, x.shape[along] - size):
            if torch.equal(x.narrow(along, start, size), ours):
                moved = moved.clone()
                moved.narrow(along, start, size).copy_(ours)
                return moved
    raise Unclear(name, "what stands beside the latents in its first argument cannot be told apart")


def follow_momentum(guider: Any, rows: Tensor, exchange: Callable[[Tensor], Tensor]) -> None:
    """Let the running average of a guidance (APG) follow the rows that survive."""
    for part in vars(guider).values():
        average = getattr(part, "running_average", None)
        if isinstance(average, Tensor):
            part.running_average = exchange(average)[rows.to(average.device)]
