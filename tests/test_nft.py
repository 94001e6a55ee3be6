"""DiffusionNFT: fixed where nothing is better, repeatable, and it raises its reward."""

from __future__ import annotations

import pytest
import torch
from tiny_pipelines import family
from trainers import (
    assert_image_by_image,
    gradient_of,
    moved,
    nft,
    passes,
    places,
    resumed,
    some_flat,
    weights_of,
    with_every_group,
)

from finetune import lora
from finetune.awm import Awm
from finetune.nft import Nft, draw_times


def trainer_of(name="sd3", **changed):
    return nft(*family(name), **changed)


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_where_no_image_is_better_nothing_moves(name):
    trainer = trainer_of(name, score=lambda images, _: (torch.ones(len(images)), {}), updates=2)
    before = weights_of(trainer)
    seen = trainer.train_step()
    assert seen["grad_norm"] <= 1e-9
    assert seen["moved"] == 0.0
    assert seen["loss"] > 0
    torch.testing.assert_close(weights_of(trainer), before, atol=1e-6, rtol=0)


def test_the_first_gradient_is_that_of_regression_weighted_by_advantages():
    """At v = v_old, with r = (1 + a)/2: -2 β a (v - v_old) per element (Zheng et al., eq. 5)."""
    trainer = trainer_of(groups=1, noisings=1, beta=0.3, advantage_clip=2.0)
    batch = trainer._sampled(0, [0])
    (good,) = (a.flatten() / 4 + 0.5 for a in trainer.samples.compared([batch]).advantages)
    assert 0 <= good.min() < 0.5 < good.max() <= 1
    weights = list(trainer.learner.weights.values())
    (advantages,) = (a.flatten() for a in trainer.samples.compared([batch]).advantages)
    loss, _ = trainer._loss(batch, advantages, 0, "noise 0 0")
    found = torch.autograd.grad(loss.sum(), weights)
    x, t, target = trainer._noised(batch, 0, "noise 0 0")
    pred = trainer.learner.predicts(trainer.learner.bare)(x, t, batch.given)
    slope = -2 * 0.3 * (2 * good - 1).view(-1, 1, 1, 1) * (target - pred.detach())
    expected = torch.autograd.grad((slope * pred).flatten(1).mean(1).sum(), weights)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", [Nft, Awm])
def test_four_epochs_are_two_and_a_resumed_two_bit_for_bit(tmp_path, kind):
    more = {"updates": 2, "noisings": 1, "kl": 0.1, "kind": kind}
    _, _, seen = resumed(trainer_of, tmp_path, 2, 2, **more)
    assert seen[0]["kl"] > 0  # of the epoch's second update; the first was at the reference


def test_images_come_from_the_old_policy_and_not_from_how_groups_are_split():
    one, many = trainer_of(micro_groups=2), trainer_of(micro_groups=1)
    for _ in range(2):
        one.train_step()
        many.train_step()
    lora.fill(many.learner.weights, one.learner.weights)
    lora.fill(many.old.weights, one.old.weights)
    together = one._sampled(2, [0, 1]).images
    apart = torch.cat([many._sampled(2, [i]).images for i in range(2)])
    # batches of other shapes: a fortieth of a grey level
    torch.testing.assert_close(apart, together, atol=1e-4, rtol=0)
    with torch.no_grad():  # the trained weights do not sample
        for weight in many.learner.weights.values():
            weight.add_(0.5)
    torch.testing.assert_close(many._sampled(2, [0]).images, together[:4], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("size", "changed"),
    [
        (1, {"kind": Nft, "kl": 0.1}),
        (3, {"kind": Nft, "micro_groups": 2, "adaptive": True}),
        (3, {"kind": Awm}),
    ],
    ids=str,
)
def test_image_by_image_the_gradient_is_that_of_the_whole_group(size, changed):
    assert_image_by_image(trainer_of, size, **{"score": places, "groups": 2} | changed)


@pytest.mark.parametrize(
    ("changed", "count"),
    [({"kind": Nft}, 3), ({"kind": Awm}, 3), ({"kind": Awm, "old_kl": 0.0}, 1)],
    ids=str,
)
def test_groups_without_a_spread_are_left_out_where_they_add_nothing(changed, count):
    """Those of NFT are drawn to the old policy, and so are AWM's by old_kl."""
    found, every = [], []
    more = {"score": some_flat, "groups": 3, "noisings": 1, "updates": 2} | changed
    short = passes(moved(trainer_of(**more)), found)
    whole = passes(with_every_group(moved(trainer_of(**more))), every)
    (seen, a), (told, b) = gradient_of(short), gradient_of(whole)
    assert (sum(found), sum(every)) == (8 * count, 24)
    assert (a - b).norm() < 1e-4 * b.norm()
    assert seen["loss"] == pytest.approx(told["loss"], abs=1e-6)


def test_minibatches_are_disjoint_parts_of_the_epochs_groups():
    trainer = trainer_of(kind=Awm, minibatches=2, noisings=1)
    counts, descend = [], trainer.learner.descend
    trainer.learner.descend = lambda parts, count: counts.append(count) or descend(parts, count)
    assert trainer.train_step()["ratio"] != 1.0  # of the second
    assert counts == [4, 4]
    assert (trainer.step, trainer.learner.step) == (1, 2)


def test_the_old_policy_follows_by_the_papers_decay():
    trainer = trainer_of(noisings=1)
    start = torch.cat([w.flatten() for w in trainer.old.weights.values()])
    trainer.train_step()
    first = weights_of(trainer)
    old = torch.cat([w.flatten() for w in trainer.old.weights.values()])
    torch.testing.assert_close(old, 0.001 * start + 0.999 * first, atol=1e-7, rtol=0)


def test_it_begins_at_the_lora_that_it_is_given():
    trainer = trainer_of(noisings=1)
    trainer.learner.start_from({n: w + 0.1 for n, w in trainer.learner.weights.items()})
    began = weights_of(trainer)
    sampled = []
    inner = trainer.samples.batch

    def looked(*arguments, **more):
        sampled.append(weights_of(trainer))
        return inner(*arguments, **more)

    trainer.samples.batch = looked
    trainer.train_step()
    assert all(torch.equal(weights, began) for weights in sampled)


def test_it_raises_its_reward():
    trainer = trainer_of(lr=2e-2, groups=3, k=6, micro_groups=3)
    rewards = [trainer.train_step()["reward"] for _ in range(25)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.01


def test_guidance_is_of_sampling_alone():
    trainer = trainer_of("sd", guidance_scale=3.0, noisings=1, groups=1)
    rows = []
    trainer.learner.bare.register_forward_hook(
        lambda module, arguments, keywords, output: rows.append(len(output[0])), with_kwargs=True
    )
    trainer.train_step()
    assert rows == [8, 8, 8, 4, 4]


@pytest.mark.parametrize("kind", ["logit_normal", "uniform"])
def test_times_follow_their_law(kind):
    generator = torch.Generator().manual_seed(0)
    t = draw_times(20000, kind, 1.0, generator)
    share = (t < 0.25).float().mean().item()
    logit = torch.tensor(0.25).logit()
    expected = 0.25 if kind == "uniform" else torch.distributions.Normal(0, 1).cdf(logit).item()
    assert share == pytest.approx(expected, abs=0.01)
    assert draw_times(20000, kind, 3.0, generator).median() == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 1}, "k is 1 but must be a whole number, 2"),
        ({"kl": -1.0}, "kl is -1.0 but must be a number not below 0"),
        ({"beta": 0.0}, "beta is 0.0 but must be a number above 0"),
        ({"noisings": 0}, "noisings is 0 but must be a whole number, 1"),
        ({"old_decay": 1.0}, "old_decay"),
        ({"times": "all"}, "'logit_normal' or 'uniform'"),
        ({"spread": "all"}, "spread is 'all' but must be 'group'"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Nft(**change)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_with_the_adaptive_weight_the_error_is_that_of_x0(name):
    trainer = trainer_of(name, noisings=1, adaptive=True, kl=0.1)
    trainer.train_step()
    assert trainer.train_step()["grad_norm"] > 0
    noising, x0 = trainer.noising, torch.randn(3, 4, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    x, target = noising.noised(x0, torch.randn_like(x0), t)
    wrong = target + 0.1  # of epsilon or of the velocity
    shape = (3, 1, 1, 1)
    if noising.flow:
        found = x - t.view(shape) * wrong
    else:
        assert noising.alphas_cumprod is not None
        kept = noising.alphas_cumprod[noising.timesteps(t)].view(shape)
        found = (x - (1 - kept).sqrt() * wrong) / kept.sqrt()
    error = (found - x0).abs().flatten(1).mean(1)
    torch.testing.assert_close(error, 0.1 * noising.x0_error(t))


def test_the_first_gradient_of_awm_is_that_of_its_score_by_the_advantage():
    """On-policy the ratio is 1, and ∇ is -a ∇ score with a = A / advantage_clip."""
    trainer = trainer_of(kind=Awm, groups=1, noisings=1, advantage_clip=2.0, power=1.0)
    batch = trainer._sampled(0, [0])
    advantages = torch.tensor([2.0, -1.0, 0.5, -1.5])
    weights = list(trainer.learner.weights.values())
    loss, seen = trainer._loss(batch, advantages, 0, "noise 0 0")
    assert seen["ratio"].tolist() == [1.0] * 4
    found = torch.autograd.grad(loss.sum(), weights)
    x, t, target = trainer._noised(batch, 0, "noise 0 0")
    pred = trainer.learner.predicts(trainer.learner.bare)(x, t, batch.plain)
    error = t * (pred - target).square().flatten(1).mean(1)
    expected = torch.autograd.grad((advantages / 2 * error).sum(), weights)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("on_policy", [True, False])
def test_awm_samples_from_the_present_weights_or_from_the_old_policy(on_policy):
    trainer = trainer_of(
        kind=Awm, noisings=1, on_policy=on_policy, old_decay=0.9, groups=1, updates=2
    )
    trainer.old.step = 899  # the bound is 0.9 from now on
    drawn, own = [], trainer._sampled

    def sampled(*arguments):
        present = weights_of(trainer)
        drawn.append((flat(trainer.sampler), present, flat(trainer.old.weights)))
        return own(*arguments)

    trainer._sampled = sampled  # type: ignore[method-assign]
    seen = [trainer.train_step() for _ in range(2)]
    sampler, present, old = drawn[1]
    assert torch.equal(sampler, present if on_policy else old)
    assert not torch.equal(present, old)
    assert seen[1]["old_kl"] > 0
    assert torch.equal(flat(trainer.sampler), present if on_policy else flat(trainer.old.weights))


def flat(weights):
    return torch.cat([w.flatten() for w in weights.values()])


@pytest.mark.slow
def test_awm_raises_its_reward():
    trainer = trainer_of(kind=Awm, lr=2e-2, groups=3, k=6, micro_groups=3, old_kl=0.0)
    rewards = [trainer.train_step()["reward"] for _ in range(25)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.01


def test_an_image_without_a_score_moves_nothing():
    """With it left out the gradient is that of the others, whatever its rewards would have been."""

    def score(images, _):
        values = images.mean((1, 2, 3)) * 10
        values[1] = float("nan")
        return values, {}

    trainer = trainer_of(groups=1, k=4, noisings=1, score=score)
    batch = trainer._sampled(0, [0])
    trainer.samples.drawn = 100
    compared = trainer.samples.compared([batch])
    assert compared.scored == [3]
    assert compared.kept[0].tolist() == [True, False, True, True]
    own = batch.rewards[0, [0, 2, 3]]
    wanted = (own - own.mean()) / (own.std() + 1e-4)
    torch.testing.assert_close(compared.advantages[0][[0, 2, 3]], wanted)
    loss, seen = trainer._kept(compared.kept[0], batch, compared.advantages[0], 0, "noise 0 0")
    assert loss[1] == 0
    assert len(seen["moved"]) == 3
    assert (loss[[0, 2, 3]] > 0).all()
