"""Losses for preference training, as functions of tensors.

Legend: g groups (one prompt each), k images per group, `scores` implicit rewards, `rewards`
explicit ones, r1 >= ... >= rk once sorted. Losses are returned per group; the caller averages.
Arguments are checked as `tensor_checks` says.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .tensor_checks import broadcasts, check_alike, known, predicted

__all__ = [
    "best_image_loss",
    "dpo_loss",
    "elbo_weight",
    "gdro_loss",
    "implicit_scores",
    "kto_loss",
    "shuffled_order",
    "soft_preference_loss",
    "target_distribution",
]

FORMS = ("full", "top1", "rank")


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
    if weight is not None and not broadcasts(weight, pred.shape[:2]):
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} does not broadcast to {tuple(pred.shape[:2])}"
        )
    target = target.float()
    better = _squared(pred.float() - target) - _squared(ref_pred.float() - target)
    return predicted(-beta * better * (1.0 if weight is None else weight), "implicit scores")


def _squared(error: Tensor) -> Tensor:
    return error.square().flatten(2).mean(2)


def elbo_weight(t: Tensor, prediction: str = "velocity") -> Tensor:
    """Return weights by which a flow's implicit score is a likelihood ratio on average over t.

    x_t = (1 - t) x0 + t ε with t ~ U(0, 1). The likelihood bound is ½ E|dλ/dt| |ε - ε̂|² with λ the
    log signal-to-noise ratio (Kingma et al. 2021, eq. 17), here 2 log((1 - t)/t); the error of the
    velocity is that of ε divided by (1 - t). This gives (1 - t)/t for velocity and 1/(t (1 - t))
    for epsilon. It applies to the **sum** over an image's elements: multiply β by their number.
    """
    t = known(t, "t", inside=True)
    if prediction == "velocity":
        return (1 - t) / t
    if prediction == "epsilon":
        return 1 / (t * (1 - t))
    raise ValueError(f"prediction is {prediction!r} but must be 'velocity' or 'epsilon'")


def target_distribution(rewards: Tensor, temperature: float) -> Tensor:
    """Return softmax(r/τ) over each group, (g, k): the target of the implicit scores."""
    _check_temperature(temperature)
    return (known(rewards.float(), "rewards") / temperature).softmax(-1)


def shuffled_order(rewards: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return indices (g, k) that sort rewards in descending order, with ties in random order.

    Rewards such as OCR's are discrete, and the full and rank forms depend on the order of ties, so
    a stable sort would train on the order of the file. Without a generator the sort is stable.
    """
    rewards = known(rewards, "rewards")
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
    scores, rewards = predicted(scores, "scores"), known(rewards, "rewards")
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
    rewards = known(rewards.float(), "rewards")
    best = shuffled_order(rewards, generator)[:, 0]
    rows = torch.arange(len(best), device=best.device)
    error = (pred[rows, best].float() - target[rows, best].float()).square().flatten(1).mean(1)
    return predicted(error + 0 * rewards.sum(-1), "errors")  # propagates NaN


def dpo_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return -log σ(s_w - s_l) (Rafailov et al. 2023): GDRO with k = 2 in the limit τ -> 0.

    The β of `implicit_scores` corresponds to half the β of Diffusion-DPO's published code.
    """
    check_alike("chosen and rejected scores", chosen, rejected)
    return -F.logsigmoid(predicted(chosen - rejected, "scores"))


def soft_preference_loss(first: Tensor, second: Tensor, probability: Tensor) -> Tensor:
    """Return the cross-entropy of "the first is better", which is true with `probability`.

    With probability σ(r_1 - r_2) this is RPO (Gu et al. 2024), with σ((r_1 - r_2)/τ) GDRO, k = 2.
    """
    check_alike("two scores and a probability", first, second, probability)
    margin = predicted(first - second, "scores")
    probability = known(probability.to(margin.dtype), "probability", inside=True)
    return F.binary_cross_entropy_with_logits(margin, probability, reduction="none")


def kto_loss(
    scores: Tensor, desirable: Tensor, *, weights: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """Return the loss of Kahneman-Tversky optimisation for unpaired images, shaped as `scores`.

    w (1 - σ(±(s - z))), + for desirable images; the reference point z = max(0, mean s) has no
    gradient (Ethayarajh et al. 2024, eq. 8; Li et al. 2024 for diffusion). weights: w of desirable
    and of undesirable images.
    """
    check_alike("scores and desirable", scores, desirable)
    if desirable.dtype != torch.bool or not all(0 <= w < math.inf for w in weights):
        raise ValueError(
            f"desirable must be bool, and weights finite and not negative, but they are "
            f"{desirable.dtype} and {weights}"
        )
    scores = predicted(scores, "scores")
    reference = scores.detach().mean().clamp(min=0)
    sign = torch.where(desirable, 1.0, -1.0)
    weight = torch.where(desirable, *(scores.new_tensor(w) for w in weights))
    return weight * (1 - torch.sigmoid(sign * (scores - reference)))


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
