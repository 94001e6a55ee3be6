"""The filter on Gaussian mixtures, with the exact reverse law: no discretisation error.

In one dimension, with three far modes.
"""

import math
from collections.abc import Callable

import pytest
import torch
from chains import CENTRE, errors_from_z, last, linear, quadratic, seeded
from torch import Generator, Tensor

from steering.filter import FeynmanKac, Transition, particle_filter

SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
CENTRES = torch.tensor([-3.0, 0.5, 4.0], dtype=torch.float64)
VARIANCES = torch.tensor([0.3, 1.0, 0.1], dtype=torch.float64)
MIXTURE_STEPS = 10
MIXTURE_BARS = torch.linspace(0.02, 1, MIXTURE_STEPS + 1, dtype=torch.float64)


def tilted_mixture(scale: float) -> tuple[Tensor, Tensor, float]:
    """Shares and centres of the mixture tilted by exp(scale x), and Z; variances stay."""
    factors = SHARES * torch.exp(scale * CENTRES + scale**2 * VARIANCES / 2)
    return factors / factors.sum(), CENTRES + scale * VARIANCES, factors.sum().item()


def log_marginals(x: Tensor, bar: Tensor, shares: Tensor, centres: Tensor) -> Tensor:
    """log of share_i N(x; √ᾱ μ_i, ᾱ σ_i² + 1 - ᾱ), components last."""
    normal = torch.distributions.Normal(bar.sqrt() * centres, (bar * VARIANCES + 1 - bar).sqrt())
    return shares.log() + normal.log_prob(x[..., None])


def reverse_components(
    x: Tensor, bar: Tensor, bar_next: Tensor, shares: Tensor, centres: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log shares, means and variances of p(x at bar_next | x at bar), components last."""
    a2 = bar / bar_next
    spread = bar_next * VARIANCES + 1 - bar_next
    variances = 1 / (1 / spread + a2 / (1 - a2))
    means = variances * (bar_next.sqrt() * centres / spread + (a2.sqrt() / (1 - a2)) * x[..., None])
    return log_marginals(x, bar, shares, centres).log_softmax(dim=-1), means, variances


def draw_component(log_shares: Tensor, uniforms: Tensor) -> Tensor:
    cumulated = log_shares.exp().cumsum(dim=-1)
    return (uniforms[..., None] > cumulated).sum(dim=-1, keepdim=True).clamp(max=2)


def draw_reverse(
    x: Tensor, step: int, shares: Tensor, centres: Tensor, uniforms: Tensor, normals: Tensor
) -> Tensor:
    bars = MIXTURE_BARS[step], MIXTURE_BARS[step + 1]
    log_shares, means, variances = reverse_components(x, *bars, shares, centres)
    component = draw_component(log_shares, uniforms)
    mean = means.gather(-1, component)[..., 0]
    return mean + variances.expand_as(means).gather(-1, component)[..., 0].sqrt() * normals


def log_reverse(x: Tensor, after: Tensor, step: int, shares: Tensor, centres: Tensor) -> Tensor:
    bars = MIXTURE_BARS[step], MIXTURE_BARS[step + 1]
    log_shares, means, variances = reverse_components(x, *bars, shares, centres)
    normal = torch.distributions.Normal(means, variances.sqrt())
    return (log_shares + normal.log_prob(after[..., None])).logsumexp(dim=-1)


def draw_first(b: int, k: int, shares: Tensor, centres: Tensor, generator: Generator) -> Tensor:
    bar = MIXTURE_BARS[0]
    uniforms = torch.rand(b, k, generator=generator, dtype=torch.float64)
    component = draw_component(shares.log(), uniforms)
    spread = (bar * VARIANCES + 1 - bar).sqrt()[component[..., 0]]
    normals = torch.randn(b, k, generator=generator, dtype=torch.float64)
    return bar.sqrt() * centres[component[..., 0]] + spread * normals


@pytest.mark.parametrize("min_ess", [0.5, 1.0])
def test_the_exact_twist_has_no_variance(min_ess: float) -> None:
    """Propose from p(x'|x) h'(x')/h(x) and reward by (log h)/λ: every weight is Z."""
    scale = 1.3
    shares, centres, z = tilted_mixture(scale)
    generator = seeded(0)

    def log_twist(x: Tensor, step: int) -> Tensor:
        # h = E[exp(λ x0) | x], by the posterior of x0, the reverse law down to ᾱ = 1.
        if step == MIXTURE_STEPS:
            return scale * x
        bars = MIXTURE_BARS[step], MIXTURE_BARS[-1]
        log_shares, means, variances = reverse_components(x, *bars, SHARES, CENTRES)
        return (log_shares + scale * means + scale**2 * variances / 2).logsumexp(dim=-1)

    # A state is (x, log p/τ so far, log h, a coordinate that only keeps the kernel noisy). The
    # tilted mixture has the twisted law for its exact reverse law.
    def kernel(step: int, state: Tensor) -> Transition:
        x, log_ratio = state[..., 0], state[..., 1]
        uniforms = torch.rand(x.shape, generator=generator, dtype=torch.float64)
        normals = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        after = draw_reverse(x, step, shares, centres, uniforms, normals)
        log_ratio = log_ratio + log_reverse(x, after, step, SHARES, CENTRES)
        log_ratio = log_ratio - log_reverse(x, after, step, shares, centres)
        still = torch.zeros_like(x)
        mean = torch.stack([after, log_ratio, log_twist(after, step + 1), still], dim=-1)
        return Transition(mean, torch.tensor([0.0, 0, 0, 1], dtype=torch.float64), state)

    def reward(state: Tensor) -> Tensor:
        return (state[..., 1] + state[..., 2]) / scale

    x = draw_first(500, 8, shares, centres, generator)
    first = [
        values.logsumexp(dim=-1)
        for values in (
            log_marginals(x, MIXTURE_BARS[0], SHARES, CENTRES),
            log_marginals(x, MIXTURE_BARS[0], shares, centres),
        )
    ]
    state = torch.stack([x, first[0] - first[1], log_twist(x, 0), torch.zeros_like(x)], dim=-1)
    settings = FeynmanKac(reward_scale=scale, min_ess=min_ess)
    populations = list(
        particle_filter(state, kernel, reward, MIXTURE_STEPS, settings, generator=generator)
    )
    for population in populations:
        torch.testing.assert_close(population.ess, torch.full_like(population.ess, 8))
    final = populations[-1]
    torch.testing.assert_close(
        final.log_z, torch.full_like(final.log_z, math.log(z)), rtol=0, atol=1e-10
    )
    drawn = final.x[..., 0].flatten()
    assert abs((drawn.mean() - (shares * centres).sum()) / (drawn.std() / 4000**0.5)) < 4


def mixture_answer(reward: Callable, scale: float) -> float:
    if reward is linear:
        return tilted_mixture(scale)[2]
    widened = 1 + scale * VARIANCES
    factors = torch.exp(-scale * (CENTRES - CENTRE) ** 2 / (2 * widened)) / widened.sqrt()
    return (SHARES * factors).sum().item()


@pytest.mark.parametrize(("reward", "scale"), [(linear, 0.7), (quadratic, 1.0)])
@pytest.mark.parametrize("min_ess", [0.5, 1.0])
def test_z_of_a_mixture_steered_by_the_predicted_mean(
    reward: Callable, scale: float, min_ess: float
) -> None:
    """A state is (x before, its two noises): the move itself only draws the noises."""

    def settle(state: Tensor, step: int) -> Tensor:
        if step == 0:
            return state[..., 0]
        uniforms = torch.special.ndtr(state[..., 1])
        return draw_reverse(state[..., 0], step - 1, SHARES, CENTRES, uniforms, state[..., 2])

    def kernel(step: int, state: Tensor) -> Transition:
        x = settle(state, step)
        bars = MIXTURE_BARS[step], MIXTURE_BARS[-1]
        log_shares, means, _ = reverse_components(x, *bars, SHARES, CENTRES)
        predicted = (log_shares.exp() * means).sum(dim=-1)
        nothing = torch.zeros_like(x)
        mean = torch.stack([x, nothing, nothing], dim=-1)
        std = torch.tensor([0.0, 1, 1], dtype=torch.float64)
        return Transition(mean, std, torch.stack([predicted, nothing, nothing], dim=-1))

    def reward_of_state(state: Tensor) -> Tensor:
        final = (state[..., 1:] != 0).any(dim=-1)
        return reward(torch.where(final, settle(state, MIXTURE_STEPS), state[..., 0]))

    generator = seeded(11)
    x = draw_first(4096, 8, SHARES, CENTRES, generator)
    state = torch.stack([x, torch.zeros_like(x), torch.zeros_like(x)], dim=-1)
    settings = FeynmanKac(reward_scale=scale, min_ess=min_ess)
    final = last(
        particle_filter(
            state, kernel, reward_of_state, MIXTURE_STEPS, settings, generator=generator
        )
    )
    assert abs(errors_from_z(final, mixture_answer(reward, scale))) < 4
