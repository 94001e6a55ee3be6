"""Reorder the per-row data of a pipeline, other than its latents, after resampling.

Resampling replaces rows of the latents. A pipeline may keep further data for each row: a control
image encoded with the row's own noise, which it passes to its networks at every step, or the
momentum of its guidance. These must follow the lineage, or a row would use another row's data.

The call has n rows in their initial order; a network's batch holds them c times.
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
    """An argument first passed to a network at `step`; late: after the first resampling."""

    def __init__(self, value: Tensor, step: int, late: bool):
        self.value, self.step, self.late = value, step, late
        self.stays: bool | None = None  # passed again at a later step, and may differ between rows
        self._version = _version(value)

    def is_same(self, value: Tensor) -> bool:
        # a tensor that was written to in between is computed at every step
        return self.value is value and _version(value) == self._version

    def is_equal(self, value: Tensor) -> bool:
        kept = self.value
        alike = kept.shape == value.shape and kept.dtype == value.dtype
        unwritten = _version(kept) == self._version and kept.device == value.device
        return alike and unwritten and torch.equal(kept, value)


class Following:
    """Reorders the network arguments that stay the same at every step, made before the loop.

    An argument that changes between steps is computed from the present rows and is left as it is.
    One that stays is recognised by its values, in any network, argument or call of a step. `batch`
    locates its rows, but only if the rows may differ.
    """

    def __init__(self, chain: Chain, batch: Batch, n: int):
        self._chain, self._batch, self._n = chain, batch, n
        self._kept: list[_Kept] = []
        self._paths: dict[Path, int] = {}  # the step at which each was first passed
        self._samples: dict[str, Tensor] = {}  # those of the first step, until the first move
        self._beside: dict[str, tuple[int, int, int]] = {}  # axis, start and size of the latents

    def followed(
        self, name: str, call: dict[str | int, Any], sample: str | int
    ) -> dict[str | int, Any]:
        """Return the call in the order of the lineage; sample: the key of the latents' argument."""
        lineage = self._chain.lineage
        if self._chain.step == 0 and isinstance(call[sample], Tensor):
            self._samples.pop(name, None)  # keeps the networks in the order of their last calls
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
        """Return the paths of arguments that stay from an earlier step and may differ by row."""
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
                raise Unclear(name, f"its argument {where} appeared after the first resampling")
            if kept.stays:
                found.add(path)
        return found

    def _like(self, value: Tensor) -> _Kept | None:
        """Return the argument of an earlier step with the same values, if any."""
        earlier = [kept for kept in self._kept if kept.step < self._chain.step]
        same = next((kept for kept in earlier if kept.is_same(value)), None)
        return same or next((kept for kept in earlier if kept.is_equal(value)), None)

    def settle(self, latents: Tensor) -> None:
        """Locate the latents of the first move in the first arguments of the networks.

        Raises Unclear, before any step is made, if an argument holds more but cannot be separated.
        """
        for name, x in self._samples.items():
            where = None if _holds_only(x, latents) else _within(x, latents)
            if where is not None:
                self._beside[name] = where
            elif name == [*self._samples][-1] and not _holds_only(x, latents):
                raise Unclear(  # earlier networks may belong to the head, as a prior does
                    name, "the latents were not found among the contents of its first argument"
                )
        self._samples.clear()

    def _latents_kept(self, name: str, x: Any, lineage: Tensor) -> Any:
        """Return the network's first argument with all but the latents reordered."""
        last = self._chain.last
        if not isinstance(x, Tensor) or last is None or _holds_only(x, last):
            return x
        if name not in self._beside:
            raise Unclear(name, "its first argument holds more than it did at the first step")
        return _moved(x, lineage, *self._beside[name])

    def returned(self, latents: Any) -> Any:
        """Return the pipeline's result with all but the last latents reordered."""
        last, lineage = self._chain.last, self._chain.lineage
        if not isinstance(latents, Tensor) or last is None or lineage is None:
            return latents
        where = None if _holds_only(latents, last) else _within(latents, last)
        return latents if where is None else _moved(latents, lineage, *where)


def _moved(x: Tensor, lineage: Tensor, along: int, start: int, size: int) -> Tensor:
    """Return x in the order of the lineage, except for the latents in it."""
    moved = x[_order(lineage, len(x)).to(x.device)]
    moved.narrow(along, start, size).copy_(x.narrow(along, start, size))
    return moved


def _order(lineage: Tensor, rows: int) -> Tensor:
    """Return the source index of each row of a batch that holds copies of the n rows."""
    n = len(lineage)
    return torch.cat([lineage + i * n for i in range(rows // n)])


def _version(value: Tensor) -> int | None:
    return None if value.is_inference() else value._version


def _holds_only(x: Tensor, latents: Tensor) -> bool:
    """Return whether x has the size of the latents, or of copies of them."""
    copies, rest = divmod(len(x), len(latents))
    return rest == 0 and x.numel() == copies * latents.numel()


def _may_differ(value: Tensor, holder: Any, n: int) -> bool:
    """Return whether `value` may differ between n particles.

    holder: the container of `value`. Rows on the first axis, or items of a list, are compared. If
    rows may lie on another axis, they may differ unless all values are equal.
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
    """Return the axis, start and size of the latents in x; None if x does not hold them."""
    if x.ndim == 3 and latents.ndim > 3:  # as tokens, one per position
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
    """Reorder the running average of each guidance (APG) by the surviving rows."""
    for part in [part for guider in guiders for part in vars(guider).values()]:
        average = getattr(part, "running_average", None)
        if isinstance(average, Tensor):
            part.running_average = exchange(average)[rows.to(average.device)]
