"""The losses of policies against closed forms, and advantages with and without all scores."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from test_losses import groups

from finetune.policy_losses import (
    clipped,
    group_advantages,
    nft_loss,
    policy_loss,
)


def test_advantages_have_no_mean_and_a_unit_spread():
    _, rewards = groups(6, g=5)
    for spread in ("group", "global", "none"):
        assert group_advantages(rewards, spread=spread).sum(1).abs().max() < 1e-5
    scaled = group_advantages(rewards, eps=0.0)
    torch.testing.assert_close(scaled.std(1), torch.ones(5))
    assert group_advantages(torch.ones(2, 4)).abs().max() == 0
    whole = group_advantages(rewards, spread="global", eps=0.0)
    centred = rewards.float() - rewards.float().mean(1, keepdim=True)
    torch.testing.assert_close(whole, centred / rewards.float().std())


def test_on_the_sampling_policy_the_gradient_is_minus_the_advantage():
    old = torch.tensor([-1.0, -2.0, -3.0])
    advantages = torch.tensor([1.0, -0.5, 0.0])
    log_prob = old.clone().requires_grad_(True)
    loss = policy_loss(log_prob, old, advantages, clip=0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), log_prob)
    torch.testing.assert_close(gradient, -advantages)
    assert clipped(log_prob, old).sum() == 0


@pytest.mark.parametrize(("ratio", "sign"), list(itertools.product((0.5, 1.0, 2.0), (1.0, -1.0))))
def test_clipping_takes_the_worse_of_both(ratio, sign):
    log_prob = torch.tensor([math.log(ratio)], requires_grad=True)
    loss = policy_loss(log_prob, torch.zeros(1), torch.tensor([sign]), clip=0.1)
    wanted = -min(ratio * sign, min(max(ratio, 0.9), 1.1) * sign)
    assert loss.item() == pytest.approx(wanted)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    stopped = (ratio > 1.1 and sign > 0) or (ratio < 0.9 and sign < 0)
    assert (gradient.abs().item() == 0) == stopped
    assert clipped(log_prob, torch.zeros(1), clip=0.1).item() == float(ratio != 1.0)


def test_the_optimum_of_nft_is_its_closed_form():
    """v_old + (2/β) E[r (v - v_old)] where E[v] = v_old, as on images of the old policy."""
    draws = torch.Generator().manual_seed(3)
    target = torch.randn(64, 5, generator=draws, dtype=torch.float64)
    good, old = torch.rand(64, generator=draws, dtype=torch.float64), target.mean(0)
    move = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    beta = 0.7
    loss = nft_loss((old + move).expand(64, 5), old.expand(64, 5), target, good, beta=beta).mean()
    (slope,) = torch.autograd.grad(loss, move)
    # quadratic with curvature 2 β² / 5, so that one Newton step from 0 is the optimum
    found = -slope / (2 * beta**2 / 5)
    expected = 2 / beta * (good[:, None] * (target - old)).mean(0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        nft_loss(target, target, target, good + 1)


@pytest.mark.parametrize("spread", ["group", "global", "none"])
def test_without_some_images_advantages_are_those_of_the_others(spread):
    rewards = torch.rand(3, 5, generator=torch.Generator().manual_seed(2))
    kept = torch.ones(3, 5, dtype=torch.bool)
    kept[0, 1] = kept[0, 4] = kept[2, 0] = False
    found = group_advantages(rewards.masked_fill(~kept, math.nan), spread=spread, kept=kept)
    assert (found[~kept] == 0).all()
    deviation = rewards[kept].std() + 1e-4
    for row in range(3):
        own = rewards[row, kept[row]]
        divisor = {"group": own.std() + 1e-4, "global": deviation, "none": 1.0}[spread]
        torch.testing.assert_close(found[row, kept[row]], (own - own.mean()) / divisor)
    torch.testing.assert_close(
        group_advantages(rewards, spread=spread, kept=torch.ones_like(kept)),
        group_advantages(rewards, spread=spread),
    )


def test_one_image_alone_has_no_advantage():
    kept = torch.tensor([[True, False, False], [False, False, False]])
    for spread in ("group", "global", "none"):
        assert (
            group_advantages(
                torch.full((2, 3), math.nan).masked_fill(kept, 2.0), spread=spread, kept=kept
            )
            == 0
        ).all()
