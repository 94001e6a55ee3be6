"""Steps of a flow's SDE on Gaussians, their densities, and what ratios of policies average to.

Legend: s the time, h = s - s' the step, g the rate of the noise, x0 ~ N(m, c²).
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_published import schedule_of

from finetune.chains import Schedule
from finetune.grpo import mean_log_prob
from finetune.noising import Noising
from finetune.policy_losses import guarded_log_ratio, policy_loss
from steering.transitions import Transition, flow_transition, sde_transition

FLOW = Noising("velocity", 1000)
ONE = torch.tensor(1.0, dtype=torch.float64)


def velocity(x, s, m, c):
    """E[ε - x0 | x_s = x] for x0 ~ N(m, c²)."""
    variance = (1 - s) ** 2 * c**2 + s**2
    return -m + (s - (1 - s) * c**2) / variance * (x - (1 - s) * m)


def law_after(step, s, after, mean, variance, m, c):
    """The mean and variance after a step with the exact velocity from N(mean, variance)."""
    points = torch.tensor([0.0, 1.0], dtype=torch.float64)
    move = step(velocity(points, s, m, c), points, s, after)
    start, slope = float(move.mean[0]), float(move.mean[1] - move.mean[0])
    return start + slope * mean, slope**2 * variance + float(move.std) ** 2


@pytest.mark.parametrize("g", [0.0, 0.3, 0.9, 2.0])
@pytest.mark.parametrize("c", [0.0, 0.5, 1.3])
@pytest.mark.parametrize(("s", "after"), [(0.9, 0.8), (0.5, 0.3), (0.2, 0.15)])
def test_an_sde_step_errs_in_the_variance_by_the_square_of_the_step(s, after, c, g):
    """By h² (D (k + g²/2D)² - 1 - c²), with k the velocity's slope; the mean is exact."""
    m, h, d = 0.7, s - after, (1 - s) ** 2 * c**2 + s**2
    k = (s - (1 - s) * c**2) / d

    def step(v, x, now, then):
        return sde_transition(v, x, now, then, g)

    mean, variance = law_after(step, s, after, (1 - s) * m, d, m, c)
    exact = (1 - after) ** 2 * c**2 + after**2
    assert mean == pytest.approx((1 - after) * m, abs=1e-12)
    excess = h**2 * (d * (k + g**2 / (2 * d)) ** 2 - 1 - c**2)
    assert variance - exact == pytest.approx(excess, abs=1e-12)
    if c == 0:  # the noise that an image keeps too much
        assert excess == pytest.approx(g**2 * h**2 / s + g**4 * h**2 / (4 * s**2), abs=1e-12)


@pytest.mark.parametrize("noise", [0.0, 0.4, 0.951, 1.0])
@pytest.mark.parametrize("sde", ["cps", "flow", "dance"])
def test_only_flow_cps_keeps_the_marginal_of_a_known_image(sde, noise):
    """In SD3's ten steps an image keeps no noise of Flow-CPS, and some of the SDEs' steps."""
    now = torch.linspace(1, 0.1, 10, dtype=torch.float64)
    sigmas = 3 * now / (1 + 2 * now)
    schedule = Schedule(FLOW, (1,), sigmas[:-1], sigmas[:-1], sigmas[1:], sde)
    mean, variance = 0.0, 1.0
    for i in range(len(schedule)):

        def step(v, x, now, then, i=i):
            return schedule.transition(i, v, x, noise)

        s, after = float(schedule.now[i]), float(schedule.after[i])
        mean, variance = law_after(step, s, after, mean, variance, 0.7, 0.0)
    last = float(sigmas[-1])
    assert mean == pytest.approx((1 - last) * 0.7, abs=1e-6)
    if sde == "cps" or not noise:
        assert variance == pytest.approx(last**2, rel=1e-6)
    else:
        assert variance > 1.02 * last**2


@pytest.mark.parametrize(
    ("sde", "noise", "kept"), [("cps", 0.951, 0.0089), ("flow", 0.7, 0.249), ("dance", 0.3, 0.160)]
)
def test_the_noise_that_an_image_keeps_after_nine_of_sd3s_steps_is_that_in_the_docs(
    sde, noise, kept
):
    schedule = schedule_of(sde)
    mean, variance = 0.0, 1.0
    for i in range(9):

        def step(v, x, now, then, i=i):
            return schedule.transition(i, v, x, noise)

        times = float(schedule.now[i]), float(schedule.after[i])
        mean, variance = law_after(step, *times, mean, variance, 0.7, 0.0)
    assert math.sqrt(variance) == pytest.approx(kept, abs=5e-4 if kept > 0.1 else 5e-5)
    page = (Path(__file__).parents[1] / "docs" / "adversarial.md").read_text(encoding="utf-8")
    assert f"{kept:.{4 if kept < 0.1 else 3}f} with " in page


@pytest.mark.parametrize("rate", [lambda s: 0.7 * math.sqrt(s / (1 - s)), lambda s: 0.3])
def test_the_error_of_an_sdes_chain_is_halved_by_twice_the_steps(rate):
    """From s = 0.9 to 0.1: Euler-Maruyama has the weak order 1."""
    m, c, errors = 0.7, 0.8, []
    for count in (100, 200):
        times = torch.linspace(0.9, 0.1, count + 1, dtype=torch.float64).tolist()
        mean, variance = 0.1 * m, 0.01 * c**2 + 0.81
        for s, after in pairwise(times):

            def step(v, x, now, then):
                return sde_transition(v, x, now, then, rate(now))

            mean, variance = law_after(step, s, after, mean, variance, m, c)
        errors.append(variance - (0.81 * c**2 + 0.01))
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.05)


def test_without_noise_an_sdes_step_is_eulers():
    x, v = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).unbind()
    move, euler = sde_transition(v, x, 0.6, 0.4, 0.0), flow_transition(v, x, 0.6, 0.4, 0.0)
    torch.testing.assert_close(move.mean, euler.mean)
    torch.testing.assert_close(move.x0, euler.x0)
    assert move.std == 0
    half = sde_transition(v.bfloat16(), x.bfloat16(), 0.6, 0.4, 0.5)
    assert half.mean.dtype == half.std.dtype == torch.float32


def moved(sde, v, x, s=0.6, after=0.45, noise=0.5):
    now, then = torch.tensor([s]).double(), torch.tensor([after]).double()
    return Schedule(FLOW, (1,), now, now, then, sde).transition(0, v, x, noise)


@pytest.mark.parametrize("sde", ["cps", "flow", "dance"])
def test_the_density_of_a_move_integrates_to_1(sde):
    """By the trapezoid rule over nine deviations, for a latent of one element."""
    x, v = torch.tensor([[0.3]]).double(), torch.tensor([[-1.1]]).double()
    move = moved(sde, v, x)
    places = torch.linspace(-9, 9, 2001).double()[:, None] * move.std + move.mean
    every = Transition(move.mean.expand(2001, 1), move.std, move.x0.expand(2001, 1))
    density = mean_log_prob(every, places).exp()
    assert float(torch.trapezoid(density, places[:, 0])) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("sde", ["cps", "flow", "dance"])
def test_gradients_of_densities_and_guarded_ratios_are_those_of_finite_differences(sde):
    draw = torch.Generator().manual_seed(1)
    x, v, y = torch.randn(3, 2, 3, generator=draw, dtype=torch.float64).unbind()
    v.requires_grad_()
    old = moved(sde, (v + 0.1).detach(), x)
    before = mean_log_prob(old, y)

    def density(v):
        return mean_log_prob(moved(sde, v, x), y)

    def guarded(v):
        move = moved(sde, v, x)
        return guarded_log_ratio(mean_log_prob(move, y), before, move.mean, old.mean, move.std)

    assert torch.autograd.gradcheck(density, (v,))
    assert torch.autograd.gradcheck(guarded, (v,))


def proposals(dims, count=200_000, std=0.6, seed=0):
    """An old move, a new one whose mean is 0.5 std from it in each element, samples of the old."""
    draw = torch.Generator().manual_seed(seed)
    old = Transition(torch.zeros(count, dims, dtype=torch.float64), std * ONE, ONE)
    new = Transition(old.mean + 0.5 * std, std * ONE, ONE)
    y = old.mean + std * torch.randn(count, dims, generator=draw, dtype=torch.float64)
    return old, new, y


def log_of(move, y):
    """The log-density per element, (n,)."""
    return mean_log_prob(Transition(move.mean, move.std, move.mean), y)


def test_the_ratio_of_densities_averages_to_1():
    """For one element; E[ρ²] = exp(Δ²/σ²), which gives the standard error."""
    old, new, y = proposals(1)
    ratio = (log_of(new, y) - log_of(old, y)).exp()
    error = math.sqrt((math.exp(0.25) - 1) / len(y))
    assert abs(float(ratio.mean()) - 1) < 4 * error


@pytest.mark.parametrize("dims", [1, 7])
def test_the_guarded_ratio_has_no_drift_and_the_plain_one_has(dims):
    """log ρ averages to 0 and to -Δ²/2σ²; guarded, E[ρ] = exp(σ² Δ²/2d) with Δ per element.

    The variance of log ρ is Δ²/d, guarded σ²Δ²/d, in units of σ.
    """
    std, apart = 0.6, 0.5
    old, new, y = proposals(dims, std=std)
    plain = log_of(new, y) - log_of(old, y)
    guarded = guarded_log_ratio(log_of(new, y), log_of(old, y), new.mean, old.mean, new.std)
    error = apart / math.sqrt(dims * len(y))
    assert abs(float(plain.mean()) + apart**2 / 2) < 4 * error
    assert abs(float(guarded.mean())) < 4 * std * error
    spread = (std * apart) ** 2 / dims
    assert float(guarded.var()) == pytest.approx(spread, rel=4 * math.sqrt(2 / len(y)))
    error = math.exp(spread / 2) * math.sqrt((math.exp(spread) - 1) / len(y))
    assert abs(float(guarded.exp().mean()) - math.exp(spread / 2)) < 4 * error


@pytest.mark.parametrize("step", [0, 3, 7])
def test_the_guarded_gradient_no_longer_depends_on_the_step_of_flow_grpo(step):
    """A z (1 + a²/2)/d, with z the noise of the move; without the guard it is Δt/σ times that."""
    sigmas = torch.linspace(0.95, 0.05, 10).double()
    schedule = Schedule(FLOW, (4,), sigmas[:-1], sigmas[:-1], sigmas[1:], "flow")
    draw = torch.Generator().manual_seed(step)
    x, v, z = torch.randn(3, 2, 4, generator=draw, dtype=torch.float64).unbind()
    v.requires_grad_()
    move = schedule.transition(step, v, x, 0.7)
    y = (move.mean + move.std * z).detach()
    score = mean_log_prob(move, y)
    ratio = guarded_log_ratio(score, score.detach(), move.mean, move.mean.detach(), move.std)
    dt = float(sigmas[step] - sigmas[step + 1])
    loss = policy_loss(ratio, torch.zeros_like(ratio), torch.tensor([2.0, -1.0])) / dt
    (found,) = torch.autograd.grad(loss.sum(), v)
    slope = 1 + 0.7**2 / 2  # g² (1-s)/2s with g² = a² s/(1-s)
    expected = torch.tensor([[2.0], [-1.0]]) * z * slope / 4
    torch.testing.assert_close(found, expected)
