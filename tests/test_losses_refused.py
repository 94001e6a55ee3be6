"""Values, shapes and numbers of which the losses make nothing."""

from __future__ import annotations

import math

import pytest
import torch
from test_losses import groups

from finetune import losses, policy_losses, tensor_checks


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.gdro_loss(torch.zeros(2, 1), torch.zeros(2, 1), temperature=1.0), "k of 2"),
        (lambda: losses.gdro_loss(torch.zeros(2, 3), torch.zeros(2, 4), temperature=1.0), "k of 2"),
        (lambda: losses.gdro_loss(*groups(), temperature=0.0), "must be positive"),
        (lambda: losses.gdro_loss(*groups(), temperature=1.0, form="best"), "must be one of"),
        (
            lambda: policy_losses.group_advantages(torch.ones(2, 2), spread="batch"),
            "must be one of",
        ),
        (lambda: losses.elbo_weight(torch.ones(1), "v"), "must be 'velocity'"),
    ],
)
def test_mistakes_are_refused_with_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


NAN, INF = math.nan, math.inf


PREDS = torch.zeros(2, 3, 4, 5)


def spoiled(tensor, value):
    tensor = tensor.clone().float()
    tensor.view(-1)[1] = value
    return tensor


OF_KNOWN = {
    "gdro": lambda r: losses.gdro_loss(torch.zeros(2, 3), r, temperature=1.0, form="full"),
    "gdro rank": lambda r: losses.gdro_loss(torch.zeros(2, 3), r, temperature=1.0, form="rank"),
    "best": lambda r: losses.best_image_loss(PREDS, PREDS, r),
    "order": losses.shuffled_order,
    "targets": lambda r: losses.target_distribution(r, 1.0),
    "advantages": policy_losses.group_advantages,
    "policy": lambda a: policy_losses.policy_loss(torch.zeros(2, 3), torch.zeros(2, 3), a),
}


OF_PROBABILITIES = {
    "soft": lambda p: losses.soft_preference_loss(torch.zeros(4), torch.zeros(4), p),
    "nft": lambda p: policy_losses.nft_loss(
        torch.zeros(4, 5), torch.zeros(4, 5), torch.zeros(4, 5), p
    ),
    "elbo": losses.elbo_weight,
    "matching": lambda t: policy_losses.matching_score(
        torch.ones(4, 5), torch.zeros(4, 5), t, time_power=1.0
    ),
}


OF_PREDICTED = {
    "implicit": lambda x: losses.implicit_scores(x, PREDS, PREDS, beta=1.0),
    "gdro": lambda x: losses.gdro_loss(
        x[:, :, 0, 0], torch.rand(2, 3), temperature=1.0, form="top1"
    ),
    "best": lambda x: losses.best_image_loss(x[:1, :1], x[:1, :1] * 0, torch.zeros(1, 1)),
    "dpo": lambda x: losses.dpo_loss(x, PREDS),
    "soft": lambda x: losses.soft_preference_loss(x, PREDS, PREDS),
    "kto": lambda x: losses.kto_loss(x, torch.ones_like(x, dtype=torch.bool)),
    "policy": lambda x: policy_losses.policy_loss(x, PREDS, PREDS),
    "nft": lambda x: policy_losses.nft_loss(x, PREDS, PREDS, torch.zeros(2)),
    "adaptive nft": lambda x: policy_losses.nft_loss(
        x, PREDS, PREDS, torch.zeros(2), x0_error=torch.ones(2)
    ),
    "matching": lambda x: policy_losses.matching_score(x, PREDS, torch.ones(2), power=0.25),
}


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_rewards_that_are_not_finite_are_refused(value):
    for name, loss in OF_KNOWN.items():
        loss(torch.rand(2, 3))
        with pytest.raises(ValueError, match="must be finite but 1 of 6"):
            loss(spoiled(torch.rand(2, 3), value))
        assert name


@pytest.mark.parametrize("value", [NAN, -0.001, 1.001, INF])
def test_what_is_no_probability_is_refused(value):
    for loss in OF_PROBABILITIES.values():
        loss(torch.tensor([0.25, 0.5, 0.75, 1.0]))
        with pytest.raises(ValueError, match=r"must be finite and in \[0, 1\] but 1 of 4 are not"):
            loss(spoiled(torch.rand(4), value))


def test_predictions_that_are_not_finite_are_no_loss():
    for loss in OF_PREDICTED.values():
        loss(torch.rand_like(PREDS))
        with pytest.raises(FloatingPointError, match="not finite: lower the learning rate"):
            loss(torch.full_like(PREDS, NAN))


def test_on_a_device_a_wrong_value_makes_the_loss_nan(monkeypatch):
    """No look at the device is taken: the values say so themselves, an order of them too."""

    monkeypatch.setattr(tensor_checks, "_is_free_to_look", lambda values: False)
    rewards = spoiled(torch.rand(2, 3), INF)
    for name in ("gdro", "gdro rank", "best", "targets", "policy"):
        if name == "best":
            loss = losses.best_image_loss(PREDS, PREDS, rewards)
        elif name.startswith("gdro"):
            form = "rank" if "rank" in name else "full"
            loss = losses.gdro_loss(torch.zeros(2, 3), rewards, temperature=1.0, form=form)
        else:
            loss = OF_KNOWN[name](rewards)
        assert loss.isnan().any(), name
        assert not loss.isnan().all(), name
    for loss in OF_PROBABILITIES.values():
        found = loss(torch.tensor([0.25, 2.0, 0.75, 0.5]))
        assert found.isnan().tolist() == [False, True, False, False]


FLAT = torch.zeros(4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: losses.implicit_scores(PREDS, PREDS, PREDS, beta=0.0),
        lambda: losses.implicit_scores(PREDS, PREDS, PREDS, beta=NAN),
        lambda: losses.implicit_scores(PREDS, PREDS, PREDS, beta=1.0, weight=torch.ones(7)),
        lambda: losses.implicit_scores(PREDS, PREDS, PREDS, beta=1.0, weight=torch.ones(5, 2, 3)),
        lambda: losses.best_image_loss(PREDS, PREDS[:, :2], torch.zeros(2, 3)),
        lambda: losses.best_image_loss(PREDS, PREDS, torch.zeros(2, 4)),
        lambda: losses.dpo_loss(FLAT, FLAT[:3]),
        lambda: losses.dpo_loss(FLAT, FLAT[:1]),
        lambda: losses.soft_preference_loss(FLAT, FLAT, FLAT[:1]),
        lambda: losses.kto_loss(FLAT, torch.ones(3, dtype=torch.bool)),
        lambda: losses.kto_loss(FLAT, torch.ones(4)),
        lambda: losses.kto_loss(FLAT, torch.ones(4, dtype=torch.bool), weights=(1.0, NAN)),
        lambda: losses.kto_loss(FLAT, torch.ones(4, dtype=torch.bool), weights=(-1.0, 1.0)),
        lambda: policy_losses.group_advantages(FLAT),
        lambda: policy_losses.group_advantages(torch.zeros(4, 1)),
        lambda: policy_losses.group_advantages(torch.zeros(2, 3), eps=-1.0),
        lambda: policy_losses.group_advantages(torch.zeros(2, 3), kept=torch.ones(2, 3)),
        lambda: policy_losses.group_advantages(
            torch.zeros(2, 3), kept=torch.ones(2, 2, dtype=torch.bool)
        ),
        lambda: policy_losses.policy_loss(FLAT, FLAT, FLAT[:3]),
        lambda: policy_losses.policy_loss(FLAT, FLAT, FLAT, clip=0.0),
        lambda: policy_losses.policy_loss(FLAT, FLAT, FLAT, clip=NAN),
        lambda: policy_losses.clipped(FLAT, FLAT[:3]),
        lambda: policy_losses.nft_loss(PREDS, PREDS, PREDS, torch.zeros(3)),
        lambda: policy_losses.nft_loss(PREDS, PREDS[:1], PREDS, torch.zeros(2)),
        lambda: policy_losses.nft_loss(PREDS, PREDS, PREDS, torch.zeros(2), beta=NAN),
        lambda: policy_losses.nft_loss(PREDS, PREDS, PREDS, torch.zeros(2), x0_error=torch.ones(3)),
        lambda: policy_losses.matching_score(PREDS, PREDS[:1], torch.ones(2)),
        lambda: policy_losses.matching_score(PREDS, PREDS, torch.ones(3)),
        lambda: policy_losses.matching_score(PREDS, PREDS, torch.ones(2), power=1.5),
        lambda: policy_losses.matching_score(PREDS, PREDS, torch.ones(2), time_power=-1.0),
        lambda: policy_losses.guarded_log_ratio(
            FLAT[:2], FLAT[:2], PREDS, PREDS[:1], torch.tensor(0.5)
        ),
        lambda: policy_losses.guarded_log_ratio(FLAT, FLAT, PREDS, PREDS, torch.tensor(0.5)),
        lambda: policy_losses.guarded_log_ratio(FLAT[:2], FLAT[:2], PREDS, PREDS, torch.ones(3)),
        lambda: losses.target_distribution(torch.zeros(2, 3), INF),
        lambda: losses.gdro_loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=NAN),
    ],
)
def test_shapes_and_numbers_that_make_no_loss_are_refused(call):
    with pytest.raises(ValueError, match=r"must|needed|broadcast"):
        call()
