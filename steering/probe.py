"""Determine the batch axis of a network's arguments, and which of its rows carry the prompt.

A single shape cannot show this, so the pipeline's own call is repeated with another number of rows
and stopped when it calls the network; earlier network calls are answered with outputs of the known
form. An axis whose size changed with the number of rows is the batch, an unchanged tensor is shared
by all rows, and anything else is refused.

The call to be cut has n particles, the repeated one m. A network's batch holds each particle c
times: once, or (guidance) without and with its prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steering.axes import (
    Axes,
    Path,
    Unclear,
    check_rows,
    compared,
    copies_of,
    leaves,
    picked,
    places,
    rows_in,
    rows_of,
)
from steering.copies import as_many_as_copies, deal, of_copies
from steering.networks import StandIn, kind_of, networks, out_of_memory
from steering.tape import Tape, view_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["Again", "Batch", "apart"]


_ALIKE = 0.02  # rows whose relative difference is smaller count as equal


class _Asked(BaseException):
    """Ends the repeated call at a network call; a BaseException, so no pipeline catches it."""

    def __init__(self, name: str, call: dict[str | int, Any]):
        self.name, self.call = name, call


@dataclass(frozen=True)
class Answer:
    """The first row of a network's output, which had `rows` rows for n particles.

    as_list: whether the output is a list with one entry per row.
    """

    out: Any
    as_list: bool
    rows: int
    n: int

    def repeated(self, name: str, num: int) -> Any:
        """Return an output of the same form for a call with `num` particles instead of n."""
        rows = self.rows // self.n * num if self.rows % self.n == 0 else self.rows
        return picked(name, self.out, torch.zeros(rows, dtype=torch.int64), self.as_list)


class Again:
    """The pipeline's call repeated with `each` rows for each of `prompts` prompts.

    The first row of a prompt has different noise from the others, which all have the same noise.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        scheduler: Callable[[], Any],
        call: dict[str, Any],
        prompts: int,
        each: int,
    ):
        self.num, self.prompts, self.each = prompts * each, prompts, each
        self._pipe, self._scheduler = pipe, scheduler
        # the user's callbacks are only for the run itself
        self._call = {key: v for key, v in call.items() if not key.startswith("callback")}
        self._tape: Tape | None = None

    def first(
        self, name: str, before: Sequence[str], answers: Mapping[str, Answer]
    ) -> dict[str | int, Any]:
        """Return the arguments of the call after those in `before`; Unclear if it is not `name`."""
        left = iter(before)

        def asked(network: str, *args: Any, **kwargs: Any) -> Any:
            due = next(left, None)
            if due != network:
                # the order of the network calls differs from that of the run
                raise _Asked(network if due is None else "", dict(enumerate(args)) | kwargs)
            return answers[network].repeated(network, self.num)

        view = view_of(self._pipe, scheduler=self._scheduler(), _progress_bar_config=_QUIET)
        for attribute, module in networks(self._pipe).items():
            call = functools.partial(asked, kind_of(module))
            vars(view)[attribute] = StandIn(module, call)
        if self._tape is None:
            self._tape = Tape()
            self._tape.record(view)
        else:
            vars(view).update(self._tape.players(view))
        try:
            view(**self._call, output_type="latent")
        except _Asked as reached:
            if reached.name == name:
                return reached.call
            raise Unclear(name, f"with {self.num} rows another network is called first") from None
        except Exception as error:
            if out_of_memory(error):
                raise
            raise Unclear(name, f"the same call with {self.num} rows fails ({error})") from error
        raise Unclear(name, f"the same call with {self.num} rows calls it less often")

    def let_go(self) -> None:
        """Discard what the call's head returned; the head runs again if it is needed."""
        self._tape = None


_QUIET = {"disable": True}


class Batch:
    """The layout of the networks' batches in a run, determined when each network is first called.

    `again` is the same call with another number of rows. `changed`, needed only to find which copy
    carries the prompt, is a call of two rows with different prompts and equal noise.
    """

    def __init__(self) -> None:
        self.axes: Axes = {}
        self.conditional: dict[str, int] = {}
        self._places: set[tuple[Path, bool]] = set()  # the paths in all calls seen so far
        self._in_copies: dict[str, bool] = {}  # whether each copy holds all particles in order
        self._of_copies: dict[Path, bool] = {}  # whether an argument has one row per copy
        self._again: Again | None = None
        self._changed: Again | None = None
        self._before: list[str] = []  # the networks called so far in this call, in order
        self._answers: dict[str, Answer] = {}
        self._thins = self._ordered = self._counted = False

    @property
    def asked(self) -> bool:
        """Whether the present call has called a known network."""
        return bool(self._before)

    def start(
        self,
        again: Again,
        changed: Again | None = None,
        thins: bool = False,
        ordered: bool = False,
        counted: bool = False,
    ) -> None:
        """Begin a new call; thins: whether single rows of its batches will be left out.

        ordered: whether the rows of each particle must be known anyway; counted: whether rows were
        requested by a count, which the pipeline may not apply to all arguments.
        """
        self._again, self._changed, self._before, self._answers = again, changed, [], {}
        self._thins, self._ordered, self._counted = thins, thins or ordered, counted

    def step(self) -> None:
        """Free memory after the first step, when most is known."""
        for call in (self._again, self._changed):
            if call is not None:
                call.let_go()

    def keep(self, name: str, out: Any, as_list: bool, n: int) -> None:
        """Record that the network `name` was called, and the form of its output."""
        self._before.append(name)
        if name in self._answers:
            return
        if self._thins:  # refuses outputs (a cache) whose rows could not be selected
            picked(name, out, torch.zeros(0, dtype=torch.int64), as_list)
        first = picked(None, out, torch.zeros(1, dtype=torch.int64), as_list)
        self._answers[name] = Answer(first, as_list, rows_of(out, as_list) or 1, n)

    def learn(self, name: str, call: dict[str | int, Any], n: int) -> None:
        """Determine the batch axes of a call of the network `name` with n particles."""
        held = set(places(call, (name,)))
        known = all(path in self.axes for path, _ in leaves(call, self.axes, (name,)))
        if known and held <= self._places:
            return
        if self._again is None:
            raise Unclear(name, "there is no second call to compare it with")
        beside = self._again.first(name, self._before, self._answers)
        self.axes |= compared(name, call, beside, n, self._again.num)
        self._places |= held
        check_rows(name, call, self.axes, n)
        rows = rows_in(name, call, self.axes)
        if rows is None or rows == n:
            return
        if self._counted and n > 1:
            _check_shared(name, call, self.axes, rows // n)
        if not (self._ordered or as_many_as_copies(name, call, self.axes, rows // n)):
            return
        self._in_copies[name] = _blocks(name, beside, self.axes, self._again)
        if not self._ordered:
            return
        if not self._in_copies[name]:
            raise Unclear(name, f"the order of the particles in its {rows} rows is unknown")
        if self._changed is not None and rows == 2 * n:
            changed = self._changed.first(name, self._before, self._answers)
            self.conditional[name] = _conditional(name, changed, self.axes)

    def dealt(
        self, name: str, call: dict[str | int, Any], n: int, ask: Callable[[Any], int | None]
    ) -> tuple[dict[str | int, Any], Axes]:
        """Return a known call with its per-copy arguments repeated for every row, and its axes.

        ask: returns the number of output rows of a call, for trials if the layout is not clear.
        """
        copies = (rows_in(name, call, self.axes) or n) // n
        paths = as_many_as_copies(name, call, self.axes, copies) if copies > 1 else []
        if any(path not in self._of_copies for path in paths):
            found = of_copies(name, call, self.axes, paths, ask)
            if found and not self._in_copies.get(name):
                raise Unclear(name, f"which of its {copies * n} rows form a copy is unknown")
            self._of_copies |= {path: path in found for path in paths}
        paths = [path for path in paths if self._of_copies[path]]
        if not paths:
            return call, self.axes
        return deal(name, call, paths, copies, n), self.axes | dict.fromkeys(paths, 0)


def apart(a: Tensor, b: Tensor) -> float:
    """Return the distance of two rows relative to the larger norm; 1 if their shapes differ."""
    if a.shape != b.shape:
        return 1.0
    a, b = a.double(), b.double()
    size = max(a.norm().item(), b.norm().item())
    return (a - b).norm().item() / size if size > 0 else 0.0


def _check_shared(name: str, call: dict[str | int, Any], axes: Axes, copies: int) -> None:
    """Raise ValueError if an argument seems to hold one row per copy.

    The network would refuse it with all rows, but might accept it with one row per copy.
    """
    for path, value in leaves(call, axes, (name,)):
        if axes[path] is None and value.ndim > 1 and len(value) == copies:
            why = f"its argument {list(path[1:])} has a row for each of {copies} copies"
            raise ValueError(str(Unclear(name, why)))


def _blocks(name: str, call: dict[str | int, Any], axes: Axes, again: Again) -> bool:
    """Return whether each copy holds all particles in order, as some argument shows.

    The first row of each prompt has different noise from the others, which are alike.
    """
    for path, value in leaves(call, axes, (name,)):
        axis = axes[path]
        if axis is None:
            continue
        copies = copies_of(value, axis, (rows_in(name, call, axes) or 0) // again.num)
        starts = range(0, again.num, again.each)
        if all(_as_drawn(copy[i : i + again.each]) for copy in copies for i in starts):
            return True
    return False


def _as_drawn(rows: list[Tensor]) -> bool:
    alike = all(apart(rows[1], row) < _ALIKE for row in rows[2:])
    return alike and apart(rows[0], rows[1]) > _ALIKE


def _conditional(name: str, call: dict[str | int, Any], axes: Axes) -> int:
    """Return which of two copies changes with the prompt.

    Arguments that change in both copies, or in neither, are ignored.
    """
    found = set()
    for path, value in leaves(call, axes, (name,)):
        axis = axes[path]
        if axis is not None:
            first, second = (_change(rows) for rows in copies_of(value, axis, 2))
            if max(first, second) > 5 * min(first, second) + 1e-6:
                found.add(int(second > first))
    if len(found) != 1:
        raise Unclear(name, "which half of it carries the prompt is unknown")
    return found.pop()


def _change(rows: list[Tensor]) -> float:
    return max(apart(rows[0], row) for row in rows[1:])
