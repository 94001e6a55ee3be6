"""A stand-in for a network that evaluates fewer rows at once, or only those that count.

The pipeline calls it as it would the network. Arguments with the batch's rows are cut, everything
else is passed on as it is; the module itself is not patched, so compiled ones keep their graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = [
    "Denoiser",
    "Rows",
    "denoisers",
    "distinct",
    "networks",
    "perturbed",
    "refuse_step_caches",
    "undisturbed",
]

_NETWORKS = ("unet", "transformer", "transformer_2", "controlnet", "prior")
# Positions of tokens, (tokens, 3): their first axis is never the batch.
_NO_BATCH_AXIS = {"txt_ids", "img_ids"}
_CACHES = ("cache", "fbc", "pyramid_attention_broadcast")


@dataclass
class Rows:
    """Which rows of a batch are evaluated, and how many at once; shared by a call's networks.

    `live` (m,) are rows of the n particles, None for all; `source` (n,) says for every particle
    which entry of `live` to show. A batch of 2n rows (guidance) holds the n particles twice, first
    without and then with their prompts. `guidance` is the part of the run, of [0, 1], in which both
    are evaluated; outside of it the second shows for the first, which leaves guidance nothing to
    add (Kynkäänniemi et al. 2024).
    """

    max_batch: int | None = None
    halvings: int = 0
    num: int = 0
    live: Tensor | None = None
    source: Tensor | None = None
    guidance: tuple[float, float] = (0.0, 1.0)
    progress: float = 0.0  # share of the steps that are done

    def keep(self, live: Tensor, num: int) -> None:
        """Evaluate the rows `live` of `num`; dead rows show the output of a live one."""
        source = torch.zeros(num, dtype=torch.int64, device=live.device)
        source[live] = torch.arange(len(live), device=live.device)
        self.num, self.live, self.source = num, live, source

    def indices(self, x: Any) -> tuple[Tensor | None, Tensor | None]:
        """Rows of a batch x to evaluate, and where each row of x finds its output."""
        n = len(x)
        guided = self.guidance[0] <= self.progress < self.guidance[1]
        if self.num == 0 or n % self.num or (guided and self.live is None):
            return None, None
        copies = n // self.num
        if not guided and copies != 2:
            raise ValueError(
                f"guidance_interval={self.guidance}: this pipeline's network sees each particle "
                f"{copies} times a step, not once without and once with its prompt, so there is "
                "nothing to leave out; leave guidance_interval= out."
            )
        device = x.device if isinstance(x, Tensor) else x[0].device
        every = torch.arange(self.num, device=device)
        live, source = (every if part is None else part for part in (self.live, self.source))
        if not guided:
            return self.num + live, source.repeat(2)
        each = torch.arange(copies, device=device)[:, None]
        return (each * self.num + live).flatten(), (each * len(live) + source).flatten()

    def chunk(self, n: int) -> int:
        size = n if self.max_batch is None else min(n, self.max_batch)
        return -(-size // 2**self.halvings)


class Distinct:
    """Of equal rows of tokens, one is evaluated."""

    def indices(self, x: Any) -> tuple[Tensor | None, Tensor | None]:
        if not isinstance(x, Tensor) or x.ndim != 2 or x.is_floating_point():
            return None, None
        _, source = torch.unique(x, dim=0, return_inverse=True)
        order = torch.arange(len(x), device=x.device)
        first = torch.full((int(source.max()) + 1,), len(x), device=x.device)
        first = first.scatter_reduce(0, source, order, "amin")
        return (None, None) if len(first) == len(x) else (first, source)

    def chunk(self, n: int) -> int:
        return n


class Denoiser:
    """Delegates to `module` in everything but the call, `isinstance` included."""

    def __init__(self, module: torch.nn.Module, rows: Rows | Distinct):
        self._module, self._rows = module, rows

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return type(self._module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = _sample(args, kwargs)
        n, as_list = len(x), isinstance(x, list)
        live, source = self._rows.indices(x)
        total = n
        if live is not None:
            args, kwargs = _cut_call(args, kwargs, n, live)
            total = len(live)
        size = self._rows.chunk(total)
        if size >= total:
            out = self._module(*args, **kwargs)
        else:
            parts = []
            for start in range(0, total, size):
                cut = _cut_call(args, kwargs, total, slice(start, start + size))
                parts.append(self._module(*cut[0], **cut[1]))
            out = _join(parts, as_list)
        return out if source is None else _cut(out, total, source, "rows" if as_list else "")


def _sample(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The noisy sample, the first argument by position or by name: a tensor or a list of rows."""
    if args:
        return args[0]
    return kwargs.get("hidden_states", kwargs.get("sample", next(iter(kwargs.values()))))


def _cut_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], n: int, rows: slice | Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    cut = tuple(_cut(value, n, rows, "positional") for value in args)
    return cut, {name: _cut(value, n, rows, name) for name, value in kwargs.items()}


def _cut(value: Any, n: int, rows: slice | Tensor, name: str = "") -> Any:
    """`value` with `rows` of its n rows, wherever in it there is a batch axis."""
    if isinstance(value, Tensor):
        if value.shape[:1] != (n,) or (name in _NO_BATCH_AXIS and value.ndim == 2):
            return value
        return value[rows]
    if isinstance(value, Mapping):
        cut = {key: _cut(item, n, rows, key) for key, item in value.items()}
        return cut if type(value) is dict else type(value)(**cut)
    if isinstance(value, list | tuple):
        if _has_entry_a_row(value, n, name):
            picked = range(n)[rows] if isinstance(rows, slice) else rows.tolist()
            return type(value)(value[i] for i in picked)
        return type(value)(_cut(item, n, rows) for item in value)
    return value


def _has_entry_a_row(values: list | tuple, n: int, name: str) -> bool:
    """Whether a list holds one entry a row; else it may hold entries of n rows each.

    A tuple never does: it has parts, such as the cosines and sines of rotary positions.
    """
    if not name or not isinstance(values, list) or len(values) != n:
        return False
    if isinstance(values[0], int | float):  # layers to skip, or scales of several ControlNets
        return name == "txt_seq_lens"
    return not (isinstance(values[0], Tensor) and values[0].shape[:1] == (n,))


def _join(parts: list[Any], as_list: bool) -> Any:
    """The output of the whole batch; `as_list` where a network gives a list with a tensor a row."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, Mapping):
        joined = {key: _join([part[key] for part in parts], as_list) for key in first}
        return type(first)(**joined)
    if isinstance(first, list) and as_list:
        return [row for part in parts for row in part]
    if isinstance(first, list | tuple):
        return type(first)(_join(list(items), as_list) for items in zip(*parts, strict=True))
    return first


def networks(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The networks that a pipeline calls at every step, by attribute."""
    found = {name: getattr(pipe, name, None) for name in _NETWORKS}
    return {name: net for name, net in found.items() if isinstance(net, torch.nn.Module)}


def denoisers(pipe: DiffusionPipeline, rows: Rows) -> dict[str, Denoiser]:
    """A stand-in for each of them, all cutting by the same `rows`."""
    return {name: Denoiser(net, rows) for name, net in networks(pipe).items()}


def distinct(pipe: DiffusionPipeline) -> dict[str, Denoiser]:
    """Stand-ins for the text encoders that encode equal texts of a batch once."""
    return {
        name: Denoiser(part, Distinct())
        for name, part in pipe.components.items()
        if name.startswith("text_encoder") and isinstance(part, torch.nn.Module)
    }


def perturbed(pipe: DiffusionPipeline, pag_scale: float | None) -> bool:
    """Whether perturbed attention guidance is on, whose layers chunk the batch by position."""
    if pag_scale and hasattr(pipe, "pag_attn_processors"):  # its call sets them, and takes them off
        return True
    return any(
        type(processor).__name__.startswith("PAG")
        for net in networks(pipe).values()
        for processor in getattr(net, "attn_processors", {}).values()
    )


@contextlib.contextmanager
def undisturbed(pipe: DiffusionPipeline) -> Iterator[None]:
    """Put back what a call that is cut off would leave on the user's networks.

    That is the attention processors of perturbed attention, and the precision of a decoder that
    its pipeline raises while it works (SDXL in float16).
    """
    vae: Any = getattr(pipe, "vae", None)
    dtype = getattr(vae, "dtype", None)
    processors = {
        name: dict(net.attn_processors)  # type: ignore[arg-type]
        for name, net in networks(pipe).items()
        if hasattr(pipe, "pag_attn_processors") and hasattr(net, "attn_processors")
    }
    try:
        yield
    except BaseException:
        for name, before in processors.items():
            getattr(pipe, name).set_attn_processor(before)
        if dtype is not None and vae.dtype != dtype:
            vae.to(dtype)
        raise


def refuse_step_caches(pipe: DiffusionPipeline) -> None:
    """Raise ValueError where a network reuses what it computed for a row at an earlier step."""
    for name, net in networks(pipe).items():
        hooks = [
            hook
            for module in net.modules()
            for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        ]
        cached = [hook for hook in hooks if any(word in hook for word in _CACHES)]
        if cached or getattr(net, "is_cache_enabled", False):
            what = cached[0] if cached else type(net._cache_config).__name__
            raise ValueError(
                f"pipe.{name} has a step cache ({what}), which holds the state of rows that "
                f"resampling replaces; call pipe.{name}.disable_cache() first."
            )
