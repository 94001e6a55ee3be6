"""What a critic learns: its losses, statistics, triggers, and what moves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from critic_models import PROMPTS, generator, pictures, preference, state, untrained

import rewards
from finetune.critics import (
    LOSSES,
    Critic,
    CriticSettings,
    accuracy,
    bce_loss,
    due,
    gradient_penalty,
    hinge_loss,
    pairwise_loss,
    smoothed,
)
from finetune.losses import dpo_loss

# losses


def test_all_losses_have_their_value_at_zero_and_vanish_where_the_two_are_far_apart():
    zero, far = torch.zeros(5), torch.full((5,), 40.0)
    expected = {"hinge": 1.0, "bce": math.log(2), "pairwise": math.log(2)}
    for name, loss in LOSSES.items():
        assert float(loss(zero, zero)) == pytest.approx(expected[name])
        assert float(loss(far, -far)) == pytest.approx(0, abs=1e-12)
    assert float(hinge_loss(torch.ones(3), -torch.ones(4, 7))) == 0


def test_losses_equal_torchs_cross_entropy_and_the_preference_loss_of_dpo():
    real, fake = torch.randn(9, generator=generator(1)), torch.randn(9, generator=generator(2))
    both = torch.cat([real, fake])
    for share in (0.0, 0.1):
        labels = torch.cat([torch.full((9,), 1 - share), torch.full((9,), share)])
        torch.testing.assert_close(
            smoothed(bce_loss, real, fake, share), F.binary_cross_entropy_with_logits(both, labels)
        )
    torch.testing.assert_close(pairwise_loss(real, fake), dpo_loss(real, fake).mean())


def test_accuracy_is_the_area_under_torchmetrics_curve_and_half_for_two_sets_alike():
    from torchmetrics.functional.classification import binary_auroc

    real, fake = (torch.randn(40, generator=generator(i)).round(decimals=1) for i in (1, 2))
    labels = torch.cat([torch.ones(40), torch.zeros(40)]).long()
    area = binary_auroc(torch.cat([real, fake]), labels)
    torch.testing.assert_close(accuracy(real, fake), area, check_dtype=False)
    assert float(accuracy(real, real[torch.randperm(40, generator=generator())])) == 0.5
    assert float(accuracy(torch.zeros(3), torch.zeros(3), paired=True)) == 0.5
    assert float(accuracy(torch.tensor([1.0, 5.0]), torch.tensor([0.0, 6.0]), paired=True)) == 0.5


def test_the_gradient_penalty_of_a_linear_score_is_half_its_squared_norm():
    w = torch.randn(4, generator=generator(1))
    cls = torch.randn(3, 4, generator=generator(2)).requires_grad_()
    patches = torch.randn(3, 5, 4, generator=generator(3)).requires_grad_()
    scores = 0.7 * cls @ w + 0.3 * (patches @ w).mean(1)
    expected = (0.7**2 + 5 * (0.3 / 5) ** 2) * w.square().sum() / 2
    torch.testing.assert_close(gradient_penalty(scores, (cls, patches)), expected)


@pytest.mark.parametrize(
    ("trigger", "step", "stats", "expected"),
    [
        ("always", 1, {}, True),
        ("every_n", 6, {}, True),
        ("every_n", 7, {}, False),
        ("when_fooled", 0, {"fake": 2.0, "real": 1.0}, True),
        ("when_fooled", 0, {"fake": 0.0, "real": 0.0}, True),  # untrained
        ("when_fooled", 0, {"fake": 1.0, "real": 2.0}, False),
        ("acc_below", 0, {"accuracy": 0.79}, True),
        ("acc_below", 0, {"accuracy": 0.8}, False),
    ],
)
def test_triggers_decide_from_the_step_and_what_was_seen(trigger, step, stats, expected):
    assert due(trigger, step, stats, every=3) is expected


# learning


def test_pictures_that_differ_are_told_apart_until_nothing_is_left_of_the_loss():
    reward = untrained()
    critic, stats = Critic(reward, CriticSettings(lr=3e-3, patches=8)), {}
    for i in range(150):
        stats = critic.train_step(pictures(i, 0.6), pictures(i + 100), PROMPTS, generator(i))
    assert stats["loss"] < 0.05
    unseen = reward(pictures(900, 0.6), PROMPTS), reward(pictures(901), PROMPTS)
    assert float(accuracy(*unseen)) == 1


def test_pictures_of_one_kind_leave_accuracy_at_one_half_and_no_gap():
    reward = untrained()
    critic = Critic(reward, CriticSettings(lr=1e-3, patches=8))
    for i in range(30):
        critic.train_step(pictures(i), pictures(i + 100), PROMPTS, generator(i))
    real, fake = (
        torch.cat([reward(pictures(i + start), PROMPTS) for i in range(40)])
        for start in (1000, 2000)
    )
    assert real.std() > 0
    gap, error = real.mean() - fake.mean(), (real.var() / 240 + fake.var() / 240).sqrt()
    assert abs(gap) < 4 * error
    assert abs(float(accuracy(real, fake)) - 0.5) < 4 * math.sqrt(1 / (6 * 240))  # Mann-Whitney's


def test_a_preference_learns_which_of_two_pictures_of_a_prompt_is_the_reference():
    reward = preference()
    critic = Critic(reward, CriticSettings(lr=1e-3))
    seen = [
        critic.train_step(pictures(i, 0.6), pictures(i + 100), PROMPTS, generator(i))
        for i in range(30)
    ]
    assert seen[-1]["loss"] < 0.2 * seen[0]["loss"]
    assert seen[-1]["accuracy"] == 1


@pytest.mark.parametrize("kind", ["features", "preference"])
def test_at_a_rate_of_5e_6_nearly_every_weight_moves_and_the_tower_does_not(kind):
    """Adv-GRPO's weights are bfloat16: 92 % of them stay as they are."""
    if kind == "preference":
        reward = preference()
        model: Any = reward.model
        rest = model.towers.model
        own = {id(p) for p in reward.module.parameters()}
    else:
        reward = rewards.load("critic(random:1)").parts[0].reward
        rest, own = reward.model.view.backbone.model, set()
    frozen = {name: p.clone() for name, p in rest.named_parameters() if id(p) not in own}
    before = state(reward.module)
    Critic(reward, CriticSettings(lr=5e-6)).train_step(
        pictures(0, 0.5), pictures(1), PROMPTS, generator()
    )
    moved = {name: value != before[name] for name, value in reward.module.state_dict().items()}
    assert torch.cat([m.flatten() for m in moved.values()]).float().mean() > 0.99
    assert frozen
    for name, p in rest.named_parameters():
        assert name not in frozen or torch.equal(p, frozen[name])


def test_training_leaves_other_rewards_of_the_same_tower_and_the_weights_frozen():
    clip = rewards.load("clip(random:0)")
    before = clip(pictures(0), PROMPTS)
    reward = preference()
    Critic(reward, CriticSettings(lr=1e-2)).train_step(
        pictures(0), pictures(1), PROMPTS, generator()
    )
    assert torch.equal(clip(pictures(0), PROMPTS), before)
    assert not any(p.requires_grad or p.grad is not None for p in reward.module.parameters())
    assert not reward.module.training


def test_the_spectral_norm_is_bounded_also_from_zero():
    reward = untrained()
    critic = Critic(reward, CriticSettings(lr=0.05, spectral=0.5))
    for i in range(8):
        critic.train_step(pictures(i, 0.6), pictures(i + 100), PROMPTS, generator(i))
    head: Any = reward.module
    norms = [float(torch.linalg.matrix_norm(x.weight, 2)) for x in (head.inner, head.outer)]
    assert norms == pytest.approx([0.5, 0.5], rel=1e-4)


def test_r1_flattens_the_score():
    slopes = []
    for r1 in (0.0, 10.0):
        reward = untrained()
        critic = Critic(reward, CriticSettings(lr=3e-3, r1=r1))
        for i in range(20):
            critic.train_step(pictures(i, 0.6), pictures(i + 100), PROMPTS, generator(i))
        parts = tuple(x.requires_grad_() for x in reward.features(pictures(0, 0.6)))
        penalty = gradient_penalty(reward.score(reward.logits(parts, PROMPTS)), parts)
        slopes.append(float(penalty.detach()))
    assert 0 < slopes[1] < slopes[0] / 4


def test_when_it_is_not_due_nothing_moves_but_the_step():
    reward = untrained()
    critic = Critic(reward, CriticSettings(trigger="every_n", every=2))
    critic.train_step(pictures(0), pictures(1), PROMPTS, generator())
    before = state(reward.module)
    assert critic.train_step(pictures(0), pictures(1), PROMPTS, generator())["updated"] == 0
    assert all(torch.equal(value, before[name]) for name, value in state(reward.module).items())
    assert critic.step == 2


def test_it_trains_within_inference_mode_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    reward = untrained()
    preference()
    critic = Critic(reward, CriticSettings(replay=4, r1=1.0))
    with torch.inference_mode():
        for i in range(2):
            critic.train_step(pictures(i), pictures(i + 1), PROMPTS, generator())
    critic.train_step(pictures(0), pictures(1), PROMPTS, generator())
    assert torch.equal(torch.rand(3), expected)
