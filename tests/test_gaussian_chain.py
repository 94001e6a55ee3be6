"""The filter on the linear-Gaussian DDIM chain, against closed forms.

Tolerances are four standard errors at fixed seeds. Wrong variants of the filter are planted to show
that each criterion rejects what it is there to reject.
"""

import math
from collections.abc import Callable

import pytest
import torch
from chains import (
    close_with_maximum,
    errors_from_z,
    every_potential,
    every_resampler,
    every_tempering,
    gaussian_answer,
    gaussian_kernel,
    linear,
    move_first,
    quadratic,
    resample_and_drop,
    run_gaussian,
    seeded,
    steered_means,
)
from middle import Settings

from steering import filter as fk
from steering.filter import particle_filter
from steering.potentials import POTENTIALS
from steering.resampling import RESAMPLERS


@every_potential
@every_resampler
@pytest.mark.parametrize("min_ess", [0.5, 1.0])
def test_z_of_the_gaussian_chain(potential: str, resampler: str, min_ess: float) -> None:
    # Small scales for those whose closing weight undoes many rewards: where the weights have
    # heavy tails a standard error says nothing.
    scale = {"difference": 1.5, "max": 0.75, "sum": 0.25, "immediate": 0.75}[potential]
    settings = Settings(
        reward_scale=scale, potential=potential, resampler=resampler, min_ess=min_ess
    )
    seed = 10 * list(POTENTIALS).index(potential) + list(RESAMPLERS).index(resampler)
    final = run_gaussian(linear, settings, k=4, runs=4096, seed=seed)
    assert abs(errors_from_z(final, gaussian_answer(linear, scale)[0])) < 4


@every_resampler
@pytest.mark.parametrize("k", [2, 16, 64])
def test_z_of_the_gaussian_chain_with_a_quadratic_reward(resampler: str, k: int) -> None:
    settings = Settings(reward_scale=3.0, resampler=resampler)
    final = run_gaussian(quadratic, settings, k, runs=8192 // k, seed=k)
    assert abs(errors_from_z(final, gaussian_answer(quadratic, 3.0)[0])) < 4


@every_tempering
@pytest.mark.parametrize("funnel", [(), (16, 8, 8, 4)])
def test_z_with_tempering_and_a_funnel(tempering: str, funnel: tuple[int, ...]) -> None:
    settings = Settings(reward_scale=1.5, tempering=tempering, funnel=funnel)
    final = run_gaussian(linear, settings, k=16, runs=4096, seed=3)
    assert final.x.shape == (4096, funnel[-1] if funnel else 16)
    assert abs(errors_from_z(final, gaussian_answer(linear, 1.5)[0])) < 4


@pytest.mark.parametrize("reward", [linear, quadratic])
@pytest.mark.parametrize("min_ess", [0.5, 1.0])
def test_the_steered_mean_converges(reward: Callable, min_ess: float) -> None:
    settings = Settings(reward_scale=1.5, min_ess=min_ess)
    _, mean = gaussian_answer(reward, 1.5)
    small = steered_means(run_gaussian(reward, settings, k=64, runs=1024, seed=5))
    large = steered_means(run_gaussian(reward, settings, k=1024, runs=64, seed=6))
    # Bias O(1/k), spread O(1/√k): sixteen times the particles, a quarter of the spread.
    assert 3 < (small.std() / large.std()).item() < 5.5
    for means, k in ((small, 64), (large, 1024)):
        error = means.std().item() / math.sqrt(len(means))
        assert abs(means.mean().item() - mean) < 4 / k + 5 * error


@pytest.mark.parametrize(
    ("name", "bug", "potential", "scale"),
    [
        ("resample", resample_and_drop, "difference", 1.5),
        ("close", close_with_maximum, "max", 0.75),
    ],
)
def test_the_gaussian_chain_rejects_planted_bugs(
    name: str, bug: Callable, potential: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fk, name, bug)
    settings = Settings(reward_scale=scale, potential=potential)
    z, mean = gaussian_answer(linear, scale)
    assert abs(errors_from_z(run_gaussian(linear, settings, 4, 4096, seed=0), z)) > 4
    means = steered_means(run_gaussian(linear, settings, 1024, 64, seed=6))
    assert abs(means.mean().item() - mean) > 4 / 1024 + 5 * means.std().item() / 8


def siblings_differ() -> bool:
    """Whether no two particles that descend from one parent are equal, where some have siblings."""
    settings = Settings(reward_scale=5.0, min_ess=1.0)
    generator = seeded(1)
    x = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    related = False
    for population in particle_filter(
        x, gaussian_kernel, linear, 20, settings, generator=generator
    ):
        related |= any(len(set(row)) < 8 for row in population.ancestors.tolist())
        if any(len(set(row)) < 8 for row in population.x.tolist()):
            return False
    assert related
    return True


def test_children_of_one_parent_differ() -> None:
    assert siblings_differ()


def test_children_that_share_their_noise_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    move_first(monkeypatch)
    assert not siblings_differ()


def test_rewards_belong_to_the_states_they_weigh() -> None:
    settings = Settings(min_ess=1.0)
    x, generator = torch.randn(3, 8, generator=seeded(), dtype=torch.float64), seeded(1)
    for population in particle_filter(
        x, gaussian_kernel, linear, 20, settings, generator=generator
    ):
        if population.step < 19:
            proposed = gaussian_kernel(population.step, fk.take(x, population.ancestors))
            assert torch.equal(population.x0, proposed.x0)
        else:
            assert torch.equal(population.x0, population.x)
        if population.rewards is not None:
            assert torch.equal(population.rewards, linear(population.x0))
        x = population.x
