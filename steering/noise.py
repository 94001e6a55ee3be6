"""Whether a pipeline draws from PyTorch's global generators, which no seed of a run sets.

Their states show that something was drawn, not by whom: another thread may draw from them at any
time. So where a state has changed, the call is made once more up to its first step, and what this
thread draws is watched.
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
    """The states of the global generators of the host and of every GPU in use; waits for none."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *gpus]


def _unchanged(before: list[Tensor]) -> bool:
    now = global_states()
    # a GPU that came into use meanwhile is not in `before`
    return all(torch.equal(a, b) for a, b in zip(before, now, strict=False))


class _Watched(TorchDispatchMode):
    """Notes whether an operation of this thread moves a global generator on."""

    drawn = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = any(isinstance(one, Generator) for one in (*args, *kwargs.values()))
        if given or torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        before = global_states()
        out = func(*args, **kwargs)  # attention is of that kind as well, and draws none
        self.drawn = self.drawn or not _unchanged(before)
        return out


def refuse_global_noise(
    pipe: DiffusionPipeline, before: list[Tensor], first: Callable[[], Any]
) -> None:
    """Raise ValueError where a call has drawn from a global generator up to its first step.

    before: `global_states` as it began; first: makes its first step once more.
    """
    if _unchanged(before):
        return
    with _Watched() as watched:
        first()
    if watched.drawn:
        raise ValueError(
            f"{type(pipe).__name__} draws noise from PyTorch's global generator, which no seed "
            "here sets, so a run could not be repeated nor its rows be told apart; use a pipeline "
            "that draws from generator= alone."
        )
