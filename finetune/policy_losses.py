"""Losses for training on a model's own samples, as functions of tensors.

Legend: g groups (one prompt each), k images per group, n = g·k rows; ρ = π / π_old, the ratio of
the trained to the sampling policy. Losses are returned per row; the caller averages. Arguments are
checked as `tensor_checks` says.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .tensor_checks import broadcasts, check_alike, known, predicted

__all__ = [
    "SPREADS",
    "clipped",
    "group_advantages",
    "guarded_log_ratio",
    "matching_score",
    "nft_loss",
    "policy_loss",
]

SPREADS = ("group", "global", "none")
SMALLEST = 1e-5, 1e-10  # of the published codes: NFT's smallest error, what AWM adds to errors


def group_advantages(
    rewards: Tensor,
    *,
    spread: str = "group",
    eps: float = 1e-4,
    kept: Tensor | None = None,
    population: bool = False,
) -> Tensor:
    """Return (r - group mean) / (std + eps), (g, k), with the group's or global std, or 1 ("none").

    GRPO (Shao et al. 2024); "global" as in Flow-GRPO. A group of equal rewards gives zeros. kept:
    bool (g, k), the images that count; the advantage of the others is 0, and they do not affect the
    rest. population: divide the sum of squares by the number of rewards, as the code of Flow-GRPO,
    DiffusionNFT and AWM does, instead of by one less, as that of DanceGRPO does.
    """
    if spread not in SPREADS:
        raise ValueError(f"spread is {spread!r} but must be one of {list(SPREADS)}")
    if rewards.ndim != 2 or rewards.shape[1] < 2 or not 0 <= eps < math.inf:
        raise ValueError(
            "rewards (g, k) with k of 2 or more and an eps of 0 or more are needed, but got "
            f"{tuple(rewards.shape)} and {eps}"
        )
    less = 0 if population else 1
    if kept is not None:
        return _advantages_of_kept(rewards.float(), kept, spread, eps, less)
    rewards = known(rewards.float(), "rewards")
    flat = (rewards == rewards[:, :1]).all(-1, keepdim=True)  # also where their mean is rounded
    centred = (rewards - rewards.mean(-1, keepdim=True)).masked_fill(flat, 0.0)
    if spread == "none":
        return centred
    if spread == "group":
        return centred / (centred.std(-1, keepdim=True, correction=less) + eps)
    return centred / (rewards.std(correction=less) + eps)


def _advantages_of_kept(
    rewards: Tensor, kept: Tensor, spread: str, eps: float, less: int
) -> Tensor:
    if kept.shape != rewards.shape or kept.dtype != torch.bool:
        raise ValueError(
            f"kept must be bool {tuple(rewards.shape)} but is {kept.dtype} {tuple(kept.shape)}"
        )
    r, count = known(rewards.masked_fill(~kept, 0.0), "rewards"), kept.sum(-1, keepdim=True)
    best = r.masked_fill(~kept, -math.inf).amax(-1, keepdim=True)
    flat = ((r == best) | ~kept).all(-1, keepdim=True)
    centred = (r - r.sum(-1, keepdim=True) / count.clamp(min=1)) * (kept & ~flat)
    if spread == "none":
        return centred
    if spread == "group":
        variance = centred.square().sum(-1, keepdim=True) / (count - less).clamp(min=1)
        return centred / (variance.sqrt() + eps)
    every = ((r - r.sum() / kept.sum().clamp(min=1)) * kept).square().sum()
    return centred / ((every / (kept.sum() - less).clamp(min=1)).sqrt() + eps)


def policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, *, clip: float = 1e-4
) -> Tensor:
    """Return -min(ρ A, clip(ρ, 1 - c, 1 + c) A) with ρ = π / π_old (Schulman et al. 2017, eq. 7).

    Shapes broadcast. On-policy, ρ is 1 and the gradient is -A ∇ log π.
    """
    _check_clip(clip, log_prob, old_log_prob, advantages)
    ratio = predicted(log_prob - old_log_prob, "log-densities").exp()
    advantages = known(advantages, "advantages")
    bounded = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, bounded * advantages)


def guarded_log_ratio(
    log_prob: Tensor, old_log_prob: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor
) -> Tensor:
    """Return log ρ of GRPO-Guard (Wang et al. 2025), (n,), for moves N(mean, std²) (n, *shape).

    σ (log π - log π_old + mean|μ - μ_old|² / (2σ²)), with log-densities (n,) divided by the number
    of elements. On samples of the old policy the log-ratio has the mean -mean|μ - μ_old|² / (2σ²),
    so that ρ is too often below 1 and clipping from above fails; this one has the mean 0, and its
    spread no longer depends on σ. std broadcasts to (n,).
    """
    check_alike("means", mean, old_mean)
    if log_prob.shape != mean.shape[:1] or not broadcasts(std, log_prob.shape):
        raise ValueError(
            f"means (n, ...), log-densities (n,) and a std that broadcasts to (n,) are needed, but "
            f"got {tuple(mean.shape)}, {tuple(log_prob.shape)} and {tuple(std.shape)}"
        )
    apart = (mean - old_mean).square().flatten(1).mean(1)
    return std * (log_prob - old_log_prob + apart / (2 * std.square()))


def clipped(log_prob: Tensor, old_log_prob: Tensor, *, clip: float = 1e-4) -> Tensor:
    """Return 1.0 for each ratio outside [1 - c, 1 + c] and 0.0 for others, to log their mean."""
    _check_clip(clip, log_prob, old_log_prob)
    ratio = (log_prob.detach() - old_log_prob).exp()
    return ((ratio - 1).abs() > clip).float()


def nft_loss(
    pred: Tensor,
    old_pred: Tensor,
    target: Tensor,
    good: Tensor,
    *,
    beta: float = 1.0,
    x0_error: Tensor | None = None,
) -> Tensor:
    """Return the DiffusionNFT loss (Zheng et al. 2025), (n,) from predictions (n, *shape).

    r |v+ - v|² + (1 - r) |v- - v|², means over elements, with v± = v_old ± β (v_θ - v_old) and
    r = good (n,) in [0, 1]. On images of the old policy its minimum is
    v_θ = v_old + (2/β) E[r (v - v_old)]. It needs no log-probabilities and no stochastic sampler.

    x0_error (n,), the error of x0 by that of the prediction (`Noising.x0_error`), gives the form of
    the published code: each |v± - v|² is that of x0, divided by β and by its own mean absolute
    error, which has no gradient.
    """
    check_alike("predictions, old predictions and targets", pred, old_pred, target)
    if pred.ndim < 2 or good.shape != pred.shape[:1] or not 0 < beta < math.inf:
        raise ValueError(
            f"predictions (n, ...), good (n,) and a positive beta are needed, but got "
            f"{tuple(pred.shape)}, {tuple(good.shape)} and {beta}"
        )
    good = known(good, "good", inside=True)
    move = beta * (pred.float() - old_pred.float())
    plus, minus = ((old_pred + m - target).float() for m in (move, -move))
    if x0_error is None:
        plus, minus = (error.square().flatten(1).mean(1) for error in (plus, minus))
    else:
        plus, minus = (_self_normalised(error, x0_error) / beta for error in (plus, minus))
    return predicted(good * plus + (1 - good) * minus, "errors")


def _self_normalised(error: Tensor, factor: Tensor) -> Tensor:
    """Return mean e² / mean|e| with e = factor · error, (n,); the divisor has no gradient."""
    if factor.shape != error.shape[:1]:
        raise ValueError(f"x0_error must be {tuple(error.shape[:1])} but is {tuple(factor.shape)}")
    error = factor[:, None] * error.flatten(1)
    return error.square().mean(1) / error.detach().abs().mean(1).clamp(min=SMALLEST[0])


def matching_score(
    pred: Tensor, target: Tensor, t: Tensor, *, power: float = 1.0, time_power: float = 0.0
) -> Tensor:
    """Return -t^a (mean|v - v_θ|²)^p / p, (n,) from predictions (n, *shape) and t (n,) in [0, 1].

    What advantage weighted matching (AWM, Xue et al. 2025) uses as log π in `policy_loss`: p = 1
    and a = 0 is the likelihood bound of a flow without its weight. p = power in (0, 1], a =
    time_power. The published code has (p, a) = (1, 0), (1, 1), (1, 2), (1/4, 1), its default for
    text to image, and (1/2, 1) at half the size. Powers below 1 are of the error plus 1e-10.
    """
    check_alike("predictions and targets", pred, target)
    if pred.ndim < 2 or t.shape != pred.shape[:1] or not (0 < power <= 1 and time_power >= 0):
        raise ValueError(
            "predictions (n, ...), t (n,), a power in (0, 1] and a time_power of 0 or more are "
            f"needed, but got {tuple(pred.shape)}, {tuple(t.shape)}, {power} and {time_power}"
        )
    t, least = known(t, "t", inside=True), SMALLEST[1]
    error = (pred.float() - target.float()).square().flatten(1).mean(1)
    if power < 1:
        error = ((error + least) ** power - least**power) / power
    return predicted(-(t**time_power) * error, "errors")


def _check_clip(clip: float, *tensors: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    try:
        torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise ValueError(f"log-densities and advantages do not broadcast: {shapes}") from None
    if not 0 < clip < math.inf:
        raise ValueError(f"clip is {clip} but must be positive and finite")
