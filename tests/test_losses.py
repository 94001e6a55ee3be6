"""The losses against closed forms (entropies, factorials, Gaussians) and special cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from finetune.losses import (
    best_image_loss,
    dpo_loss,
    elbo_weight,
    gdro_loss,
    implicit_scores,
    kto_loss,
    shuffled_order,
    soft_preference_loss,
    target_distribution,
)

TAU = 0.3


def groups(k: int = 4, g: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    make = torch.rand(2, g, k, generator=generator, dtype=torch.float64)
    return make[0] * 3 - 1, make[1]


def entropy(q: torch.Tensor) -> torch.Tensor:
    return -(q * q.clamp(min=1e-300).log()).sum(-1)


@pytest.mark.parametrize("k", [2, 4, 6])
def test_at_an_untouched_adapter_the_losses_are_log_k_and_log_k_factorial(k):
    _, rewards = groups(k)
    zero = torch.zeros_like(rewards)
    for form, value in (
        ("top1", math.log(k)),
        ("full", math.lgamma(k + 1)),
        ("rank", math.lgamma(k + 1)),
    ):
        loss = gdro_loss(zero, rewards, temperature=TAU, form=form)
        torch.testing.assert_close(loss, torch.full_like(loss, value))


@pytest.mark.parametrize("form", ["top1", "full", "rank"])
def test_invariances(form):
    scores, rewards = groups()
    loss = gdro_loss(scores, rewards, temperature=TAU, form=form)
    same = [
        gdro_loss(scores + 5.0, rewards, temperature=TAU, form=form),
        gdro_loss(scores, rewards + 5.0, temperature=TAU, form=form),
        gdro_loss(scores, 7 * rewards, temperature=7 * TAU, form=form),
        gdro_loss(scores.flip(1), rewards.flip(1), temperature=TAU, form=form),
    ]
    for other in same:  # the targets are float32
        torch.testing.assert_close(other, loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["top1", "full"])
def test_the_minimum_is_the_entropy_of_the_targets_at_rewards_over_temperature(form):
    _, rewards = groups()
    best = (rewards / TAU).requires_grad_(True)
    loss = gdro_loss(best, rewards, temperature=TAU, form=form)
    (gradient,) = torch.autograd.grad(loss.sum(), best)
    assert gradient.abs().max() < 1e-6
    ordered = rewards.sort(-1, descending=True).values
    firsts = range(1 if form == "top1" else rewards.shape[1] - 1)
    floor = sum(entropy((ordered[:, i:] / TAU).softmax(-1)) for i in firsts)
    torch.testing.assert_close(loss.detach(), floor, atol=1e-6, rtol=1e-6)


def test_gradients_at_zero_are_those_worked_out_by_hand():
    k = 4
    _, rewards = groups(k)
    rewards = rewards.sort(-1, descending=True).values
    scores = torch.zeros_like(rewards, requires_grad=True)
    q = target_distribution(rewards, TAU).double()
    loss = gdro_loss(scores, rewards, temperature=TAU, form="top1").sum()
    torch.testing.assert_close(torch.autograd.grad(loss, scores)[0], 1 / k - q)
    loss = gdro_loss(scores, rewards, temperature=TAU, form="full").sum()
    wanted = torch.zeros_like(rewards)
    for i in range(k - 1):
        wanted[:, i:] += 1 / (k - i) - (rewards[:, i:] / TAU).softmax(-1)
    torch.testing.assert_close(torch.autograd.grad(loss, scores)[0], wanted, atol=1e-6, rtol=1e-5)
    loss = gdro_loss(scores, rewards, temperature=TAU, form="rank").sum()
    gradient = torch.autograd.grad(loss, scores)[0]
    harmonic = sum(1 / i for i in range(1, k + 1))
    torch.testing.assert_close(gradient[:, 0], torch.full_like(gradient[:, 0], 1 / k - 1))
    torch.testing.assert_close(gradient[:, -1], torch.full_like(gradient[:, 0], harmonic - 1))


def test_small_temperature_is_the_ranking_loss_and_pairs_are_dpo():
    scores, rewards = groups(5)
    full = gdro_loss(scores, rewards, temperature=1e-4, form="full")
    torch.testing.assert_close(full, gdro_loss(scores, rewards, temperature=1.0, form="rank"))
    scores, rewards = groups(2, g=6)
    order = rewards.argsort(-1, descending=True)
    first, second = scores.gather(1, order).unbind(1)
    pair = gdro_loss(scores, rewards, temperature=1e-5, form="full")
    torch.testing.assert_close(pair, dpo_loss(first, second))
    margin = (rewards[:, 0] - rewards[:, 1]) / TAU
    soft = soft_preference_loss(scores[:, 0], scores[:, 1], margin.sigmoid())
    for form in ("full", "top1"):
        pair = gdro_loss(scores, rewards, temperature=TAU, form=form)
        torch.testing.assert_close(pair, soft, atol=1e-6, rtol=1e-6)


def test_dpo_is_diffusion_dpos_at_half_of_its_beta():
    generator = torch.Generator().manual_seed(3)
    pred, ref, target = torch.randn(3, 5, 2, 4, 6, 6, generator=generator)
    beta_dpo = 50.0
    scores = implicit_scores(pred, ref, target, beta=beta_dpo / 2)
    # Wallace et al. 2023, the published training script: inside_term = -0.5 beta (model - ref diff)
    losses = [(p - target).square().mean((2, 3, 4)) for p in (pred, ref)]
    model, reference = (loss[:, 0] - loss[:, 1] for loss in losses)
    published = -F.logsigmoid(-0.5 * beta_dpo * (model - reference))
    torch.testing.assert_close(dpo_loss(*scores.unbind(1)), published)


def test_ties_count_alike_on_average_and_their_order_is_drawn():
    scores, _ = groups(3, g=1)
    rewards = torch.tensor([[1.0, 1.0, 0.0]])
    swapped = scores[:, [1, 0, 2]]
    one, other = (gdro_loss(s, rewards, temperature=TAU).item() for s in (scores, swapped))
    assert abs(one - other) > 1e-2, "the form depends on the order of ties, else nothing is tested"
    many = 4000
    generator = torch.Generator().manual_seed(1)
    for given in (scores, swapped):
        drawn = gdro_loss(
            given.expand(many, 3), rewards.expand(many, 3), temperature=TAU, generator=generator
        )
        se = drawn.std().item() / math.sqrt(many)
        assert abs(drawn.mean().item() - (one + other) / 2) < 4 * se
    order = shuffled_order(torch.tensor([[0.5, 1.0, 0.5, 0.5]]).expand(many, 4), generator)
    assert (order[:, 0] == 1).all()
    for item in (0, 2, 3):
        share = (order[:, 1] == item).float().mean().item()
        assert abs(share - 1 / 3) < 4 * math.sqrt(2 / 9 / many)


def test_top1_does_not_look_at_the_order_of_ties():
    scores, _ = groups(3, g=1)
    rewards = torch.tensor([[1.0, 0.0, 0.0]])
    a, b = (
        gdro_loss(s, rewards, temperature=TAU, form="top1") for s in (scores, scores[:, [0, 2, 1]])
    )
    torch.testing.assert_close(a, b)


def test_implicit_scores_vanish_at_the_reference_and_do_not_depend_on_the_resolution():
    generator = torch.Generator().manual_seed(0)
    pred, ref, target = torch.randn(3, 2, 3, 4, 8, 8, generator=generator)
    assert implicit_scores(ref, ref, target, beta=5.0).abs().max() == 0
    scores = implicit_scores(pred, ref, target, beta=5.0)
    assert scores.shape == (2, 3)
    tall = [x.repeat_interleave(2, -1) for x in (pred, ref, target)]
    pred, ref, target = tall
    torch.testing.assert_close(implicit_scores(pred, ref, target, beta=5.0), scores)
    half = implicit_scores(pred.bfloat16(), ref.bfloat16(), target.bfloat16(), beta=5.0)
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="of one shape"):
        implicit_scores(pred, ref[:1], target, beta=1.0)


def test_the_held_up_image_is_one_of_the_best():
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(50, 3, 2, 2, generator=generator).requires_grad_(True)
    target = torch.randn(50, 3, 2, 2, generator=generator)
    rewards = torch.tensor([0.2, 0.9, 0.9]).expand(50, 3)
    loss = best_image_loss(pred, target, rewards, generator)
    (gradient,) = torch.autograd.grad(loss.sum(), pred)
    touched = gradient.abs().sum((2, 3)) > 0
    assert (touched.sum(1) == 1).all()
    assert not touched[:, 0].any()
    assert touched[:, 1].any()
    assert touched[:, 2].any()
    picked = touched.int().argmax(1)
    wanted = (pred - target).square().mean((2, 3))[torch.arange(50), picked]
    torch.testing.assert_close(loss, wanted)


# --- a Gaussian: x0 ~ N(m, v), the exact velocity plus one number b that is learned


def gaussian_velocity(x, t, m, v):
    d = (1 - t) ** 2 * v + t**2
    return -m + (t - (1 - t) * v) / d * (x - (1 - t) * m)


@pytest.mark.parametrize("k", [2, 6])
@pytest.mark.parametrize("form", ["top1", "full"])
@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_the_gaussian_optimum_is_the_closed_form(k, form, t):
    """b*(t) = -a D / (2 β τ t) for a reward a·x0, at the entropy floor, with shared noise."""
    m, v, a, beta, tau = 0.3, 0.7, 0.4, 12.0, 0.05
    generator = torch.Generator().manual_seed(7)
    groups_ = 256
    x0 = m + v**0.5 * torch.randn(groups_, k, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(groups_, 1, 1, generator=generator, dtype=torch.float64).expand_as(x0)
    x, target = (1 - t) * x0 + t * noise, noise - x0
    ref = gaussian_velocity(x, t, m, v)
    rewards = a * x0[..., 0]
    b = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([b], max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-14)

    def loss():
        # in float64, as implicit_scores is float32: the same mean of squares
        scores = -beta * ((target - ref - b) ** 2 - (target - ref) ** 2).mean(-1)
        single = implicit_scores(ref + b, ref, target, beta=beta)
        torch.testing.assert_close(single.double(), scores, atol=1e-4, rtol=1e-4)
        return gdro_loss(scores, rewards, temperature=tau, form=form).mean()

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    d = (1 - t) ** 2 * v + t**2
    assert b.item() == pytest.approx(-a * d / (2 * beta * tau * t), abs=1e-3)
    ordered = rewards.sort(-1, descending=True).values / tau
    firsts = range(1 if form == "top1" else k - 1)
    floor = sum(entropy(ordered[:, i:].softmax(-1)).mean().item() for i in firsts)
    assert loss().item() == pytest.approx(floor, abs=1e-5)


def test_noise_of_its_own_for_each_image_shrinks_the_optimum():
    """Why noise is shared in a group: at t = 0.2 the fitted b is a small part of the exact one."""
    m, v, a, beta, tau, t, k = 0.3, 0.7, 0.4, 12.0, 0.05, 0.2, 4
    generator = torch.Generator().manual_seed(7)
    x0 = m + v**0.5 * torch.randn(2000, k, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(2000, k, 1, generator=generator, dtype=torch.float64)
    x, target = (1 - t) * x0 + t * noise, noise - x0
    ref = gaussian_velocity(x, t, m, v)
    b = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([b], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        scores = -beta * ((target - ref - b) ** 2 - (target - ref) ** 2).mean(-1)
        value = gdro_loss(scores, a * x0[..., 0], temperature=tau, form="top1").mean()
        value.backward()
        return value

    optimizer.step(closure)
    exact = -a * ((1 - t) ** 2 * v + t**2) / (2 * beta * tau * t)
    assert abs(b.item()) < 0.1 * abs(exact)


def test_the_likelihood_weight_makes_the_score_the_exact_log_ratio():
    """N(m, v) against N(m + shift, v): ∫ w s dt = shift (x0 - m)/v - shift²/(2 v)."""
    m, v, shift = 0.3, 0.7, 0.25
    nodes, weights = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(200))
    t = ((nodes + 1) / 2)[:, None, None]
    e, w = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(12))
    x0 = torch.tensor([-1.0, 0.2, 1.7], dtype=torch.float64)[None, :, None]
    noise = e[None, None, :]
    x, target = (1 - t) * x0 + t * noise, noise - x0
    ref, tuned = gaussian_velocity(x, t, m, v), gaussian_velocity(x, t, m + shift, v)
    score = -((target - tuned) ** 2 - (target - ref) ** 2)
    by_noise = (score * w).sum(-1) / w.sum()
    total = (elbo_weight(t[..., 0]) * by_noise * weights[:, None] / 2).sum(0)
    x0 = x0.flatten()
    torch.testing.assert_close(total, shift * (x0 - m) / v - shift**2 / (2 * v), atol=1e-8, rtol=0)
    eps = (1 - t) ** 2 * elbo_weight(t, "epsilon")  # error of ε is (1 - t) times that of velocity
    torch.testing.assert_close(eps, elbo_weight(t))


def test_kto_pulls_the_desirable_up_and_the_undesirable_down():
    scores = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)
    desirable = torch.tensor([True, True, False])
    loss = kto_loss(scores, desirable, weights=(2.0, 1.0))
    z = 0.2
    values = [2 * (1 - 1 / (1 + math.exp(-(s - z)))) for s in (0.3, -0.2)]
    values.append(1 - 1 / (1 + math.exp(0.5 - z)))
    torch.testing.assert_close(loss.detach(), torch.tensor(values))
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert (gradient[:2] < 0).all()
    assert gradient[2] > 0
