"""Find the batch axes of a network's arguments, and select rows along them.

Arguments are tensors, nested in lists, tuples, mappings and dataclasses. A batch axis is found by
comparing two calls with different numbers of rows, n and m: it is the axis whose size changes with
them.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Generator, Tensor

__all__ = [
    "MOST_COPIES",
    "Axes",
    "Path",
    "Unclear",
    "check_rows",
    "compared",
    "copies_of",
    "inside",
    "joined",
    "leaves",
    "picked",
    "places",
    "rows_in",
    "rows_of",
    "take",
]

Path = tuple[str | int, ...]  # starts with the class name of the network
Axes = dict[Path, int | str | None]  # a tensor's batch axis, _ENTRIES, or None if all rows share it

_ENTRIES = "entries"  # a list or tuple with one entry per row
MOST_COPIES = 8  # guidance makes no more; more are the tokens of all rows in sequence
_PLAIN = (int, float, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)


class Unclear(ValueError):
    """The rows of a network's batch cannot be located in its arguments."""

    def __init__(self, name: str, why: str):
        super().__init__(
            f"The batch of {name} cannot be cut: {why}. Leave max_batch=, guidance_interval= "
            "and funnel out; if memory runs out, steer fewer particles at once."
        )
        self.name, self.why = name, why

    def of_following(self) -> ValueError:
        """Return the error to raise if nothing is cut, but image inputs must follow their rows."""
        return ValueError(
            f"The image inputs of {self.name} cannot follow the rows that are resampled: "
            f"{self.why}; set FeynmanKac(min_ess=0), which is best-of-k, or leave the image out."
        )


def compared(name: str, ours: Any, theirs: Any, n: int, m: int) -> Axes:
    """Return the batch axis of every tensor in `ours`, the arguments for n rows (`theirs`: m)."""

    def walk(ours: Any, theirs: Any, path: Path) -> Iterator[tuple[Path, int | str | None]]:
        where = "".join(f"[{key!r}]" for key in path[1:])
        if isinstance(ours, Tensor) and isinstance(theirs, Tensor) and ours.ndim == theirs.ndim:
            grown = [i for i in range(ours.ndim) if ours.shape[i] != theirs.shape[i]]
            if len(grown) > 1 or any(ours.shape[i] * m != theirs.shape[i] * n for i in grown):
                sizes = f"{tuple(ours.shape)} with {n} rows, {tuple(theirs.shape)} with {m}"
                raise Unclear(name, f"its argument {where} is {sizes}")
            yield path, grown[0] if grown else None
        elif _is_list(ours) and _is_list(theirs) and len(ours) != len(theirs):
            if len(ours) * m != len(theirs) * n:
                raise Unclear(name, f"its argument {where} has {len(ours)} entries for {n} rows")
            yield path, _ENTRIES
        else:
            inside, beside = _children(ours), _children(theirs)
            if type(ours) is not type(theirs) or [*inside] != [*beside]:
                raise Unclear(name, f"its argument {where} changes its form with the rows")
            same = ours is theirs or isinstance(ours, Generator)
            plain = _empty(ours) or (isinstance(ours, _PLAIN) and ours == theirs)
            if not (inside or same or plain):
                raise Unclear(name, f"its argument {where} is a {type(ours).__name__}")
            for key in inside:
                yield from walk(inside[key], beside[key], (*path, key))

    return dict(walk(ours, theirs, (name,)))


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _empty(value: Any) -> bool:
    return isinstance(value, list | tuple | Mapping) and not value


def _children(value: Any) -> dict[str | int, Any]:
    """Return the items of a container by key; empty for anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {}


def inside(value: Any, path: Path) -> Any:
    """Return the item at `path` in a container."""
    for key in path:
        value = _children(value)[key]
    return value


def leaves(value: Any, axes: Axes, path: Path) -> Iterator[tuple[Path, Any]]:
    """Yield every tensor in `value`, and every list with one entry per row, with its path."""
    if isinstance(value, Tensor) or axes.get(path) == _ENTRIES:
        yield path, value
        return
    for key, item in _children(value).items():
        yield from leaves(item, axes, (*path, key))


def places(value: Any, path: Path) -> Iterator[tuple[Path, bool]]:
    """Yield the path of every leaf in `value`, and whether it is a list of plain values."""
    held = _children(value)
    listed = _is_list(value) and all(isinstance(item, _PLAIN) for item in value)
    if listed or not held:
        yield path, listed
        return
    for key, item in held.items():
        yield from places(item, (*path, key))


def check_rows(name: str, call: dict[str | int, Any], axes: Axes, n: int) -> None:
    """Raise Unclear unless the rows of a call are whole copies of n particles."""
    rows = rows_in(name, call, axes)
    if rows is None:
        return
    firsts = [axes[path] in (0, _ENTRIES) for path, _ in leaves(call, axes, (name,))]
    if rows % n or rows > MOST_COPIES * n or not any(firsts):
        raise Unclear(name, f"{n} particles are {rows} rows there")


def rows_in(name: str, call: dict[str | int, Any], axes: Axes) -> int | None:
    """Return the number of rows in a call of the network `name`; None if no argument has rows."""
    found = set()
    for path, value in leaves(call, axes, (name,)):
        axis = axes[path]
        if axis is not None:
            found.add(len(value) if isinstance(axis, str) else value.shape[axis])
    if len(found) > 1:
        raise Unclear(name, f"its arguments have {sorted(found)} rows")
    return found.pop() if found else None


def take(value: Any, axes: Axes, path: Path, rows: slice | Tensor) -> Any:
    """Return `value` with only `rows` along every batch axis in it."""
    axis = axes.get(path)
    if isinstance(value, Tensor):
        if axis is None:
            return value
        index = rows if isinstance(rows, slice) else rows.to(value.device)
        return value[(slice(None),) * int(axis) + (index,)]
    if axis == _ENTRIES:
        return _entries(value, rows)
    inside = _children(value)
    if not inside:
        return value
    taken = {key: take(item, axes, (*path, key), rows) for key, item in inside.items()}
    return _rebuilt(value, taken)


def _entries(values: Any, rows: slice | Tensor) -> Any:
    index = range(len(values))[rows] if isinstance(rows, slice) else rows.tolist()
    return type(values)(values[i] for i in index)


def _rebuilt(like: Any, items: dict[Any, Any]) -> Any:
    """Return a container of the type of `like` that holds `items`."""
    if type(like) is dict:
        return items
    if isinstance(like, Mapping):
        return type(like)(**items)
    if isinstance(like, list | tuple):
        values = items.values()
        return type(like)(*values) if hasattr(like, "_fields") else type(like)(values)
    return dataclasses.replace(like, **items)


def picked(name: str | None, out: Any, rows: Tensor, as_list: bool = False) -> Any:
    """Return an output of the network `name` with only `rows` along the first axis of its tensors.

    as_list: whether a list in it has one entry per row. Raises Unclear for other objects, which may
    hold rows as well, unless `name` is None, in which case they are kept as they are.
    """
    if isinstance(out, Tensor):
        return out[rows.to(out.device)] if out.ndim else out
    if as_list and isinstance(out, list):
        return _entries(out, rows)
    inside = {key: picked(name, item, rows, as_list) for key, item in _children(out).items()}
    if not inside and name is not None:
        _check_plain(name, out)
    return _rebuilt(out, inside) if inside else out


def _check_plain(name: str, out: Any) -> None:
    if not isinstance(out, _PLAIN) and not _empty(out):
        raise Unclear(name, f"it returns a {type(out).__name__}, which may hold rows as well")


def rows_of(out: Any, as_list: bool = False) -> int | None:
    """Return the number of rows of an output, from its first tensor, or list if `as_list`."""
    if isinstance(out, Tensor):
        return len(out) if out.ndim else None
    if as_list and isinstance(out, list):
        return len(out)
    found = (rows_of(item, as_list) for item in _children(out).values())
    return next((rows for rows in found if rows is not None), None)


def joined(name: str, parts: list[Any], sizes: list[int], as_list: bool = False) -> Any:
    """Concatenate the outputs of parts of a batch, which have `sizes` rows."""
    first = parts[0]
    if isinstance(first, Tensor):
        if [part.shape[:1] for part in parts] != [(size,) for size in sizes]:
            raise Unclear(name, f"it returns {tuple(first.shape)} for {sizes[0]} rows")
        return torch.cat(parts)
    if as_list and isinstance(first, list):
        return [row for part in parts for row in part]
    inside = [_children(part) for part in parts]
    items = {key: joined(name, [part[key] for part in inside], sizes, as_list) for key in inside[0]}
    if not items:
        _check_plain(name, first)
    return _rebuilt(first, items) if items else first


def copies_of(value: Any, axis: int | str, copies: int) -> list[list[Tensor]]:
    """Return the rows of an argument, grouped by copy."""
    rows = value if isinstance(axis, str) else value.movedim(axis, 0)
    rows = [row if isinstance(row, Tensor) else torch.tensor(hash(str(row))) for row in rows]
    each = len(rows) // copies
    return [rows[i * each : (i + 1) * each] for i in range(copies)]
