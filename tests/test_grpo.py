"""Policy gradients: the sampler is the pipelines' own, densities are normal, ratios begin at 1."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_network import made
from tiny_pipelines import family
from trainers import (
    PROMPTS,
    grpo,
    resumed,
    weights_of,
)

from finetune import lora
from finetune.chains import sample, schedule_of
from finetune.decoding import decoder_of
from finetune.grpo import Grpo, advantages_of, mean_log_prob
from finetune.network import Model
from finetune.policy_losses import group_advantages
from finetune.recording import Recorder, record
from steering.schedulers import stochastic
from steering.transitions import Transition

NAMES = ["sd", "sd2", "sdxl", "sd3", "flux"]


def trainer_of(name="sd3", **changed):
    return grpo(*family(name), **changed)


def latents_of(pipe, call, count, **more):
    with torch.no_grad():
        return pipe(PROMPTS[:1], num_images_per_prompt=count, **call | more, output_type="latent")[
            0
        ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_without_noise_the_samples_are_the_pipelines_own(name, guidance):
    pipe, call = family(name)
    call |= {"guidance_scale": guidance}
    model = Model(pipe)
    given = Recorder(pipe, call, guided=guidance > 1).record(PROMPTS[:1])
    schedule = schedule_of(model, given)
    assert len(schedule) == call["num_inference_steps"]
    generator = torch.Generator().manual_seed(1)
    shape = (2, *schedule.shape)
    start = torch.randn(shape, generator=generator)
    network = getattr(pipe, model.part)

    def predict(x, t, given):
        return model.predict(network, given, x, t)

    draws = torch.zeros(1, *shape)
    found, moves = sample(predict, schedule, start, given.repeated(2), range(0, 1), 0.0, draws)
    pipe.scheduler = stochastic(pipe.scheduler, 0.0)
    expected = latents_of(pipe, call, 2, latents=start)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
    assert [move.step for move in moves] == [0]
    assert torch.equal(moves[0].x, start)


@pytest.mark.parametrize("name", NAMES)
def test_the_schedule_needs_no_encoders(name):
    pipe, call = family(name)
    model, given = Model(pipe), record(pipe, PROMPTS[:1], **call)
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        if hasattr(pipe, part):
            setattr(pipe, part, None)
    schedule = schedule_of(model, given)
    assert len(schedule) == call["num_inference_steps"]
    assert schedule.shape == given.form.shape


@pytest.mark.parametrize("kind", ["Flux2Klein", "QwenImage", "ZImage", "Wan", "HunyuanImage"])
def test_the_schedule_is_that_of_a_call(kind):
    """Also of classes that need their decoder after the last step, whatever they return (FLUX.2),
    or encode what their guider needs (HunyuanImage)."""
    pipe, call = made(f"{kind}Pipeline")
    model, given = Model(pipe), record(pipe, PROMPTS[:1], **call)
    own: Any = stochastic(pipe.scheduler, 0.0)
    pipe.scheduler = own
    pipe(prompt=PROMPTS[0], output_type="latent", **given.form.call)
    found = schedule_of(model, given)
    assert torch.equal(found.now, own.sigmas[:-1])
    assert torch.equal(found.after, own.sigmas[1:])
    assert len(found) == call["num_inference_steps"]


@pytest.mark.parametrize("name", NAMES)
def test_decoded_latents_are_the_pipelines_images(name):
    pipe, call = family(name)
    generator = [torch.Generator().manual_seed(i) for i in range(2)]
    with torch.no_grad():
        latents = latents_of(pipe, call, 2, generator=generator)
        generator = [torch.Generator().manual_seed(i) for i in range(2)]
        images = pipe(
            PROMPTS[:1], num_images_per_prompt=2, generator=generator, output_type="pt", **call
        )[0]
    decode = decoder_of(Model(pipe), pipe, record(pipe, PROMPTS[:1], **call))
    torch.testing.assert_close(decode(latents), images.float())


def test_the_density_is_the_normal_one_by_element():
    generator = torch.Generator().manual_seed(0)
    mean, x = torch.randn(2, 3, 4, 5, generator=generator).unbind()[:1] * 2
    move = Transition(mean[None], torch.tensor(0.3), mean[None])
    normal = torch.distributions.Normal(mean, 0.3)
    expected = normal.log_prob(x).mean()
    torch.testing.assert_close(mean_log_prob(move, x[None])[0], expected)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_on_its_own_samples_the_ratio_is_exactly_1(name, micro):
    trainer = trainer_of(name, micro_groups=micro)
    before = weights_of(trainer)
    seen = trainer.train_step()
    assert seen["ratio"] == 1.0
    assert seen["clipped"] == 0.0
    assert seen["loss"] == pytest.approx(0, abs=1e-4)  # advantages sum to 0
    assert (weights_of(trainer) != before).any()


PEERS = [
    {"sde": "flow"},
    {"sde": "dance", "noise": 0.3},
    {"ratio": "error"},
    {"sde": "flow", "ratio": "guard", "noise": 1.2},
    {"kl": 0.1, "kl_space": "outputs"},
]


@pytest.mark.parametrize("peer", PEERS, ids=str)
def test_the_peers_forms_begin_at_a_ratio_of_1_and_train(peer):
    trainer = trainer_of(updates=2, lr=2e-2, **peer)
    before = weights_of(trainer)
    batch = trainer._sampled(0, [0])
    for move in batch.moves:
        held = trainer._held(trainer._density(batch.given, move))
        _, seen = trainer._loss(batch.given, move, torch.ones(4), held)
        assert seen["ratio"].tolist() == pytest.approx([1.0] * 4, abs=1e-6)
        if "kl" in peer:
            assert seen["kl"].abs().max() < 1e-12
    seen = trainer.train_step()
    assert seen["ratio"] != 1.0
    assert math.isfinite(seen["grad_norm"])
    assert (weights_of(trainer) != before).any()
    if "kl" in peer:  # of the outputs, and not of the moves
        loss, told = trainer._loss(batch.given, batch.moves[0], torch.zeros(4), None)
        own = trainer._density(batch.given, batch.moves[0])
        ref = trainer._reference(batch.given, batch.moves[0])
        apart = (own.output - ref.output).square().flatten(1).mean(1)
        torch.testing.assert_close(told["kl"], apart)
        torch.testing.assert_close(loss, 0.1 * apart)


def test_moves_of_the_sdes_have_the_noise_of_their_papers():
    """From pure noise, where g is infinite, Flow-GRPO's code takes 1 - t of the next step."""
    for sde, level in (("flow", 0.7), ("dance", 0.3)):
        schedule = trainer_of(sde=sde, noise=level).schedule
        assert schedule.now[0] == 1
        for step in range(3):
            now, after = float(schedule.now[step]), float(schedule.after[step])
            rest = 1 - after if step == 0 else 1 - now
            rate = level * math.sqrt(now / rest) if sde == "flow" else level
            x = torch.zeros(1, *schedule.shape)
            move = schedule.transition(step, x, x, level)
            assert float(move.std) == pytest.approx(rate * math.sqrt(now - after), rel=1e-5)
    start, x = schedule.now.clone(), torch.zeros(1, *schedule.shape)
    start[0] = 1 - 1e-6  # as some schedulers begin, lest they divide by zero
    near = replace(schedule, now=start, sde="flow").transition(0, x, x, 0.7)
    whole = replace(schedule, sde="flow").transition(0, x, x, 0.7)
    torch.testing.assert_close(near.std, whole.std, rtol=1e-4, atol=0)


def test_gradients_without_the_factor_and_with_the_guard_are_those_of_densities_times_it():
    """On the sampling policy: 2σ² times for the error alone, σ/Δt times for the guard."""
    found = {}
    for ratio in ("density", "error", "guard"):
        trainer = trainer_of(sde="flow", noise=0.7, ratio=ratio)
        batch = trainer._sampled(0, [0])
        move = batch.moves[1]
        loss, _ = trainer._loss(batch.given, move, torch.tensor([1.0, -2.0, 0.5, 0.5]), None)
        weights = list(trainer.learner.weights.values())
        gradients = torch.autograd.grad(loss.sum(), weights)
        found[ratio] = torch.cat([g.flatten() for g in gradients])
    schedule, step = trainer.schedule, move.step
    std = trainer._density(batch.given, move).transition.std.item()
    step_size = float(schedule.now[step] - schedule.after[step])
    torch.testing.assert_close(found["error"], 2 * std**2 * found["density"], atol=1e-7, rtol=1e-3)
    expected = std / step_size * found["density"]
    torch.testing.assert_close(found["guard"], expected, atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize("change", [{"sde": "flow"}, {"sde": "dance"}, {"ratio": "guard"}])
def test_what_is_for_flows_is_refused_for_a_network_with_betas(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"^{name} is '.*', which is for flows, but this network"):
        trainer_of("sd", **change)
    with pytest.raises(ValueError, match="sde is 'flow' but must be one of"):
        replace(trainer_of("sd").schedule, sde="flow")


@pytest.mark.parametrize("kept", [None, torch.tensor([[True] * 6, [True] * 5 + [False]])])
def test_equal_rewards_have_advantages_of_exactly_0(kept):
    rewards = torch.full((2, 6), 0.1)
    for spread in ("group", "global", "none"):
        assert not group_advantages(rewards, spread=spread, kept=kept).any()


def test_a_second_update_on_the_same_samples_has_another_ratio():
    trainer = trainer_of(updates=2, clip=1e-6)
    seen = trainer.train_step()
    assert trainer.step == 1
    assert trainer.learner.step == 2
    assert seen["ratio"] != 1.0
    assert 0 < seen["clipped"] <= 1


def test_constant_rewards_change_nothing():
    trainer = trainer_of(score=lambda images, _: (torch.ones(len(images)), {}))
    before = weights_of(trainer)
    seen = trainer.train_step()
    assert torch.equal(weights_of(trainer), before)
    assert seen["flat_groups"] == 1.0


def test_the_divergence_is_0_at_the_reference_and_then_positive():
    trainer = trainer_of(kl=0.1)
    assert trainer.train_step()["kl"] == pytest.approx(0, abs=1e-9)
    assert trainer.train_step()["kl"] > 0


@pytest.mark.parametrize("moved", ["lora", "refresh"])
def test_the_divergence_pulls_towards_a_reference_that_was_moved(moved):
    """∇ of mean|μ - μ_ref|² / (2 σ²) is that of μ at (μ - μ_ref) / σ², by element."""
    trainer, other = trainer_of(kl=0.5, refresh=2 * (moved == "refresh")), trainer_of()
    learner = trainer.learner
    if moved == "lora":
        generator = torch.Generator().manual_seed(3)
        learner.start_from(
            {n: torch.randn(p.shape, generator=generator) / 8 for n, p in learner.weights.items()}
        )
        trainer.train_step()
    else:
        for _ in range(3):
            trainer.train_step()
    assert learner.anchor is not None
    lora.fill(other.learner.weights, learner.anchor)
    batch, weights = trainer._sampled(7, [0]), list(learner.weights.values())
    (move, _), zeros = batch.moves, torch.zeros(4)
    loss, seen = trainer._loss(batch.given, move, zeros, None)
    assert (seen["kl"] > 0).all()
    found = torch.autograd.grad(loss.sum(), weights)
    own = trainer._density(batch.given, move).transition
    with torch.no_grad():
        reference = other._density(batch.given, move).transition.mean
    pull = 0.5 * (own.mean.detach() - reference) / own.std**2 / reference[0].numel()
    expected = torch.autograd.grad(own.mean, weights, pull)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


def test_a_shared_start_is_evaluated_once_up_to_the_window():
    trainer = trainer_of(window_start=2, window_size=1, micro_groups=3)
    rows = []
    trainer.learner.bare.register_forward_hook(
        lambda module, arguments, keywords, output: rows.append(len(output[0])), with_kwargs=True
    )
    trainer._sampled(0, [0])
    assert rows == [1, 1, 4, 4]
    rows.clear()
    other = trainer_of(window_start=2, window_size=1, share_start=False)
    batch = other._sampled(0, [0])
    assert len({image.sum().item() for image in batch.images}) == 4


def test_four_epochs_are_two_and_a_resumed_two_bit_for_bit(tmp_path):
    resumed(trainer_of, tmp_path, 2, 2, updates=2)


def test_it_raises_its_reward():
    trainer = trainer_of(lr=2e-2, groups=3, k=6, micro_groups=3)
    rewards = [trainer.train_step()["reward"] for _ in range(25)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.01


def test_each_reward_is_normalised_before_they_are_added():
    small = torch.tensor([[0.0, 1.0, 2.0]])
    large = torch.tensor([[200.0, 100.0, 0.0]])
    total, parts = small + large, {"small": small, "large": large}
    weights = {"small": 1.0, "large": 1.0}
    together = advantages_of(total, parts, weights, Grpo())
    apart = advantages_of(total, parts, weights, Grpo(each_reward=True))
    assert together[0, 0] > 0.9
    assert abs(apart[0, 0]) < 0.1
    torch.testing.assert_close(apart, torch.zeros(1, 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(together.sum(1), torch.zeros(1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 1}, "k is 1 but must be a whole number, 2"),
        ({"kl": -1.0}, "kl is -1.0 but must be a number not below 0"),
        ({"spread": "all"}, "spread is 'all' but must be 'group'"),
        ({"clip": 0.0}, "clip is 0.0 but must be a number above 0"),
        ({"window_start": 3}, "no moves to learn from"),
        ({"window_size": 0}, "window_size is 0 but must be a whole number, 1"),
        ({"noise": 0.0}, r"noise is 0\.0 but must be a number above 0"),
        ({"noise": 1.5}, r"noise is 1\.5 but must be in \(0, 1\] where sde is 'cps'"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(**change)


def test_a_moving_window_slides_over_all_steps_but_the_last():
    settings = Grpo(num_inference_steps=5, window_size=2, window_moves=True)
    assert [settings.window(epoch).start for epoch in range(4)] == [0, 1, 2, 0]


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_window_over_all_steps_but_the_last_is_ddpo(name):
    """Black et al. 2023, the importance-weighted estimator with PPO's clip, on DDPM's own moves."""
    trainer = trainer_of(name, window_size=3, share_start=False, noise=1.0, lr=1e-2)
    batch, schedule = trainer._sampled(0, [0]), trainer.schedule
    assert [move.step for move in batch.moves] == [0, 1, 2]
    advantages = trainer.samples.compared([batch]).advantages[0].flatten()
    weights = list(trainer.learner.weights.values())
    predict = trainer.learner.predicts(trainer.learner.bare)

    def log_density(move):
        x, now, after = move.x, schedule.now[move.step], schedule.after[move.step]
        output = predict(x, schedule.t[move.step], batch.given)
        if name == "sd3":  # all noise is drawn afresh around the predicted image
            mean, std = (1 - after) * (x - now * output), after
        else:  # Ho et al. 2020, eqs. 6 and 7
            kept = now / after
            x0 = (x - (1 - now).sqrt() * output) / now.sqrt()
            mean = after.sqrt() * (1 - kept) * x0 + kept.sqrt() * (1 - after) * x
            mean, std = mean / (1 - now), ((1 - after) / (1 - now) * (1 - kept)).sqrt()
        normal = torch.distributions.Normal(mean.float(), std.float())
        return normal.log_prob(move.y).flatten(1).mean(1)

    with torch.no_grad():
        old = [log_density(move) for move in batch.moves]
        before = [trainer._held(trainer._density(batch.given, move)) for move in batch.moves]
    trainer.train_step()
    outside = 0
    for move, own, held in zip(batch.moves, old, before, strict=True):
        loss, seen = trainer._loss(batch.given, move, advantages, held)
        ratio = (log_density(move) - own).exp()
        bounded = ratio.clamp(1 - 1e-4, 1 + 1e-4)
        expected = torch.maximum(-advantages * ratio, -advantages * bounded)
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss.mean(), weights)]),
            torch.cat([g.flatten() for g in torch.autograd.grad(expected.mean(), weights)]),
            atol=1e-5,
            rtol=1e-3,
        )
        outside += seen["clipped"].sum()
    assert outside > 0
