"""Operations on the log-weights of a particle population, along the last axis.

Half precision is computed in float32; float64 stays float64.
"""

import math

import torch
from torch import Tensor

__all__ = ["conditional_ess", "ess", "log_mean_exp", "normalize"]


def normalize(log_weights: Tensor) -> Tensor:
    """Return weights that sum to one over the last axis: exp(log_weights) / sum exp(log_weights).

    log_weights (..., k), each finite or -inf, at least one finite; returns (..., k) in [0, 1].
    """
    return torch.softmax(_at_least_float32(log_weights), dim=-1)


def ess(log_weights: Tensor) -> Tensor:
    """Return the effective sample size (sum w)^2 / sum w^2 (Kong, Liu & Wong 1994), from 1 to k.

    log_weights (..., k); returns (...). Exactly k for equal weights, exactly 1 for a single one.
    """
    log_weights = _at_least_float32(log_weights)
    # Relative to the largest, so that a large common constant costs no precision.
    weights = torch.exp(log_weights - log_weights.amax(dim=-1, keepdim=True))
    return weights.sum(dim=-1).square() / weights.square().sum(dim=-1)


def conditional_ess(log_weights: Tensor, increments: Tensor) -> Tensor:
    """Return k (sum W g)^2 / sum W g^2, with W the normalised weights and g = exp(increments).

    This is the conditional effective sample size of one reweighting (Zhou, Johansen & Aston 2016);
    for equal weights it equals `ess` of the increments. Both arguments (..., k); returns (...).
    """
    log_weights = torch.log_softmax(_at_least_float32(log_weights), dim=-1)
    increments = increments - increments.amax(dim=-1, keepdim=True)
    once = torch.logsumexp(log_weights + increments, dim=-1)
    twice = torch.logsumexp(log_weights + 2 * increments, dim=-1)
    return log_weights.shape[-1] * torch.exp(2 * once - twice)


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """Return log((1/k) sum exp(log_weights)) over the last axis: (..., k) -> (...)."""
    log_weights = _at_least_float32(log_weights)
    return torch.logsumexp(log_weights, dim=-1) - math.log(log_weights.shape[-1])


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
