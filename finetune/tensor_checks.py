"""Checks of the arguments of losses: shapes always, values where looking at them costs nothing.

Values are checked only on the CPU, since on a GPU each check would synchronise: rewards, advantages
and probabilities that are not finite or out of range raise a ValueError, network outputs that are
not finite a FloatingPointError (except in distributed training, where they must reach the gradient
that all processes see). On a GPU a wrong value makes the loss NaN, and `learner.Learner` refuses a
gradient that is not finite.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, distributed

__all__ = ["broadcasts", "check_alike", "known", "predicted"]


def check_alike(what: str, *tensors: Tensor) -> None:
    """Raise ValueError for tensors of different shapes."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        raise ValueError(f"{what} must have one shape but have {shapes}")


def broadcasts(tensor: Tensor, shape: torch.Size) -> bool:
    """Return whether a tensor broadcasts to a shape."""
    try:
        return torch.broadcast_shapes(tensor.shape, shape) == shape
    except RuntimeError:
        return False


def known(values: Tensor, name: str, inside: bool = False) -> Tensor:
    """Check inputs to be finite, and with `inside` in [0, 1]; see the module for GPUs."""
    if not values.is_floating_point():
        return values
    bad = ~values.detach().isfinite()
    if inside:
        bad = bad | (values.detach() < 0) | (values.detach() > 1)
    if not _is_free_to_look(values):
        return values.masked_fill(bad, math.nan)
    if bad.any():
        wanted = "finite and in [0, 1]" if inside else "finite"
        raise ValueError(f"{name} must be {wanted} but {int(bad.sum())} of {bad.numel()} are not")
    return values


def predicted(values: Tensor, name: str) -> Tensor:
    """Check values computed from a network's outputs to be finite; see the module for GPUs."""
    together = distributed.is_available() and distributed.is_initialized()
    if _is_free_to_look(values) and not together and not values.detach().isfinite().all():
        raise FloatingPointError(f"{name} are not finite: lower the learning rate")
    return values


def _is_free_to_look(values: Tensor) -> bool:
    return values.device.type == "cpu"
