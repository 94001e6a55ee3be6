"""Losses of preference and policy training: functions of tensors, no networks.

Legend: g groups (one prompt each), k images a group, `scores` implicit rewards, `rewards` explicit
ones; r1 >= ... >= rk once sorted. Every loss is returned by group, so that the caller averages.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    """-β w (mean|target - pred|² - mean|target - ref_pred|²), (g, k) from (g, k, *shape).

    The reward that makes the tuned model the tilted reference (Wallace et al. 2023, Diffusion-DPO,
    eq. 14; GDRO's s). The **mean** over an image's elements is taken, so β does not depend on the
    resolution; noise and timestep must be shared within a group, or the optimum shrinks.
    `weight` broadcasts to (g, k): None is 1, `elbo_weight` makes the score an exact likelihood
    ratio on average over t. Float32 whatever the predictions are.
    """
    if not (pred.shape == ref_pred.shape == target.shape) or pred.ndim < 3:
        raise ValueError(
            f"predictions of shape (g, k, ...) are needed, all alike, but got {tuple(pred.shape)},"
            f" {tuple(ref_pred.shape)} and {tuple(target.shape)}"
        )
    target = target.float()
    better = _squared(pred.float() - target) - _squared(ref_pred.float() - target)
    return -beta * better * (1.0 if weight is None else weight)


def _squared(error: Tensor) -> Tensor:
    return error.square().flatten(2).mean(2)


def elbo_weight(t: Tensor, prediction: str = "velocity") -> Tensor:
    """The weight that makes a flow's implicit score, averaged over t ~ U(0, 1), a likelihood ratio.

    x_t = (1 - t) x0 + t ε. The likelihood bound is ½ E|dλ/dt| |ε - ε̂|² with λ the log
    signal-to-noise ratio (Kingma et al. 2021, eq. 17), here 2 log((1 - t)/t); an error of the
    velocity is that of ε over (1 - t). So (1 - t)/t for velocity and 1/(t (1 - t)) for epsilon. It
    applies to the **sum** over an image's elements: give β times their number.
    """
    if prediction == "velocity":
        return (1 - t) / t
    if prediction == "epsilon":
        return 1 / (t * (1 - t))
    raise ValueError(f"prediction is {prediction!r} but must be 'velocity' or 'epsilon'")


def target_distribution(rewards: Tensor, temperature: float) -> Tensor:
    """softmax(r/τ) over each group, (g, k): what the implicit scores are fitted to."""
    _check_temperature(temperature)
    return (rewards.float() / temperature).softmax(-1)


def shuffled_order(rewards: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Indices (g, k) that sort rewards downwards, equal rewards in a random order.

    Scores such as OCR's are discrete, and the full and rank forms depend on the order of ties;
    a sort that keeps the order of the file would train on it. Without a generator the order of
    equal rewards is that given.
    """
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
    """Group-level direct reward optimisation, (g,) from scores and rewards (g, k).

    With q_i = softmax(r/τ) over the images from the i-th best on:

        top1   log Σ_j exp(s_j) - Σ_j q_1(j) s_j
        full   Σ_{i<k} [log Σ_{j>=i} exp(s_j) - Σ_{j>=i} q_i(j) s_j]      (GDRO, eq. 9)
        rank   Σ_{i<k} [log Σ_{j>=i} exp(s_j) - s_i], the limit τ -> 0 (Plackett-Luce)

    All are smallest at s = r/τ + const, where top1 is the entropy of q_1 and full the sum of those
    of q_i. `generator` breaks ties of the rewards at random, see `shuffled_order`.
    """
    _check_groups(scores, rewards)
    if form not in FORMS:
        raise ValueError(f"form is {form!r} but must be one of {list(FORMS)}")
    if form == "top1":
        q = target_distribution(rewards, temperature)
        return scores.logsumexp(-1) - (q * scores).sum(-1)
    order = shuffled_order(rewards, generator)
    s, r = scores.gather(-1, order), rewards.float().gather(-1, order)
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
    """mean|target - pred|² of each group's best image, (g,) (GDRO, eq. 12).

    Ranking alone lowers the likelihood of every image, the best one's too; this holds it up.
    Of several best images one is drawn.
    """
    best = shuffled_order(rewards, generator)[:, 0]
    rows = torch.arange(len(best), device=best.device)
    return (pred[rows, best].float() - target[rows, best].float()).square().flatten(1).mean(1)


def dpo_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log σ(s_w - s_l) (Rafailov et al. 2023): GDRO with k = 2 in the limit τ -> 0.

    With β of `implicit_scores` half of the β of Diffusion-DPO's published code.
    """
    return -F.logsigmoid(chosen - rejected)


def soft_preference_loss(first: Tensor, second: Tensor, probability: Tensor) -> Tensor:
    """Cross-entropy of "the first is better", known with a probability.

    RPO (Gu et al. 2024) takes σ(r_1 - r_2) for it; σ((r_1 - r_2)/τ) makes it GDRO with k = 2.
    """
    margin = first - second
    return F.binary_cross_entropy_with_logits(margin, probability, reduction="none")


def kto_loss(
    scores: Tensor, desirable: Tensor, *, weights: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """Kahneman-Tversky optimisation of unpaired images, the shape of `scores` (any).

    w (1 - σ(±(s - z))), + for desirable ones; z = max(0, mean s), the reference point, carries no
    gradient (Ethayarajh et al. 2024, eq. 8; Li et al. 2024 for diffusion). weights: of the
    desirable and the undesirable.
    """
    reference = scores.detach().mean().clamp(min=0)
    sign = torch.where(desirable, 1.0, -1.0)
    weight = torch.where(desirable, *(scores.new_tensor(w) for w in weights))
    return weight * (1 - torch.sigmoid(sign * (scores - reference)))


def group_advantages(rewards: Tensor, *, spread: str = "group", eps: float = 1e-4) -> Tensor:
    """(r - mean of its group) / (std + eps), (g, k); std of the group, of all, or 1 ("none").

    GRPO (Shao et al. 2024); the global one is Flow-GRPO's. A group of equal rewards gives zeros.
    """
    if spread not in SPREADS:
        raise ValueError(f"spread is {spread!r} but must be one of {list(SPREADS)}")
    centred = rewards.float() - rewards.float().mean(-1, keepdim=True)
    if spread == "none":
        return centred
    if spread == "group":
        return centred / (centred.std(-1, keepdim=True) + eps)
    return centred / (rewards.float().std() + eps)


def policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, *, clip: float = 1e-4
) -> Tensor:
    """-min(ρ A, clip(ρ, 1 - c, 1 + c) A), ρ = exp(log π - log π_old) (Schulman et al. 2017, eq. 7).

    Shapes broadcast; on the policy that sampled, ρ is 1 and the gradient is -A ∇ log π.
    """
    ratio = (log_prob - old_log_prob).exp()
    bounded = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, bounded * advantages)


def nft_loss(
    pred: Tensor, old_pred: Tensor, target: Tensor, good: Tensor, *, beta: float = 1.0
) -> Tensor:
    """DiffusionNFT (Zheng et al. 2025), (n,) from predictions (n, *shape) and good (n,) in [0, 1].

    r |v+ - v|² + (1 - r) |v- - v|², means over elements, with v± = v_old ± β (v_θ - v_old) and r
    how good the image is. On images of the old policy it is smallest at
    v_θ = v_old + (2/β) E[r (v - v_old)]; it needs no log-probabilities, and no stochastic sampler.
    """
    if good.min() < 0 or good.max() > 1:
        raise ValueError("good must lie in [0, 1]: pass probabilities, or rewards scaled to it")
    move = beta * (pred.float() - old_pred.float())
    plus, minus = ((old_pred + m - target).float().square() for m in (move, -move))
    return good * plus.flatten(1).mean(1) + (1 - good) * minus.flatten(1).mean(1)


def clipped(log_prob: Tensor, old_log_prob: Tensor, *, clip: float = 1e-4) -> Tensor:
    """Which ratios lie outside [1 - c, 1 + c], as floats: their mean is the share to log."""
    ratio = (log_prob.detach() - old_log_prob).exp()
    return ((ratio - 1).abs() > clip).float()


def _check_groups(scores: Tensor, rewards: Tensor) -> None:
    if scores.ndim != 2 or scores.shape != rewards.shape or scores.shape[-1] < 2:
        raise ValueError(
            "scores and rewards must both be (g, k) with k of 2 or more but are "
            f"{tuple(scores.shape)} and {tuple(rewards.shape)}"
        )


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature} but must be positive; form='rank' is τ = 0")
