"""Chains whose laws are known exactly, and filters that are wrong on purpose: for the tests."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Generator, Tensor

from steering import filter as fk
from steering.filter import FeynmanKac, FilterState, Population, Transition, particle_filter
from steering.potentials import POTENTIALS
from steering.resampling import RESAMPLERS
from steering.transitions import ddim_transition
from steering.weights import normalize

every_potential = pytest.mark.parametrize("potential", list(POTENTIALS))
every_resampler = pytest.mark.parametrize("resampler", list(RESAMPLERS))
every_tempering = pytest.mark.parametrize("tempering", ["none", "linear", "adaptive"])


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def last(populations: Iterator[Population]) -> Population:
    *_, final = populations
    return final


# The linear-Gaussian DDIM chain. With the exact noise prediction for data from N(0.5, 1), each step
# is x' = a x + b + c z, and the law of the chain, which is not that of the data, follows by
# recursion.

ALPHA_BARS = torch.cos(torch.linspace(0.99, 0, 21, dtype=torch.float64) * math.pi / 2) ** 2
CENTRE = 2.0


def gaussian_kernel(step: int, x: Tensor) -> Transition:
    alpha_bar, alpha_bar_prev = ALPHA_BARS[step], ALPHA_BARS[step + 1]
    noise = (1 - alpha_bar).sqrt() * (x - alpha_bar.sqrt() * 0.5)
    return ddim_transition(noise, x, alpha_bar, alpha_bar_prev, 1.0, "epsilon")


def linear(x0: Tensor) -> Tensor:
    return x0


def quadratic(x0: Tensor) -> Tensor:
    return -((x0 - CENTRE) ** 2) / 2


def gaussian_law() -> tuple[float, float]:
    mean, variance = 0.0, 1.0
    for step in range(20):
        move = gaussian_kernel(step, torch.tensor([[0.0, 1.0]], dtype=torch.float64))
        b, a_plus_b = move.mean[0].tolist()
        mean, a = (a_plus_b - b) * mean + b, a_plus_b - b
        variance = a**2 * variance + move.std.item() ** 2
    return mean, variance


def gaussian_answer(reward: Callable, scale: float) -> tuple[float, float]:
    """Z and the tilted mean."""
    mu, v = gaussian_law()
    if reward is linear:
        return math.exp(scale * mu + scale**2 * v / 2), mu + scale * v
    widened = 1 + scale * v
    z = math.exp(-scale * (mu - CENTRE) ** 2 / (2 * widened)) / math.sqrt(widened)
    return z, (mu + scale * v * CENTRE) / widened


def run_gaussian(
    reward: Callable, settings: FeynmanKac, k: int, runs: int, seed: int
) -> Population:
    generator = seeded(seed)
    x = torch.randn(runs, k, generator=generator, dtype=torch.float64)
    return last(particle_filter(x, gaussian_kernel, reward, 20, settings, generator=generator))


def errors_from_z(final: Population, z: float) -> float:
    """How many standard errors the mean estimate of Z lies from it."""
    estimates = final.log_z.exp()
    return ((estimates.mean() - z) / (estimates.std() / math.sqrt(len(estimates)))).item()


def steered_means(final: Population) -> Tensor:
    return (normalize(final.log_weights) * final.x).sum(dim=1)


right_resample = fk.resample


def resample_and_drop(state: FilterState, settings: FeynmanKac, *rest) -> fk.Resampled:
    """Planted bug: where the ess is high the weights are dropped, as in the published code."""
    state, ancestors, sizes, chosen = right_resample(state, settings, *rest)
    applied = state.scale[:, None] * state.history.total
    dropped = state._replace(log_weights=torch.zeros_like(state.log_weights), anchor=applied)
    return fk.Resampled(dropped, ancestors, sizes, chosen)


def close_with_maximum(state: FilterState, rewards: Tensor, settings: FeynmanKac) -> FilterState:
    """Planted bug: the last potential closes with the running maximum, not with the reward."""
    peak = torch.maximum(state.history.peak, rewards)
    return state._replace(log_weights=settings.reward_scale * peak - state.anchor)


def close_not(state: FilterState, rewards: Tensor, settings: FeynmanKac) -> FilterState:
    """Planted bug: the final reward is forgotten, so the target is that of the last score."""
    return state


def move_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: x_{t-1} is drawn first, then resampled by the rewards of its parent x_t."""
    chosen = []
    draw = fk._noise_like

    def resample(*arguments) -> fk.Resampled:
        result = right_resample(*arguments)
        chosen.append(result[1])
        return result

    def noise_of_the_parent(mean: Tensor, generator: Generator) -> Tensor:
        noise = draw(mean, generator)
        return fk.take(noise, chosen.pop()) if chosen else noise

    monkeypatch.setattr(fk, "resample", resample)
    monkeypatch.setattr(fk, "_noise_like", noise_of_the_parent)
