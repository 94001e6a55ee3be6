"""Detect pipelines that draw from PyTorch's global generators, which a run does not seed.

A changed state of a global generator shows that something drew from it, but not which thread did.
So if a state has changed, the call is repeated up to its first step while the draws of this thread
are watched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["global_states", "refuse_global_noise"]


def global_states() -> list[Tensor]:
    """Return the states of the global generators of the CPU and, once CUDA is in use, the GPUs."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *gpus]


def _unchanged(before: list[Tensor]) -> bool:
    now = global_states()
    # GPUs that were initialised since then are not in `before`
    return all(torch.equal(a, b) for a, b in zip(before, now, strict=False))


class _Watched(TorchDispatchMode):
    """Records whether an operation of this thread advances a global generator."""

    drawn = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = any(isinstance(one, Generator) for one in (*args, *kwargs.values()))
        if given or torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        before = global_states()
        out = func(*args, **kwargs)  # attention has this tag as well, but draws nothing
        self.drawn = self.drawn or not _unchanged(before)
        return out


def refuse_global_noise(
    pipe: DiffusionPipeline, before: list[Tensor], first: Callable[[], Any]
) -> None:
    """Raise ValueError if a call has drawn from a global generator before its first step.

    before: `global_states()` at the beginning of the call; first: repeats its first step.
    """
    if _unchanged(before):
        return
    with _Watched() as watched:
        first()
    if watched.drawn:
        raise ValueError(
            f"{type(pipe).__name__} draws noise from PyTorch's global generator, which seed= does "
            "not set: a run could not be repeated, and particles could not be given noise of "
            "their own; use a pipeline that draws only from generator=."
        )
