"""Whether a call may hold several rows, and whether its prompts see one another.

A pipeline may pad or cut the texts of a call to its longest one and let its network see it. Nothing
is read off shapes, since a mask may hide it: the first step is made once for the shortest prompt of
the run beside itself and once beside its longest, and what the networks say of it is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from steering.call import WAYS, PipelineCall
from steering.denoiser import networks
from steering.probe import apart
from steering.tape import SHARED, view_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["check_alone", "first_step", "no_rows"]

_ALIKE = 2e-3  # of their norm; another number of rows is rounded otherwise, more so in half
_ROUNDINGS = 8  # of the dtype, as guidance enlarges them
_FINE = 1e-4  # a dtype that rounds more is half precision


class _Stepped(BaseException):
    """Ends a call at its first step; no pipeline catches it."""


def check_alone(
    pipe: DiffusionPipeline,
    scheduler: Callable[[Sequence[Generator]], Any],
    call: PipelineCall,
    way: int,
    stand_ins: dict[str, Any],
) -> None:
    """Raise ValueError where a prompt's first step differs beside a longer one.

    scheduler: makes the chain of a call from its generators; way: of call.WAYS, to ask for rows;
    stand_ins: for the networks of a call of two rows, where its batch has to be cut.
    """
    order = sorted(range(len(call.prompts)), key=lambda i: len(call.prompts[i]))
    eps = _rounding(pipe)
    texts = list(call.prompts)
    if eps > _FINE:
        texts[order[-1]] = _longer(texts[order[-1]])
    asked = replace(call, prompts=tuple(texts))
    # as many rows in both calls: other numbers of rows are rounded otherwise
    same, many = [order[0]] * 2, [order[0], order[-1]]
    way = max(way, WAYS.index("texts"))  # as several prompts are written out
    alone, beside = (
        first_step(pipe, scheduler, asked, rows, 1, way, stand_ins) for rows in (same, many)
    )
    change = apart(alone[:1], beside[:1])
    if change > max(_ALIKE, _ROUNDINGS * eps):
        raise ValueError(
            f"{type(pipe).__name__} lets a prompt see how long the other texts of its call are: "
            f"its first step of {texts[order[0]]!r:.60} is another beside "
            f"{texts[order[-1]]!r:.60}; leave prompts_per_call at 1."
        )


def _rounding(pipe: DiffusionPipeline) -> float:
    """The relative rounding of the coarsest of the pipeline's networks."""
    dtypes = [getattr(net, "dtype", torch.float32) for net in networks(pipe).values()]
    floats = [dtype for dtype in (*dtypes, torch.float32) if dtype.is_floating_point]
    return max(torch.finfo(dtype).eps for dtype in floats)


def _longer(text: str) -> str:
    """At least 60 words, which is as much as CLIP reads, and twice the text."""
    return " ".join([text] * max(2, 60 // max(1, len(text.split()))))


def no_rows(
    pipe: DiffusionPipeline,
    scheduler: Callable[[Sequence[Generator]], Any],
    call: PipelineCall,
    indices: Sequence[int],
    k: int,
    met: Exception,
) -> Exception:
    """What `met` comes to, where a call with k rows for each of `indices` makes no step in any way.

    A fault that one row alone meets as well has nothing to do with their number.
    """
    said = str(met)
    if not isinstance(met, ValueError):  # else the pipeline's own refusal
        try:
            first_step(pipe, scheduler, call, indices[:1], 1, 0)
        except Exception:
            return met
        said = f"with one alone it comes to a step, and now fails ({said})"
    rows, b = f"{type(pipe).__name__} makes no {len(indices) * k} rows", len(indices)
    if b > 1:
        return ValueError(
            f"{rows} of {b} prompts in one call: {said}; leave prompts_per_call at 1."
        )
    return ValueError(f"{rows} in one call, which resampling needs: {said}")


def first_step(
    pipe: DiffusionPipeline,
    scheduler: Callable[[Sequence[Generator]], Any],
    call: PipelineCall,
    indices: Sequence[int],
    each: int,
    way: int,
    stand_ins: dict[str, Any] | None = None,
) -> Tensor:
    """What the networks give the first step of `each` rows for each of these prompts."""
    noise = [Generator().manual_seed(seed) for seed in range(len(indices) * each)]
    made = scheduler(noise)

    def stop(look: Any) -> None:
        raise _Stepped

    made.chain.observer = stop
    view = view_of(
        pipe, scheduler=made, _progress_bar_config={"disable": True}, **(stand_ins or {})
    )
    asked = call.for_prompts(indices, each, noise, way)
    with SHARED:
        try:
            view(**asked, output_type="latent")
        except _Stepped:
            return made.chain.output
    raise ValueError(
        f"{type(pipe).__name__} made no step of its scheduler; leave prompts_per_call at 1."
    )
