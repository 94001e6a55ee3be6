"""Potentials: how the rewards of the images predicted during the run weigh a particle.

A potential depends on r_t = r(x0_t), the reward of the image predicted from the x_t that it weighs.
It keeps a running total S_t. After a score, the product of all potentials along a particle's
ancestry is exp(λ_t S_t), so the potential itself is the quotient

    log G_t = λ_t S_t - λ_{t-1} S_{t-1}.

For any S_t and λ_t, the last potential replaces that product by exp(λ r(x_final)) (`closing`), so
every potential and every tempering has the same target. They differ in which particles survive
until then, and hence in variance. The first three are named in Singhal et al. (2025), "A general
framework for inference-time scaling and steering of diffusion models".

λ_t may depend on the whole population: γ_t(exp(-λ_t S_t) h_t), where γ_t is the weighted
population and h_t(x) = E[exp(λ r(x_final)) | x_t = x], is a martingale in which λ_t cancels, so
exp(log_z) stays unbiased even if tempering is adaptive.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from steering.weights import conditional_ess

__all__ = [
    "POTENTIALS",
    "History",
    "adaptive",
    "closing",
    "difference",
    "immediate",
    "maximum",
    "summed",
]


class History(NamedTuple):
    """Statistics of the scores along each particle's ancestry, each (b, k)."""

    peak: Tensor  # the largest reward so far; -inf before the first
    sum: Tensor  # the sum of the rewards so far
    total: Tensor  # S_t; the log of the product of applied potentials is λ_t S_t


def difference(history: History, rewards: Tensor) -> History:
    """G_t = exp λ(r_t - r_{t-1}), so S_t = r_t."""
    return history._replace(total=rewards)


def maximum(history: History, rewards: Tensor) -> History:
    """G_t = exp(λ max_{s<=t} r_s): the maximum runs over the scores seen so far."""
    peak = torch.maximum(history.peak, rewards)
    return history._replace(peak=peak, total=history.total + peak)


def summed(history: History, rewards: Tensor) -> History:
    """G_t = exp(λ Σ_{s<=t} r_s): the sum runs over the scores seen so far."""
    so_far = history.sum + rewards
    return history._replace(sum=so_far, total=history.total + so_far)


def immediate(history: History, rewards: Tensor) -> History:
    """G_t = exp(λ r_t): independent of earlier scores."""
    return history._replace(total=history.total + rewards)


POTENTIALS: dict[str, Callable[[History, Tensor], History]] = {
    "difference": difference,
    "max": maximum,
    "sum": summed,
    "immediate": immediate,
}


def closing(rewards: Tensor, reward_scale: float) -> Tensor:
    """Return λ r(x_final), the log of the product of all potentials, the last included.

    rewards (b, k): those of the returned images. The running maximum or sum is not used here;
    closing with it would target exp(λ max r) instead.
    """
    return reward_scale * rewards


# The conditional ess, as a fraction of k, that one score may leave. The search is exact to 32^-6 λ.
TARGET = 0.5
ROUNDS, PARTS = 6, 32


def adaptive(
    log_weights: Tensor, total: Tensor, applied: Tensor, scale: Tensor, reward_scale: float
) -> Tensor:
    """Return the λ_t of each prompt at which one score leaves a conditional ess of k/2.

    Moves from the λ_{t-1} in `scale` (b,) towards `reward_scale` until the conditional ess
    k (Σ W g)^2 / Σ W g^2 of the increments g = exp(λ_t S_t - applied) falls to k/2 (Zhou, Johansen
    & Aston 2016), or all the way if it stays above. `log_weights`, `total` = S_t and `applied` =
    λ_{t-1} S_{t-1} are (b, k); returns (b,). The search runs on the device: each of ROUNDS rounds
    splits the bracket into PARTS. It returns the end just past the target, so that min_ess = 0.5
    resamples.
    """
    k = log_weights.shape[-1]
    low = torch.zeros_like(scale)[:, None]
    high = torch.ones_like(low)
    cuts = torch.arange(1, PARTS, device=scale.device, dtype=scale.dtype) / PARTS

    def reached(fraction: Tensor) -> Tensor:
        return scale[:, None] + fraction * (reward_scale - scale[:, None])

    def too_far(fraction: Tensor) -> Tensor:
        increments = reached(fraction)[:, :, None] * total[:, None] - applied[:, None]
        return conditional_ess(log_weights[:, None], increments) < TARGET * k

    binds = too_far(high)[:, 0]
    for _ in range(ROUNDS):
        ends = torch.cat([low, low + cuts * (high - low), high], dim=1)
        # the first end past the target, or the last end if none is
        past = torch.cat([too_far(ends[:, 1:-1]), torch.ones_like(low, dtype=torch.bool)], dim=1)
        first = past.to(torch.uint8).argmax(dim=1, keepdim=True)
        low, high = ends.gather(1, first), ends.gather(1, first + 1)
    # Exactly the full scale, without round-off, if the target is not reached.
    return torch.where(binds, reached(high)[:, 0], torch.full_like(scale, reward_scale))
