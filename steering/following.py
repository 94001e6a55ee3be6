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

from steering.axes import Axes, Unclear, leaves, rows_in, take

if TYPE_CHECKING:
    from steering.schedulers import Chain

__all__ = ["Following", "follow_momentum"]


class Following:
    """Reorders what a network is handed at every step as at the first: it is kept from the head.

    What changes between steps is computed from the present rows, and is left as it is.
    """

    def __init__(self, chain: Chain):
        self._chain = chain
        self._kept: dict[tuple[Any, ...], Any] = {}  # of the first step
        self._samples: dict[str, tuple[Any, int]] = {}  # of it: the latents' argument and its rows
        self._beside: dict[str, tuple[int, int, int]] = {}  # axis, start and size of the latents

    def followed(
        self, name: str, call: dict[str | int, Any], axes: Axes, sample: str | int
    ) -> dict[str | int, Any]:
        """The call in the order of the lineage; `sample` is the argument that holds the latents."""
        lineage, rows = self._chain.lineage, rows_in(name, call, axes)
        if rows is None:
            return call
        if self._chain.step == 0:
            self._kept |= dict(leaves(call, axes, (name,)))
            self._samples[name] = call[sample], rows
            return call
        for path, value in leaves(call, axes, (name,)):
            if path != (name, sample) and not _same(self._kept.get(path), value):
                self._kept.pop(path, None)
        if lineage is None:
            return call
        order = torch.cat([lineage + i * len(lineage) for i in range(rows // len(lineage))])
        still = {path: axes[path] if path in self._kept else None for path in axes}
        moved = take(call, still, (name,), order)
        copies = rows // len(lineage)
        moved[sample] = self._latents_kept(name, call[sample], moved[sample], copies)
        return moved

    def settle(self, latents: Tensor) -> None:
        """Find the latents that the first move is given in what the networks were asked with.

        Raises Unclear, before anything is spent, where more stands beside them than can be told.
        """
        for name, (x, rows) in self._samples.items():
            if not isinstance(x, Tensor) or x.numel() == rows // len(latents) * latents.numel():
                continue
            where = _within(x, latents)
            if where is None:
                raise Unclear(
                    name, "what stands beside the latents in its first argument is not clear"
                )
            self._beside[name] = where
        self._samples.clear()

    def _latents_kept(self, name: str, x: Any, moved: Any, copies: int) -> Any:
        """The network's first argument, of which what stands beside the latents has moved."""
        last = self._chain.last
        if not isinstance(x, Tensor) or last is None or x.numel() == copies * last.numel():
            return x
        if name not in self._beside:
            raise Unclear(name, "its first argument holds more than at the first step")
        along, start, size = self._beside[name]
        moved = moved.clone()
        moved.narrow(along, start, size).copy_(x.narrow(along, start, size))
        return moved


def _same(first: Any, now: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(now, Tensor):
        return first is now or (first.shape == now.shape and torch.equal(first, now))
    return first is now or (
        isinstance(first, list | tuple)
        and isinstance(now, list | tuple)
        and len(first) == len(now)
        and all(_same(a, b) for a, b in zip(first, now, strict=True))
    )


def _within(x: Tensor, latents: Tensor) -> tuple[int, int, int] | None:
    """Along which axis, from where and how far x holds the latents; None where it does not."""
    if x.ndim != latents.ndim or len(x) % len(latents):
        return None
    longer = [d for d in range(1, x.ndim) if x.shape[d] != latents.shape[d]]
    if len(longer) != 1 or latents.shape[longer[0]] > x.shape[longer[0]]:
        return None
    along, size = longer[0], latents.shape[longer[0]]
    ours = latents.repeat(len(x) // len(latents), *[1] * (x.ndim - 1)).to(x.dtype)
    starts = (0, x.shape[along] - size)
    return next(
        ((along, s, size) for s in starts if torch.equal(x.narrow(along, s, size), ours)), None
    )


def follow_momentum(guider: Any, rows: Tensor, exchange: Callable[[Tensor], Tensor]) -> None:
    """Let the running average of a guidance (APG) follow the rows that survive."""
    for part in vars(guider).values():
        average = getattr(part, "running_average", None)
        if isinstance(average, Tensor):
            part.running_average = exchange(average)[rows.to(average.device)]
