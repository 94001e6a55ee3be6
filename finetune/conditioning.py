"""What the head of a pipeline's call made of prompts: tensors of each prompt, and their form.

The head (`encode_*`, `prepare_*`) returns tensors, nested in tuples and lists, beside plain values.
The tensors are kept by name for each prompt; the form says where they belong, and along which axis
the rows of a batch are joined. Legend: n rows.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steering.axes import Unclear, compared

__all__ = ["Conditioning", "Form", "Mixed", "Row", "form_of", "tensors_of"]

Row = Mapping[str, Tensor]  # the tensors of one prompt, by name
Results = dict[str, list[Any]]  # the results of the head's methods, in order

_ENTRIES = "entries"  # a list with one entry per row, as in steering.axes
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Form:
    """The form of the head's results; its entries can be stored as JSON.

    call: keywords of the pipeline's call; results: for each method of the head its results, with
    names in place of tensors; axes: by name the axis of a tensor's rows, "entries" for a list with
    one tensor per row, or None for what all rows share (sums of the rows' lengths are kept as the
    lengths); shape: of one row of latents; dtype: of the network, by its name in torch, or "" in
    older shards, whose floats are all cast. guided: whether predictions have classifier-free
    guidance; embedded: whether the guidance scale is an input of the network; copies: rows of the
    network's batch per row of the call (2 with guidance in one batch). times: whether a call takes
    a timestep for each of its rows ("rows"), for each row of the network's batch ("copies"), or
    just one ("each" row in a call of its own).
    """

    call: dict[str, Any]
    results: Results
    axes: dict[str, int | str | None]
    shape: tuple[int, ...]
    dtype: str = ""
    guided: bool = False
    embedded: bool = False
    copies: int = 1
    times: str = "each"

    def dumps(self) -> str:
        """Return the form as JSON text."""
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)

    @staticmethod
    def loads(text: str) -> Form:
        """Return the form that `dumps` wrote; raises ValueError for anything else."""
        try:
            held = json.loads(text)
            return Form(**held | {"shape": tuple(held["shape"])})
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"the form of the conditioning is damaged ({error})") from None


@dataclass(frozen=True)
class Conditioning:
    """The conditioning of n rows: a form, and the tensors of each row.

    rows: one mapping of tensors per row; several rows may be the same mapping. Tensors may be
    memory-mapped; they are copied when rows are joined.
    """

    form: Form
    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Sequence[int] | slice) -> Conditioning:
        """Return some of the rows, by a slice or by numbers."""
        some = self.rows[index] if isinstance(index, slice) else [self.rows[i] for i in index]
        return replace(self, rows=some)

    def repeated(self, count: int) -> Conditioning:
        """Return every row `count` times, one after the other."""
        return replace(self, rows=[row for row in self.rows for _ in range(count)])

    def to(self, device: torch.device | str) -> Conditioning:
        """Copy the tensors to a device, asynchronously if they are in pinned memory.

        A copy to the CPU is complete when this returns.
        """
        later = torch.device(device).type != "cpu"  # nothing waits for what the CPU reads
        return self._mapped(lambda value: value.to(device, non_blocking=later))

    def pinned(self) -> Conditioning:
        """Copy the tensors to pinned memory, from which they are copied to a GPU asynchronously."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Any) -> Conditioning:
        changed: dict[int, Row] = {}  # rows that are the same mapping stay the same
        for row in self.rows:
            if id(row) not in changed:
                changed[id(row)] = {name: change(value) for name, value in row.items()}
        return replace(self, rows=[changed[id(row)] for row in self.rows])

    def parts(self) -> Iterator[slice]:
        """Yield the rows that can be joined: all, or if shapes differ, each run of equal rows."""
        shapes = {self._shapes(row) for row in {id(row): row for row in self.rows}.values()}
        if len(shapes) < 2:
            yield slice(0, len(self.rows))
            return
        start = 0
        for i in range(1, len(self.rows) + 1):
            if i == len(self.rows) or self.rows[i] is not self.rows[start]:
                yield slice(start, i)
                start = i

    def kind(self) -> Hashable:
        """Return what the first row has in common with rows that can be joined to it."""
        return id(self.form), self._shapes(self.rows[0])

    def _shapes(self, row: Row) -> tuple[Any, ...]:
        axes = self.form.axes
        return tuple(row[name].shape for name in sorted(row) if axes[name] != _ENTRIES)

    def results(self, dtype: torch.dtype) -> Results:
        """Return the head's results for these rows, for a network in `dtype`.

        Tensors in the dtype that the network had when they were recorded are cast; others, such as
        positions in float32 beside a network in 16 bits, stay what the pipeline made them.
        Raises ValueError if what all rows of a call share differs between them.
        """
        joined = {name: self._joined(name, dtype) for name in self.form.axes}
        return {
            method: [_filled(result, joined) for result in results]
            for method, results in self.form.results.items()
        }

    def _joined(self, name: str, dtype: torch.dtype) -> Tensor | list[Tensor]:
        axis = self.form.axes[name]
        own = {id(row): row[name] for row in self.rows}
        held = self.rows[0][name].dtype
        if held.is_floating_point and self.form.dtype in ("", str(held).removeprefix("torch.")):
            own = {key: value.to(dtype) for key, value in own.items()}
        values = [own[id(row)] for row in self.rows]
        if axis == _ENTRIES:
            return values
        if axis is not None:
            return torch.cat(values, int(axis))
        if not all(value is values[0] or torch.equal(value, values[0]) for value in own.values()):
            raise ValueError(
                f"{name} is the same for all rows of a call, but differs between these prompts; "
                "train on one prompt at a time (micro_groups=1)"
            )
        return values[0]


@dataclass(frozen=True)
class Mixed:
    """The conditioning of n rows of several forms, such as those of images of several sizes.

    forms: of each row; rows with equal forms have the same one. rows: as in `Conditioning`.
    """

    forms: Sequence[Form]
    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Sequence[int]) -> Conditioning:
        """Return some of the rows, by numbers; ValueError if they have several forms."""
        first, *others = (self.forms[i] for i in index)
        if any(form is not first for form in others):
            raise ValueError(f"the rows {list(index)} of the conditioning have several forms")
        return Conditioning(first, [self.rows[i] for i in index])


def form_of(
    name: str, one: Results, two: Results, call: Mapping[str, Any], shape: tuple[int, ...]
) -> Form:
    """Return the form of the head's results, from calls with one row and with two equal rows.

    name: the pipeline's class. Raises ValueError for results that cannot be stored, or whose rows
    cannot be found.
    """
    one, two = _lengths(one, two)
    try:
        found = compared(name, two, one, 2, 1)
    except Unclear as error:
        raise ValueError(f"{name} cannot be trained: {error.why}") from None
    axes: dict[str, int | str | None] = {}
    trees = {
        method: [
            _tree(name, value, (name, method, i), found, axes) for i, value in enumerate(values)
        ]
        for method, values in one.items()
    }
    return Form(dict(call), trees, axes, shape)


class _Bounds(tuple[Tensor]):
    """The lengths of the rows' sequences, which a pipeline has as sums: 0, then each row's end."""


def _lengths(one: Any, two: Any) -> tuple[Any, Any]:
    """Return the results of one row and of two with lengths in place of the sums of lengths."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        sums = (one.shape, two.shape) == ((2,), (3,)) and not one.is_floating_point()
        n = one[1].item() if sums else 0
        if sums and (one.tolist(), two.tolist()) == ([0, n], [0, n, 2 * n]):
            return _Bounds((one.diff(),)), _Bounds((two.diff(),))
    elif isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        pairs = {key: _lengths(one[key], two[key]) for key in one}
        first, second = ({key: pair[i] for key, pair in pairs.items()} for i in range(2))
        return first, second
    elif type(one) is type(two) and type(one) in (list, tuple) and len(one) == len(two) > 0:
        pairs = [_lengths(*pair) for pair in zip(one, two, strict=True)]
        return type(one)(pair[0] for pair in pairs), type(two)(pair[1] for pair in pairs)
    return one, two


def _tree(name: str, value: Any, path: tuple[Any, ...], found: Any, axes: dict[str, Any]) -> Any:
    """Return a result as JSON with names in place of tensors, whose axes are added to `axes`."""
    own = ".".join(map(str, path[1:]))
    if isinstance(value, Tensor):
        axes[own] = found[path]
        return {"tensor": own}
    if isinstance(value, _Bounds):
        axes[own] = found[(*path, 0)]
        return {"bounds": own}
    if found.get(path) == _ENTRIES:
        if len(value) != 1 or not isinstance(value[0], Tensor):
            raise ValueError(f"{name} cannot be trained: {own} is no list with a tensor per row")
        axes[own] = _ENTRIES
        return {"entries": own}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_tree(name, v, (*path, i), found, axes) for i, v in enumerate(value)]}
    if isinstance(value, dict):
        return {"dict": {k: _tree(name, v, (*path, k), found, axes) for k, v in value.items()}}
    if isinstance(value, _PLAIN):
        return {"plain": value}
    raise ValueError(
        f"{name} cannot be trained: {own} is a {type(value).__name__}, which cannot be stored"
    )


def tensors_of(form: Form, results: Results) -> Row:
    """Return the tensors in the results of a call of one row, by name.

    Raises ValueError if the results have another form.
    """
    row: dict[str, Tensor] = {}

    def walk(tree: Any, value: Any) -> None:
        ((kind, held),) = tree.items()
        if kind == "tensor" and isinstance(value, Tensor):
            row[held] = value.detach().clone()  # may be a view of something large
        elif kind == "bounds" and isinstance(value, Tensor):
            row[held] = value.diff()
        elif kind == "entries" and len(value) == 1:
            row[held] = value[0].detach().clone()
        elif kind in ("tuple", "list") and len(value) == len(held):
            for inner, item in zip(held, value, strict=True):
                walk(inner, item)
        elif kind == "dict" and value.keys() == held.keys():
            for key in held:
                walk(held[key], value[key])
        elif kind != "plain" or value != held:
            raise ValueError(f"a prompt's conditioning has another form: {value!r:.60}")

    for method, trees in form.results.items():
        if len(results.get(method, ())) != len(trees):
            raise ValueError(f"a prompt's conditioning has another form: {method}()")
        for tree, value in zip(trees, results[method], strict=True):
            walk(tree, value)
    return row


def _filled(tree: Any, joined: Mapping[str, Any]) -> Any:
    """Return a result in which names are replaced by tensors."""
    ((kind, held),) = tree.items()
    if kind in ("tensor", "entries"):
        return joined[held]
    if kind == "bounds":
        return torch.cat([joined[held].new_zeros(1), joined[held]]).cumsum(
            0, dtype=joined[held].dtype
        )
    if kind == "dict":
        return {key: _filled(value, joined) for key, value in held.items()}
    if kind == "plain":
        return held
    values = [_filled(value, joined) for value in held]
    return tuple(values) if kind == "tuple" else values
