"""Our schedulers against diffusers' own, step by step."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false
# diffusers annotates its schedulers and configs more narrowly than it uses them

import copy
import inspect
import logging

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from tiny_parts import ddim
from tiny_pipelines import steps_where_stock_ddim_is_nan

from steering.schedulers import StochasticDDIM, StochasticFlow, stochastic
from steering.transitions import ddim_transition

SHAPE = (3, 4, 5, 5)


def seeded(rows=3, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(rows)]


def network(x, t):
    return torch.tanh(x * 1.3 + float(t) / 1000)


def run(scheduler, steps=6, **keywords):
    """The states of a run of a made-up network, and the last one."""
    scheduler.set_timesteps(steps)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))
    states = []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, return_dict=False, **keywords)[0]
        states.append(x)
    return states


@pytest.mark.parametrize("noise", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("config", [{}, {"set_alpha_to_one": True}, {"prediction_type": "sample"}])
@pytest.mark.parametrize("steps", [4, 7])
def test_ddim_moves_are_the_stock_moves(noise, config, steps):
    stock = ddim(**config)
    ours = run(stochastic(stock, noise), steps, generator=seeded())
    theirs = run(stock, steps, generator=seeded(), eta=noise)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_flow_without_noise_moves_as_euler_and_at_noise_one_renoises():
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours, theirs = run(stochastic(stock, 0.0)), run(stock)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    renoising = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    ours = run(stochastic(stock, 1.0), generator=seeded())
    theirs = run(renoising, generator=seeded())
    torch.testing.assert_close(ours[-1], theirs[-1], rtol=1e-5, atol=1e-5)


def test_the_last_move_of_a_flow_is_noiseless_and_the_first_finite():
    scheduler = stochastic(FlowMatchEulerDiscreteScheduler(), 0.7, seeded())
    states = run(scheduler, 5)
    assert scheduler.chain.stds[-1] == 0.0
    assert scheduler.chain.stds[0] == pytest.approx(0.7 * scheduler.sigmas[1].item())
    assert all(state.isfinite().all() for state in states)


def test_zero_terminal_snr_is_clamped_where_the_stock_step_is_nan():
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    stock = ddim(timestep_spacing="trailing", **config)
    steps = steps_where_stock_ddim_is_nan()
    theirs = run(stock, steps, generator=seeded(), eta=1.0)
    assert theirs[0].isnan().all()
    scheduler = stochastic(stock, 1.0)
    ours = run(scheduler, steps, generator=seeded())
    assert all(state.isfinite().all() for state in ours)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))
    t, z = (
        scheduler.timesteps[0],
        torch.stack([torch.randn(SHAPE[1:], generator=g) for g in seeded()]),
    )
    alpha_bar = stock.alphas_cumprod[t], stock.alphas_cumprod[t - 1000 // steps]
    move = ddim_transition(network(x, t), x, *alpha_bar, 1.0, "v_prediction")
    torch.testing.assert_close(ours[0], move.mean + move.std * z)


@pytest.mark.parametrize(
    "theirs",
    [
        EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
        PNDMScheduler(set_alpha_to_one=False, steps_offset=1),
        DPMSolverMultistepScheduler(prediction_type="v_prediction"),
        DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_with_betas_become_ddim_of_their_config(theirs):
    before = copy.deepcopy(vars(theirs))
    ours = stochastic(theirs, 1.0)
    assert isinstance(ours, DDIMScheduler)
    assert not ours.config.clip_sample  # from_config would turn it on where the key is missing
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod)
    for key in ("prediction_type", "beta_schedule"):
        assert ours.config[key] == theirs.config[key]
    assert vars(theirs).keys() == before.keys()


def test_clipping_that_a_config_asks_for_stays():
    assert stochastic(DDPMScheduler(clip_sample=True), 1.0).config.clip_sample


def test_other_flow_schedulers_become_euler_of_their_config():
    ours = stochastic(FlowMatchHeunDiscreteScheduler(shift=2.5), 0.5)
    assert isinstance(ours, StochasticFlow)
    assert ours.config.shift == 2.5


def test_what_pipelines_look_at_is_that_of_the_real_class():
    scheduler = stochastic(ddim(), 1.0)
    assert isinstance(scheduler, DDIMScheduler)
    assert isinstance(scheduler, StochasticDDIM)
    for method in ("step", "set_timesteps", "add_noise"):
        ours = inspect.signature(getattr(scheduler, method)).parameters
        assert list(ours) == list(inspect.signature(getattr(ddim(), method)).parameters)
    stock = FlowMatchEulerDiscreteScheduler()
    for method in ("step", "set_timesteps", "scale_noise"):
        ours = inspect.signature(getattr(stochastic(stock, 1.0), method)).parameters
        assert list(ours) == list(inspect.signature(getattr(stock, method)).parameters)
    assert scheduler.config == stochastic(scheduler, 0.5).config


def test_the_scheduler_passed_in_keeps_its_state():
    for theirs in (ddim(), FlowMatchEulerDiscreteScheduler(shift=3.0)):
        theirs.set_timesteps(5)
        before = copy.deepcopy(vars(theirs))
        run(stochastic(theirs, 0.5), 9, generator=seeded())
        assert theirs.timesteps.equal(before["timesteps"])
        assert type(theirs) in (DDIMScheduler, FlowMatchEulerDiscreteScheduler)


def test_the_observer_sees_the_executed_steps_and_moves_its_choice():
    """The sample and the network's output go with their ancestor; the noise is drawn after."""
    looks = []

    def observer(look):
        looks.append((look.step, len(look.stds), look.predict()))
        return torch.tensor([2, 2, 0]) if look.step == 1 else None

    scheduler = stochastic(ddim(), 1.0)
    scheduler.set_timesteps(8)
    scheduler.chain.observer = observer
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))
    generators = seeded()
    for t in scheduler.timesteps[3:]:  # as image-to-image does
        before, output, state = x, network(x, t), [g.get_state() for g in generators]
        x = scheduler.step(output, t, x, generator=generators, return_dict=False)[0]
        if looks[-1][0] == 1:
            again = [torch.Generator() for _ in generators]
            for generator, saved in zip(again, state, strict=True):
                generator.set_state(saved)
            rows, stock = [2, 2, 0], ddim()
            stock.set_timesteps(8)
            moved = stock.step(output[rows], t, before[rows], eta=1.0, generator=again)
            assert torch.equal(x, moved.prev_sample)
            expected = stock.step(output, t, before).pred_original_sample
            assert torch.equal(looks[-1][2], expected)
            assert not torch.equal(x[0], x[1])
    assert [(step, total) for step, total, _ in looks] == [(i, 5) for i in range(5)]


@pytest.mark.parametrize("make", [ddim, FlowMatchEulerDiscreteScheduler])
def test_noise_that_the_pipeline_keeps_follows_the_lineage(make):
    stock, ours = make(), stochastic(make(), 0.5)
    image, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([2, 2, 0])
    for scheduler in (stock, ours):
        scheduler.set_timesteps(5)
    t = stock.timesteps[2:3]
    ours.chain.lineage = rows
    if make is ddim:
        ours_now, theirs = (
            ours.add_noise(image, noise, t),
            stock.add_noise(image[rows], noise[rows], t),
        )
    else:
        ours_now, theirs = (
            ours.scale_noise(image, t, noise),
            stock.scale_noise(image[rows], t, noise[rows]),
        )
    assert torch.equal(ours_now, theirs)


def test_what_is_no_flow_and_has_no_betas_is_refused():
    with pytest.raises(ValueError, match="EDMEulerScheduler is no flow-matching scheduler"):
        stochastic(EDMEulerScheduler(), 1.0)
    with pytest.raises(ValueError, match="invert_sigmas=True"):
        stochastic(FlowMatchEulerDiscreteScheduler(invert_sigmas=True), 1.0)


@pytest.mark.parametrize("noise", [-0.1, 1.5, float("nan")])
def test_noise_outside_its_range_is_refused(noise):
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        stochastic(ddim(), noise)


def test_another_eta_and_missing_generators_are_refused():
    scheduler = stochastic(ddim(), 1.0)
    scheduler.set_timesteps(4)
    x = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match=r"eta=0.5 was passed .* noise=1.0"):
        scheduler.step(x, scheduler.timesteps[0], x, eta=0.5)
    flow = stochastic(FlowMatchEulerDiscreteScheduler(), 0.5)
    with pytest.raises(ValueError, match="passes no generator"):
        run(flow)


def test_replacing_a_solver_is_logged_once_and_a_distilled_one_warns(caplog):
    from steering.schedulers import _log_once

    _log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        stochastic(PNDMScheduler(), 1.0)
        stochastic(PNDMScheduler(), 1.0)
        stochastic(LCMScheduler(), 1.0)
        stochastic(EulerAncestralDiscreteScheduler(timestep_spacing="trailing"), 1.0)
    said = [record.getMessage() for record in caplog.records]
    assert sum("PNDMScheduler is replaced by DDIM" in line for line in said) == 1
    assert sum("distilled" in line for line in said) == 2


@pytest.mark.parametrize(
    ("scheduler", "noise"), [(DDIMScheduler(), 1.0), (FlowMatchEulerDiscreteScheduler(), 0.5)]
)
def test_the_noise_that_nobody_named_is_that_of_the_kind_of_scheduler(scheduler, noise):
    made = stochastic(scheduler)
    assert made.chain.noise == noise
    assert stochastic(made, None).chain.noise == noise
    assert stochastic(made, 0.0).chain.noise == 0.0
