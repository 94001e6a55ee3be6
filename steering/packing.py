"""Check that a call may hold several rows, and that its prompts do not affect each other.

A pipeline may pad the texts of a call to the longest one without masking the padding. Shapes do not
show this, so the first step of the run's shortest prompt is made twice, together with itself and
together with the longest prompt, and the network outputs are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from steering.call import WAYS, PipelineCall
from steering.networks import networks
from steering.probe import apart
from steering.tape import SHARED, view_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["check_alone", "first_step", "no_rows"]

_ALIKE = 1e-3  # tolerated relative difference, which rounding alone may cause
_ROUNDINGS = 8  # the same in units of the dtype's eps, which guidance amplifies
_FINE = 1e-4  # a dtype with a larger eps is half precision


class _Stepped(BaseException):
    """Ends a call at its first step; a BaseException, so that no pipeline catches it."""


def check_alone(
    pipe: DiffusionPipeline,
    scheduler: Callable[[Sequence[Generator]], Any],
    call: PipelineCall,
    way: int,
    stand_ins: dict[str, Any],
) -> None:
    """Raise ValueError if a longer prompt in the same call changes a prompt's first step.

    scheduler: makes the scheduler of a call from its generators; way: index into call.WAYS;
    stand_ins: replace the networks of a call of two rows if its batch has to be cut.
    """
    order = sorted(range(len(call.prompts)), key=lambda i: len(call.prompts[i]))
    eps = _rounding(pipe)
    texts = list(call.prompts)
    if eps > _FINE:
        texts[order[-1]] = _longer(texts[order[-1]])
    asked = replace(call, prompts=tuple(texts))
    # as many rows in both calls, since rounding depends on the number of rows
    same, many = [order[0]] * 2, [order[0], order[-1]]
    way = max(way, WAYS.index("texts"))  # several prompts are always repeated as texts
    alone, beside = (
        first_step(pipe, scheduler, asked, rows, 1, way, stand_ins) for rows in (same, many)
    )
    change = apart(alone[:1], beside[:1])
    if change > max(_ALIKE, _ROUNDINGS * eps):
        raise ValueError(
            f"{type(pipe).__name__} lets the other texts of a call change a prompt's result: "
            f"its first step of {texts[order[0]]!r:.60} is different beside "
            f"{texts[order[-1]]!r:.60}; leave prompts_per_call at 1."
        )


def _rounding(pipe: DiffusionPipeline) -> float:
    """Return the largest machine epsilon among the dtypes of the pipeline's networks."""
    dtypes = [getattr(net, "dtype", torch.float32) for net in networks(pipe).values()]
    floats = [dtype for dtype in (*dtypes, torch.float32) if dtype.is_floating_point]
    return max(torch.finfo(dtype).eps for dtype in floats)


def _longer(text: str) -> str:
    """Repeat the text at least twice, and to about 60 words, which is about CLIP's limit."""
    return " ".join([text] * max(2, 60 // max(1, len(text.split()))))


def no_rows(
    pipe: DiffusionPipeline,
    scheduler: Callable[[Sequence[Generator]], Any],
    call: PipelineCall,
    indices: Sequence[int],
    k: int,
    met: Exception,
) -> Exception:
    """Return the error to raise if no way to request k rows for each of `indices` works.

    That is `met` itself if a single row fails as well, since the number of rows is not the cause.
    """
    said = str(met)
    if not isinstance(met, ValueError):  # a ValueError is the pipeline's own explanation
        try:
            first_step(pipe, scheduler, call, indices[:1], 1, 0)
        except Exception:
            return met
        said = f"one row works, but several fail ({said})"
    rows, b = f"{type(pipe).__name__} cannot make {len(indices) * k} rows", len(indices)
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
    """Return the network output at the first step, with `each` rows for each of these prompts."""
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
