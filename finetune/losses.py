"""Losses for preference and policy training, as functions of tensors.

Legend: g groups (one prompt each), k images per group, `scores` implicit rewards, `rewards`
explicit ones, r1 >= ... >= rk once sorted. Losses are returned per group; the caller averages.

Shapes are always checked, with a ValueError. Values are checked only on the CPU, since on a GPU
each check would synchronise: rewards, advantages and probabilities that are not finite or out of
range raise a ValueError, network outputs that are not finite a FloatingPointError (except in
distributed training, where they must reach the gradient that all processes see). On a GPU a wrong
value makes the loss NaN, and `learner.Learner` refuses a gradient that is not finite.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

__all__ = [
    "best_image_loss",
    "clipped",
    "dpo_loss",
    "elbo_weight",
    "gdro_loss",
    "group_advantages",
    "implicit_scores",
    "kto_loss",
    "nft_loss",
    "policy_loss",
    "shuffled_order",
    "soft_preference_loss",
    "target_distribution",
]

FORMS = ("full", "top1", "rank")
SPREADS = ("group", "global", "none")


def implicit_scores(
    pred: Tensor, ref_pred: Tensor, target: Tensor, *, beta: float, weight: Tensor | None = None
) -> Tensor:
    """Return -β w (mean|target - pred|² - mean|target - ref_pred|²), (g, k) from (g, k, *shape).

    This is the reward for which the tuned model is the tilted reference (Wallace et al. 2023,
    Diffusion-DPO, eq. 14; GDRO's s). The **mean** over an image's elements makes β independent of
    the resolution. Noise and timestep must be shared within a group, or the optimum shrinks.
    `weight` broadcasts to (g, k); None is 1, and `elbo_weight` makes the score an exact likelihood
    ratio on average over t. Computed in float32.
    """
    if not (pred.shape == ref_pred.shape == target.shape) or pred.ndim < 3:
        raise ValueError(
            f"predictions of one shape (g, k, ...) are needed, but got {tuple(pred.shape)},"
            f" {tuple(ref_pred.shape)} and {tuple(target.shape)}"
        )
    if not 0 < beta < math.inf:
        raise ValueError(f"beta is {beta} but must be positive and finite")
    if weight is not None and not _broadcasts(weight, pred.shape[:2]):
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} does not broadcast to {tuple(pred.shape[:2])}"
        )
    target = target.float()
    better = _squared(pred.float() - target) - _squared(ref_pred.float() - target)
    return _predicted(-beta * better * (1.0 if weight is None else weight), "implicit scores")


def _squared(error: Tensor) -> Tensor:
    return error.square().flatten(2).mean(2)


def elbo_weight(t: Tensor, prediction: str = "velocity") -> Tensor:
    """Return weights by which a flow's implicit score is a likelihood ratio on average over t.

    x_t = (1 - t) x0 + t ε with t ~ U(0, 1). The likelihood bound is ½ E|dλ/dt| |ε - ε̂|² with λ the
    log signal-to-noise ratio (Kingma et al. 2021, eq. 17), here 2 log((1 - t)/t); the error of the
    velocity is that of ε divided by (1 - t). This gives (1 - t)/t for velocity and 1/(t (1 - t))
    for epsilon. It applies to the **sum** over an image's elements: multiply β by their number.
    """
    t = _known(t, "t", inside=True)
    if prediction == "velocity":
        return (1 - t) / t
    if prediction == "epsilon":
        return 1 / (t * (1 - t))
    raise ValueError(f"prediction is {prediction!r} but must be 'velocity' or 'epsilon'")


def target_distribution(rewards: Tensor, temperature: float) -> Tensor:
    """Return softmax(r/τ) over each group, (g, k): the target of the implicit scores."""
    _check_temperature(temperature)
    return (_known(rewards.float(), "rewards") / temperature).softmax(-1)


def shuffled_order(rewards: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return indices (g, k) that sort rewards in descending order, with ties in random order.

    Rewards such as OCR's are discrete, and the full and rank forms depend on the order of ties, so
    a stable sort would train on the order of the file. Without a generator the sort is stable.
    """
    rewards = _known(rewards, "rewards")
    if generator is None:
        return rewards.argsort(dim=-1, descending=True, stable=True)
    draws = torch.rand(rewards.shape, generator=generator, device=generator.device)
    first = draws.to(rewards.device).argsort(-1)
    then = rewards.gather(-1, first).argsort(dim=-1, descending=True, stable=True)
    return first.gather(-1, then)


def gdro_loss(
    scores: Tensor,
    rewards: Tensor,
    *,
    temperature: float,
    form: str = "full",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the loss of group-level direct reward optimisation, (g,) from (g, k).

    With q_i = softmax(r/τ) over the i-th best image and all worse ones:

        top1   log Σ_j exp(s_j) - Σ_j q_1(j) s_j
        full   Σ_{i<k} [log Σ_{j>=i} exp(s_j) - Σ_{j>=i} q_i(j) s_j]      (GDRO, eq. 9)
        rank   Σ_{i<k} [log Σ_{j>=i} exp(s_j) - s_i], the limit τ -> 0 (Plackett-Luce)

    top1 and full are smallest at s = r/τ + const, where top1 is the entropy of q_1 and full the sum
    of the entropies of all q_i. `generator` breaks ties of the rewards; see `shuffled_order`.
    """
    _check_groups(scores, rewards)
    scores, rewards = _predicted(scores, "scores"), _known(rewards, "rewards")
    if form not in FORMS:
        raise ValueError(f"form is {form!r} but must be one of {list(FORMS)}")
    if form == "top1":
        q = target_distribution(rewards, temperature)
        return scores.logsumexp(-1) - (q * scores).sum(-1)
    order = shuffled_order(rewards, generator)
    s, r = scores.gather(-1, order), rewards.float().gather(-1, order)
    s = s + 0 * r.sum(-1, keepdim=True)  # propagates NaN, which sorting would hide
    remaining = s.flip(-1).logcumsumexp(-1).flip(-1)  # (g, k): over j >= i
    if form == "rank":
        return (remaining - s)[:, :-1].sum(-1)
    _check_temperature(temperature)
    k = s.shape[-1]
    behind = torch.ones(k, k, dtype=torch.bool, device=s.device).triu()  # (i, j): j >= i
    logits = (r / temperature)[:, None, :].masked_fill(~behind, -torch.inf)
    expected = (logits.softmax(-1) * s[:, None, :]).sum(-1)
    return (remaining - expected)[:, :-1].sum(-1)


def best_image_loss(
    pred: Tensor, target: Tensor, rewards: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Return mean|target - pred|² of each group's best image, (g,) (GDRO, eq. 12).

    The ranking loss alone lowers the likelihood of every image, even the best; this counteracts it.
    Ties are broken at random by `generator`.
    """
    if pred.shape != target.shape or pred.ndim < 3 or pred.shape[:2] != rewards.shape:
        raise ValueError(
            "predictions and targets (g, k, ...) and rewards (g, k) are needed, but got "
            f"{tuple(pred.shape)}, {tuple(target.shape)} and {tuple(rewards.shape)}"
        )
    rewards = _known(rewards.float(), "rewards")
    best = shuffled_order(rewards, generator)[:, 0]
    rows = torch.arange(len(best), device=best.device)
    error = (pred[rows, best].float() - target[rows, best].float()).square().flatten(1).mean(1)
    return _predicted(error + 0 * rewards.sum(-1), "errors")  # propagates NaN


def dpo_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return -log σ(s_w - s_l) (Rafailov et al. 2023): GDRO with k = 2 in the limit τ -> 0.

    The β of `implicit_scores` corresponds to half the β of Diffusion-DPO's published code.
    """
    _check_alike("chosen and rejected scores", chosen, rejected)
    return -F.logsigmoid(_predicted(chosen - rejected, "scores"))


def soft_preference_loss(first: Tensor, second: Tensor, probability: Tensor) -> Tensor:
    """Return the cross-entropy of "the first is better", which is true with `probability`.

    With probability σ(r_1 - r_2) this is RPO (Gu et al. 2024), with σ((r_1 - r_2)/τ) GDRO, k = 2.
    """
    _check_alike("two scores and a probability", first, second, probability)
    margin = _predicted(first - second, "scores")
    probability = _known(probability.to(margin.dtype), "probability", inside=True)
    return F.binary_cross_entropy_with_logits(margin, probability, reduction="none")


def kto_loss(
    scores: Tensor, desirable: Tensor, *, weights: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """Return the loss of Kahneman-Tversky optimisation for unpaired images, shaped as `scores`.

    w (1 - σ(±(s - z))), + for desirable images; the reference point z = max(0, mean s) has no
    gradient (Ethayarajh et al. 2024, eq. 8; Li et al. 2024 for diffusion). weights: w of desirable
    and of undesirable images.
    """
    _check_alike("scores and desirable", scores, desirable)
    if desirable.dtype != torch.bool or not all(0 <= w < math.inf for w in weights):
        raise ValueError(
            f"desirable must be bool, and weights finite and not negative, but they are "
            f"{desirable.dtype} and {weights}"
        )
    scores = _predicted(scores, "scores")
    reference = scores.detach().mean().clamp(min=0)
    sign = torch.where(desirable, 1.0, -1.0)
    weight = torch.where(desirable, *(scores.new_tensor(w) for w in weights))
    return weight * (1 - torch.sigmoid(sign * (scores - reference)))


def group_advantages(
    rewards: Tensor, *, spread: str = "group", eps: float = 1e-4, kept: Tensor | None = None
) -> Tensor:
    """Return (r - group mean) / (std + eps), (g, k), with the group's or global std, or 1 ("none").

    GRPO (Shao et al. 2024); "global" as in Flow-GRPO. A group of equal rewards gives zeros. kept:
    bool (g, k), the images that count; the advantage of the others is 0, and they do not affect the
    rest.
    """
    if spread not in SPREADS:
        raise ValueError(f"spread is {spread!r} but must be one of {list(SPREADS)}")
    if rewards.ndim != 2 or rewards.shape[1] < 2 or not 0 <= eps < math.inf:
        raise ValueError(
            "rewards (g, k) with k of 2 or more and an eps of 0 or more are needed, but got "
            f"{tuple(rewards.shape)} and {eps}"
        )
    if kept is not None:
        return _advantages_of_kept(rewards.float(), kept, spread, eps)
    rewards = _known(rewards.float(), "rewards")
    centred = rewards - rewards.mean(-1, keepdim=True)
    if spread == "none":
        return centred
    if spread == "group":
        return centred / (centred.std(-1, keepdim=True) + eps)
    return centred / (rewards.std() + eps)


def _advantages_of_kept(rewards: Tensor, kept: Tensor, spread: str, eps: float) -> Tensor:
    if kept.shape != rewards.shape or kept.dtype != torch.bool:
        raise ValueError(
            f"kept must be bool {tuple(rewards.shape)} but is {kept.dtype} {tuple(kept.shape)}"
        )
    r, count = _known(rewards.masked_fill(~kept, 0.0), "rewards"), kept.sum(-1, keepdim=True)
    centred = (r - r.sum(-1, keepdim=True) / count.clamp(min=1)) * kept
    if spread == "none":
        return centred
    if spread == "group":
        variance = centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
        return centred / (variance.sqrt() + eps)
    every = ((r - r.sum() / kept.sum().clamp(min=1)) * kept).square().sum()
    return centred / ((every / (kept.sum() - 1).clamp(min=1)).sqrt() + eps)


def policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, *, clip: float = 1e-4
) -> Tensor:
    """Return -min(ρ A, clip(ρ, 1 - c, 1 + c) A) with ρ = π / π_old (Schulman et al. 2017, eq. 7).

    Shapes broadcast. On-policy, ρ is 1 and the gradient is -A ∇ log π.
    """
    _check_clip(clip, log_prob, old_log_prob, advantages)
    ratio = _predicted(log_prob - old_log_prob, "log-densities").exp()
    advantages = _known(advantages, "advantages")
    bounded = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, bounded * advantages)


def nft_loss(
    pred: Tensor, old_pred: Tensor, target: Tensor, good: Tensor, *, beta: float = 1.0
) -> Tensor:
    """Return the DiffusionNFT loss (Zheng et al. 2025), (n,) from predictions (n, *shape).

    r |v+ - v|² + (1 - r) |v- - v|², means over elements, with v± = v_old ± β (v_θ - v_old) and
    r = good (n,) in [0, 1]. On images of the old policy its minimum is
    v_θ = v_old + (2/β) E[r (v - v_old)]. It needs no log-probabilities and no stochastic sampler.
    """
    _check_alike("predictions, old predictions and targets", pred, old_pred, target)
    if pred.ndim < 2 or good.shape != pred.shape[:1] or not 0 < beta < math.inf:
        raise ValueError(
            f"predictions (n, ...), good (n,) and a positive beta are needed, but got "
            f"{tuple(pred.shape)}, {tuple(good.shape)} and {beta}"
        )
    good = _known(good, "good", inside=True)
    move = beta * (pred.float() - old_pred.float())
    plus, minus = ((old_pred + m - target).float().square() for m in (move, -move))
    loss = good * plus.flatten(1).mean(1) + (1 - good) * minus.flatten(1).mean(1)
    return _predicted(loss, "errors")


def clipped(log_prob: Tensor, old_log_prob: Tensor, *, clip: float = 1e-4) -> Tensor:
    """Return 1.0 for each ratio outside [1 - c, 1 + c] and 0.0 for others, to log their mean."""
    _check_clip(clip, log_prob, old_log_prob)
    ratio = (log_prob.detach() - old_log_prob).exp()
    return ((ratio - 1).abs() > clip).float()


def _check_groups(scores: Tensor, rewards: Tensor) -> None:
    if scores.ndim != 2 or scores.shape != rewards.shape or scores.shape[-1] < 2:
        raise ValueError(
            "scores and rewards must both be (g, k) with k of 2 or more but are "
            f"{tuple(scores.shape)} and {tuple(rewards.shape)}"
        )


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature is {temperature} but must be positive and finite; form='rank' is τ = 0"
        )


def _check_alike(what: str, *tensors: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        raise ValueError(f"{what} must have one shape but have {shapes}")


def _check_clip(clip: float, *tensors: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    try:
        torch.broadcast_shapes(*shapes)
    except RuntimeError:
        raise ValueError(f"log-densities and advantages do not broadcast: {shapes}") from None
    if not 0 < clip < math.inf:
        raise ValueError(f"clip is {clip} but must be positive and finite")


def _broadcasts(tensor: Tensor, shape: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(tensor.shape, shape) == shape
    except RuntimeError:
        return False


def _is_free_to_look(values: Tensor) -> bool:
    return values.device.type == "cpu"


def _known(values: Tensor, name: str, inside: bool = False) -> Tensor:
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


def _predicted(values: Tensor, name: str) -> Tensor:
    """Check values computed from a network's outputs to be finite; see the module for GPUs."""
    together = distributed.is_available() and distributed.is_initialized()
    if _is_free_to_look(values) and not together and not values.detach().isfinite().all():
        raise FloatingPointError(f"{name} are not finite: lower the learning rate")
    return values
