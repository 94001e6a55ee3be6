"""A stand-in for a network that evaluates fewer rows at once, or only some of them.

The pipeline calls it in place of the network. It cuts the arguments that `Batch` found to hold rows
and passes all others on. The module itself is not patched, so a compiled one keeps its graph.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steering.axes import Axes, joined, leaves, picked, rows_in, rows_of, take
from steering.following import Following
from steering.networks import StandIn, kind_of, networks

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from steering.probe import Batch

__all__ = ["Denoiser", "Rows", "denoisers", "distinct"]


@dataclass
class Rows:
    """Which rows of a batch are evaluated, and how many at once; shared by a call's networks.

    `live` (m,) holds indices of particles, None for all n; `source` (n,) holds for every particle
    the index into `live` of its output. A batch of 2n rows (guidance) holds the n particles twice,
    with and without their prompts. `guidance` is the interval of the run, within [0, 1], in which
    both are evaluated. Outside it the conditional output also stands in for the unconditional one,
    so guidance adds nothing (Kynkäänniemi et al. 2024).
    """

    max_batch: int | None = None
    halvings: int = 0
    num: int = 0
    live: Tensor | None = None
    source: Tensor | None = None
    guidance: tuple[float, float] = (0.0, 1.0)
    progress: float = 0.0  # fraction of the steps that are done
    device: torch.device | None = None  # device of the networks' batch, for indices into it
    whole: bool = False  # nothing is cut, so batch axes need not be known
    following: Following | None = None  # set if arguments of the networks follow the lineage

    def keep(self, live: Tensor, num: int) -> None:
        """Evaluate only the rows `live` of `num`; the others get the output of a live row."""
        source = torch.zeros(num, dtype=torch.int64, device=live.device)
        source[live] = torch.arange(len(live), device=live.device)
        self.num, self.live, self.source = num, live, source

    def indices(self, n: int, conditional: int | None) -> tuple[Tensor | None, Tensor | None]:
        """Return which of a batch's n rows to evaluate, and the index of each row's output.

        conditional: which of two copies carries the prompts, if that is known.
        """
        guided = self.guidance[0] <= self.progress < self.guidance[1]
        # a further call with the prompt alone (skip-layer guidance) has nothing to leave out
        guided = guided or (n == self.num and conditional is not None)
        copies = n // self.num
        if self.guidance != (0.0, 1.0) and conditional is None:  # raised at the first step
            raise ValueError(
                f"guidance_interval={self.guidance}: this pipeline's network gets each particle "
                f"{copies} times per step, not once without and once with its prompt, so guidance "
                "cannot be skipped; leave guidance_interval= out."
            )
        if guided and self.live is None:
            return None, None
        device = self.device if self.live is None else self.live.device
        every = torch.arange(self.num, device=device)
        live, source = (every if part is None else part for part in (self.live, self.source))
        if not guided:
            return (conditional or 0) * self.num + live, source.repeat(2)
        each = torch.arange(copies, device=device)[:, None]
        return (each * self.num + live).flatten(), (each * len(live) + source).flatten()

    def chunk(self, n: int) -> int:
        size = n if self.max_batch is None else min(n, self.max_batch)
        return -(-size // 2**self.halvings)


class Denoiser:
    """Evaluates the needed rows of a network's batch, a few at a time."""

    def __init__(self, module: torch.nn.Module, rows: Rows, batch: Batch):
        self._name, self._module = kind_of(module), module
        self._rows, self._batch = rows, batch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rows = self._rows
        call = dict(enumerate(args)) | kwargs
        sample = _sample(args, kwargs)
        as_list = isinstance(sample, list)
        if rows.following is not None:
            key = next(key for key, value in call.items() if value is sample)
            call = rows.following.followed(self._name, call, key)
        if rows.whole:
            out = self._asked(call)
        else:
            rows.device = getattr(sample[0] if as_list else sample, "device", None)
            out = self._cut(call, as_list)
        self._batch.keep(self._name, out, as_list, rows.num)
        return out

    def _cut(self, call: dict[str | int, Any], as_list: bool) -> Any:
        """Return the output for the whole batch, evaluating only the rows that are needed."""
        name, rows, batch = self._name, self._rows, self._batch
        batch.learn(name, call, rows.num)
        n = rows_in(name, call, batch.axes)
        if n is None:
            return self._asked(call)
        live, source = rows.indices(n, batch.conditional.get(name))
        call, axes = batch.dealt(name, call, rows.num, functools.partial(self._rows_of, as_list))
        if live is not None:
            call = take(call, axes, (name,), live)
        out = self._evaluated(call, axes, n if live is None else len(live), as_list)
        return out if source is None else picked(name, out, source, as_list)

    def _rows_of(self, as_list: bool, call: dict[str | int, Any]) -> int | None:
        return rows_of(self._asked(call), as_list)

    def _evaluated(self, call: dict[str | int, Any], axes: Axes, total: int, as_list: bool) -> Any:
        size, parts, sizes = self._rows.chunk(total), [], []
        for start in range(0, total, size):
            chosen = slice(start, start + size)
            cut = call if size >= total else take(call, axes, (self._name,), chosen)
            parts.append(self._asked(cut))
            sizes.append(min(size, total - start))
        return joined(self._name, parts, sizes, as_list) if len(parts) > 1 else parts[0]

    def _asked(self, call: dict[str | int, Any]) -> Any:
        positional = [call[key] for key in call if isinstance(key, int)]
        named = {key: value for key, value in call.items() if isinstance(key, str)}
        return self._module(*positional, **named)


def _sample(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the noisy sample, the first argument: a tensor or a list of rows."""
    if args:
        return args[0]
    return kwargs.get("hidden_states", kwargs.get("sample", next(iter(kwargs.values()))))


def denoisers(pipe: DiffusionPipeline, rows: Rows, batch: Batch) -> dict[str, StandIn]:
    """Return a stand-in for each of the networks, all cutting by the same `rows`."""
    return {name: StandIn(net, Denoiser(net, rows, batch)) for name, net in networks(pipe).items()}


def distinct(pipe: DiffusionPipeline) -> dict[str, StandIn]:
    """Return stand-ins for the text encoders that encode equal texts of a batch only once."""
    return {
        name: StandIn(part, functools.partial(_once, part))
        for name, part in pipe.components.items()
        if name.startswith("text_encoder") and isinstance(part, torch.nn.Module)
    }


def _once(encoder: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Evaluate equal rows once, if all tensors that an encoder is given are rows of tokens."""
    call = dict(enumerate(args)) | kwargs
    tokens = [value for value in call.values() if isinstance(value, Tensor)]
    if not tokens or any(part.ndim != 2 or part.shape != tokens[0].shape for part in tokens):
        return encoder(*args, **kwargs)
    _, source = torch.unique(torch.cat(tokens, dim=1), dim=0, return_inverse=True)
    order = torch.arange(len(source), device=source.device)
    first = torch.full((int(source.max()) + 1,), len(source), device=source.device)
    first = first.scatter_reduce(0, source, order, "amin")
    if len(first) in (len(source), tokens[0].shape[1]):  # or its axis could be that of the tokens
        return encoder(*args, **kwargs)
    cut = {key: part[first] if isinstance(part, Tensor) else part for key, part in call.items()}
    positional = [part for key, part in cut.items() if isinstance(key, int)]
    named = {key: part for key, part in cut.items() if isinstance(key, str)}
    out = encoder(*positional, **named)
    axes: Axes = {path: _axis(value, len(first)) for path, value in leaves(out, {}, ())}
    if any(axis is None for axis in axes.values()):
        return encoder(*args, **kwargs)
    return take(out, axes, (), source)  # any cache in the output is unused


def _axis(out: Tensor, n: int) -> int | None:
    """Return the axis of an encoder's output that has n rows: the first, or that after tokens."""
    return next((i for i, size in enumerate(out.shape[:2]) if size == n), None)
