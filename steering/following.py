"""What belongs to a row beside its latents, in the order of the lineage.

Resampling replaces rows of the latents. A pipeline may keep more of each row: a control image that
was encoded with the row's own noise, which it hands its networks at every step, or the momentum of
its guidance. Both have to follow, or a row would go on with what belongs to another.

n rows in the order of the start, a network's batch holds them c times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steering.axes import MOST_COPIES, Path, Unclear, inside, leaves, rows_in, take

if TYPE_CHECKING:
    from steering.probe import Batch
    from steering.schedulers import Chain

__all__ = ["Following", "follow_momentum"]


class _Kept:
    """What a network was first handed at `step`; `late`, when rows had been resampled already."""

    def __init__(self, value: Tensor, step: int, late: bool):
        self.value, self.step, self.late = value, step, late
        self.stays: bool | None = None  # at a later step, and may differ from row to row
        self._version = _version(value)

    def is_same(self, value: Tensor) -> bool:
        # what is written to meanwhile is computed on the way
        return self.value is value and _version(value) == self._version

    def is_equal(self, value: Tensor) -> bool:
        kept = self.value
        alike = kept.shape == value.shape and kept.dtype == value.dtype
        unwritten = _version(kept) == self._version and kept.device == value.device
        return alike and unwritten and torch.equal(kept, value)


class Following:
    """Reorders what the networks are handed at every step as at the first: it is from the head.

    What changes between steps is computed from the present rows, and is left as it is. What stays
    is told by its numbers, whichever network, argument or call of a step it is handed to. Only for
    what stays and may differ from row to row the rows are looked for, by `batch`.
    """

    def __init__(self, chain: Chain, batch: Batch, n: int):
        self._chain, self._batch, self._n = chain, batch, n
        self._kept: list[_Kept] = []
        self._paths: dict[Path, int] = {}  # the step at which each was first handed
        self._samples: dict[str, Tensor] = {}  # of the first step, until the first move
        self._beside: dict[str, tuple[int, int, int]] = {}  # axis, start and size of the latents

    def followed(
        self, name: str, call: dict[str | int, Any], sample: str | int
    ) -> dict[str | int, Any]:
        """The call in the order of the lineage; `sample` is the argument that holds the latents."""
        lineage = self._chain.lineage
        if self._chain.step == 0 and isinstance(call[sample], Tensor):
            self._samples.pop(name, None)  # in the order in which they were last asked
            self._samples[name] = call[sample]
        staying = self._staying(name, call, sample)
        if staying:
            self._batch.learn(name, call, self._n)
        if lineage is None:
            return call
        moved = call
        if staying:
            axes = self._batch.axes
            own = {p: axes[p] for p in axes if any(path[: len(p)] == p for path in staying)}
            rows = rows_in(name, call, axes) or 0
            moved = take(call, own, (name,), _order(lineage, rows))
        return moved | {sample: self._latents_kept(name, call[sample], lineage)}

    def _staying(self, name: str, call: dict[str | int, Any], sample: str | int) -> set[Path]:
        """Where the call holds what it held before, and what may differ from row to row."""
        step, found = self._chain.step, set()
        self._kept = [kept for kept in self._kept if kept.step >= step - 1 or kept.stays]
        for path, value in leaves(call, {}, (name,)):
            if path[:2] == (name, sample):
                continue
            kept = self._like(value)
            if kept is None:
                if self._paths.setdefault(path, step) == step:
                    self._kept.append(_Kept(value, step, self._chain.lineage is not None))
                continue
            if kept.stays is None:
                kept.stays = _may_differ(value, inside(call, path[1:-1]), self._n)
            if kept.stays and kept.late:
                where = list(path[1:])
                raise Unclear(name, f"its argument {where} came after the first resampling")
            if kept.stays:
                found.add(path)
        return found

    def _like(self, value: Tensor) -> _Kept | None:
        """What was kept of an earlier step and holds the same numbers."""
        earlier = [kept for kept in self._kept if kept.step < self._chain.step]
        same = next((kept for kept in earlier if kept.is_same(value)), None)
        return same or next((kept for kept in earlier if kept.is_equal(value)), None)

    def settle(self, latents: Tensor) -> None:
        """Find the latents that the first move is given in what the networks were asked with.

        Raises Unclear, before anything is spent, where more stands beside them than can be told.
        """
        for name, x in self._samples.items():
            where = None if _holds_only(x, latents) else _within(x, latents)
            if where is not None:
                self._beside[name] = where
            elif name == [*self._samples][-1] and not _holds_only(x, latents):
                raise Unclear(  # another may belong to the head, as a prior does
                    name, "what stands beside the latents in its first argument is not clear"
                )
        self._samples.clear()

    def _latents_kept(self, name: str, x: Any, lineage: Tensor) -> Any:
        """The network's first argument, of which what stands beside the latents has moved."""
        last = self._chain.last
        if not isinstance(x, Tensor) or last is None or _holds_only(x, last):
            return x
        if name not in self._beside:
            raise Unclear(name, "its first argument holds more than at the first step")
        return _moved(x, lineage, *self._beside[name])

    def returned(self, latents: Any) -> Any:
        """What the pipeline returns, of which what stands beside the last latents has moved."""
        last, lineage = self._chain.last, self._chain.lineage
        if not isinstance(latents, Tensor) or last is None or lineage is None:
            return latents
        where = None if _holds_only(latents, last) else _within(latents, last)
        return latents if where is None else _moved(latents, lineage, *where)


def _moved(x: Tensor, lineage: Tensor, along: int, start: int, size: int) -> Tensor:
    """x in the order of the lineage, but for the latents in it."""
    moved = x[_order(lineage, len(x)).to(x.device)]
    moved.narrow(along, start, size).copy_(x.narrow(along, start, size))
    return moved


def _order(lineage: Tensor, rows: int) -> Tensor:
    """Where each of a batch's rows comes from, copy by copy."""
    n = len(lineage)
    return torch.cat([lineage + i * n for i in range(rows // n)])


def _version(value: Tensor) -> int | None:
    return None if value.is_inference() else value._version


def _holds_only(x: Tensor, latents: Tensor) -> bool:
    """Whether x is as many rows as the latents, or copies of them, and nothing beside."""
    copies, rest = divmod(len(x), len(latents))
    return rest == 0 and x.numel() == copies * latents.numel()


def _may_differ(value: Tensor, holder: Any, n: int) -> bool:
    """Whether n particles may each have something else in `value`, as far as its form can tell.

    holder: what it is an item of. Rows on the first axis, or items of a list, are compared; where
    rows may be elsewhere they may differ, unless everything is the same number.
    """
    if isinstance(holder, list | tuple) and _are_rows(len(holder), n):
        alike = all(isinstance(one, Tensor) and one.shape == value.shape for one in holder)
        return not alike or _may_differ(torch.stack(list(holder)), None, n)
    if value.ndim and _are_rows(len(value), n):
        copies = value.unflatten(0, (-1, n))
        return not torch.equal(copies, copies[:, :1].expand_as(copies))
    if all(size % n for size in value.shape):
        return False
    return not torch.equal(value, value.flatten()[0].expand_as(value))


def _are_rows(size: int, n: int) -> bool:
    return 0 < size <= MOST_COPIES * n and size % n == 0


def _within(x: Tensor, latents: Tensor) -> tuple[int, int, int] | None:
    """Along which axis, from where and how far x holds the latents; None where it does not."""
    if x.ndim == 3 and latents.ndim > 3:  # as tokens, a place each
        latents = latents.flatten(2).transpose(1, 2)
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


def follow_momentum(
    guiders: Sequence[Any], rows: Tensor, exchange: Callable[[Tensor], Tensor]
) -> None:
    """Let the running average of each guidance (APG) follow the rows that survive."""
    for part in [part for guider in guiders for part in vars(guider).values()]:
        average = getattr(part, "running_average", None)
        if isinstance(average, Tensor):
            part.running_average = exchange(average)[rows.to(average.device)]
