"""Transitions against diffusers' schedulers, torch.distributions and exact marginals."""

import math
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from tiny_pipelines import steps_where_stock_ddim_is_nan

from steering.transitions import Transition, ddim_transition, flow_transition, log_prob

SHAPE = (2, 3, 4, 8, 8)  # b, k, channels, height, width


def stable_diffusion_ddim(**config: Any) -> Any:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        **config,
    )
    scheduler.set_timesteps(20)
    return scheduler


def euler(**config: Any) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(20)
    return scheduler


def normals(count: int, shape: tuple[int, ...] = SHAPE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_equals_diffusers_over_twenty_steps(
    prediction_type: str, eta: float, to_one: bool
) -> None:
    scheduler = stable_diffusion_ddim(
        set_alpha_to_one=to_one, prediction_type=prediction_type, steps_offset=1
    )
    (x,) = normals(1)
    ours = x
    for i, timestep in enumerate(scheduler.timesteps):
        model_output, z = torch.sin(ours + i), torch.cos(3 * ours - i)
        previous = int(timestep) - 50
        alpha_bar = scheduler.alphas_cumprod[timestep]
        alpha_bar_prev = (
            scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
        )
        stock = scheduler.step(model_output, int(timestep), x, eta=eta, variance_noise=z)
        move = ddim_transition(model_output, ours, alpha_bar, alpha_bar_prev, eta, prediction_type)
        torch.testing.assert_close(move.x0, stock.pred_original_sample, rtol=1e-5, atol=1e-5)
        ours, x = move.mean + move.std * z, stock.prev_sample
        torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


def test_ddim_is_finite_at_zero_terminal_snr_where_diffusers_is_not() -> None:
    scheduler = stable_diffusion_ddim(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    steps = steps_where_stock_ddim_is_nan()
    scheduler.set_timesteps(steps)
    x, v, z = normals(3)
    first = int(scheduler.timesteps[0])
    assert scheduler.alphas_cumprod[first] == 0
    stock = scheduler.step(v, first, x, eta=1.0, variance_noise=z)
    assert stock.prev_sample.isnan().any()  # else this test shows nothing
    alpha_bar_prev = scheduler.alphas_cumprod[first - 1000 // steps]
    move = ddim_transition(v, x, 0.0, alpha_bar_prev, 1.0, "v_prediction")
    assert move.mean.isfinite().all()
    # No signal in x: the mean is the predicted signal alone and the noise is all new.
    torch.testing.assert_close(move.mean, -alpha_bar_prev.sqrt() * v)
    assert move.std.item() == pytest.approx(math.sqrt(1 - alpha_bar_prev.item()), rel=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_three_predictions_of_one_image_propose_the_same_move(prediction_type: str) -> None:
    x0, noise = (values.double() for values in normals(2))
    alpha_bar, alpha_bar_prev, eta = 0.3, 0.6, 0.8
    signal, spread = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    output = {
        "epsilon": noise,
        "v_prediction": signal * noise - spread * x0,
        "sample": x0,
    }[prediction_type]
    sample = signal * x0 + spread * noise
    move = ddim_transition(output, sample, alpha_bar, alpha_bar_prev, eta, prediction_type)
    std = eta * math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev))
    mean = math.sqrt(alpha_bar_prev) * x0 + math.sqrt(1 - alpha_bar_prev - std**2) * noise
    torch.testing.assert_close(move.x0, x0)
    torch.testing.assert_close(move.mean, mean)
    assert move.std.item() == pytest.approx(std)


def test_an_unknown_prediction_type_is_refused() -> None:
    x = torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match="'flow', not 'epsilon'"):
        ddim_transition(x, x, 0.5, 0.7, 1.0, "flow")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_without_noise_is_bit_identical_to_diffusers_euler(
    dtype: torch.dtype, shift: float
) -> None:
    scheduler = euler(shift=shift)
    x = normals(1)[0].to(dtype)
    ours = x
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = torch.sin(3 * ours + i)
        sigma, sigma_next = scheduler.sigmas[i], scheduler.sigmas[i + 1]
        x = scheduler.step(velocity, timestep, x).prev_sample
        for eta in (0.0, 0.0 * sigma_next):
            move = flow_transition(velocity, ours, sigma, sigma_next, eta)
            assert move.mean.dtype == torch.float32
            assert torch.equal(move.mean.to(dtype), x)
        ours = (move.mean + move.std * normals(1)[0]).to(dtype)
        assert torch.equal(ours, x)


def test_flow_with_all_noise_new_is_diffusers_stochastic_sampling() -> None:
    scheduler = euler(stochastic_sampling=True)
    x = normals(1)[0]
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = torch.sin(3 * x + i)
        sigma, sigma_next = scheduler.sigmas[i], scheduler.sigmas[i + 1]
        move = flow_transition(velocity, x, sigma, sigma_next, sigma_next)
        x = scheduler.step(
            velocity, timestep, x, generator=torch.Generator().manual_seed(i)
        ).prev_sample
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(i))
        torch.testing.assert_close(move.mean + move.std * z, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("sigma", "sigma_next"), [(1.0, 0.9), (0.6, 0.5), (0.1, 0.0)])
@pytest.mark.parametrize("part", [0.0, 0.3, 1.0])
def test_flow_keeps_the_marginal(sigma: float, sigma_next: float, part: float) -> None:
    # For a known x0 the step leads from N((1-s) x0, s²) to N((1-s') x0, s'²) whatever η is.
    x0, noise = (values.double() for values in normals(2))
    eta = part * sigma_next
    x = (1 - sigma) * x0 + sigma * noise
    move = flow_transition(noise - x0, x, sigma, sigma_next, eta)
    kept = math.sqrt(sigma_next**2 - eta**2)
    torch.testing.assert_close(move.x0, x0)
    torch.testing.assert_close(move.mean, (1 - sigma_next) * x0 + kept * noise)
    assert move.std.item() == pytest.approx(eta)


def test_flow_is_finite_at_the_first_and_the_last_step() -> None:
    x, velocity = normals(2)
    for sigma, sigma_next in ((1.0, 0.5), (0.5, 0.0)):
        for eta in (0.0, sigma_next):
            move = flow_transition(velocity, x, sigma, sigma_next, eta)
            assert move.mean.isfinite().all()
            assert move.x0.isfinite().all()


def test_more_flow_noise_than_the_next_sigma_is_refused() -> None:
    x = torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match=r"eta is 0\.6"):
        flow_transition(x, x, 0.7, 0.5, 0.6)


@pytest.mark.parametrize("transition", [ddim_transition, flow_transition])
def test_float64_is_kept(transition) -> None:
    x = torch.zeros(1, 2, 3, dtype=torch.float64)
    kind = ("epsilon",) if transition is ddim_transition else ()
    move = transition(x, x, 0.5, 0.4 if not kind else 0.6, 0.1, *kind)
    assert move.mean.dtype == move.x0.dtype == move.std.dtype == torch.float64


@pytest.mark.parametrize("std_shape", [(), (2, 3, 1, 1, 1)])
def test_log_prob_is_the_sum_over_the_latent(std_shape: tuple[int, ...]) -> None:
    mean, x = normals(2)
    std = torch.rand(std_shape, generator=torch.Generator().manual_seed(1)) + 0.5
    expected = torch.distributions.Normal(mean, std).log_prob(x).sum(dim=(2, 3, 4))
    torch.testing.assert_close(log_prob(Transition(mean, std, mean), x), expected)


def test_log_prob_of_a_scalar_state() -> None:
    mean, x = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 1.0]])
    expected = torch.distributions.Normal(mean, 2.0).log_prob(x)
    torch.testing.assert_close(log_prob(Transition(mean, torch.tensor(2.0), mean), x), expected)
