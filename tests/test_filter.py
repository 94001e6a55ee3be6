"""The algebra of the filter, which holds exactly for every draw, and what it refuses."""

import math

import pytest
import torch
from chains import (
    every_potential,
    every_resampler,
    every_tempering,
    gaussian_kernel,
    last,
    linear,
    run_gaussian,
    seeded,
)
from middle import Settings
from torch import Tensor

from steering import filter as fk
from steering.filter import FilterState, Transition, particle_filter
from steering.resampling import RESAMPLERS
from steering.settings import scored_steps
from steering.weights import ess


def plain_chain(b: int, k: int, seed: int) -> Tensor:
    """The chain alone, with the noise stream of particle_filter."""
    generator = seeded(seed)
    x = torch.randn(b, k, generator=generator, dtype=torch.float64)
    torch.randint(2**62, (b,), generator=generator)
    for step in range(20):
        move = gaussian_kernel(step, x)
        x = move.mean + move.std * torch.randn(b, k, generator=generator, dtype=torch.float64)
    return x


@every_potential
@every_resampler
@every_tempering
@pytest.mark.parametrize("min_ess", [0.0, 0.5, 1.0])
def test_a_scale_of_zero_changes_no_bit(
    potential: str, resampler: str, tempering: str, min_ess: float
) -> None:
    settings = Settings(
        reward_scale=0, potential=potential, resampler=resampler, tempering=tempering,
        min_ess=min_ess,
    )  # fmt: skip
    final = run_gaussian(linear, settings, k=4, runs=3, seed=2)
    assert torch.equal(final.x, plain_chain(3, 4, seed=2))
    assert (final.log_weights == 0).all()
    assert (final.log_z == 0).all()


def test_a_scale_of_zero_keeps_the_first_particles_of_a_funnel() -> None:
    settings = Settings(reward_scale=0, funnel=(4, 3, 3, 2))
    x = torch.randn(3, 4, generator=seeded(), dtype=torch.float64)
    sizes = []
    for population in particle_filter(x, gaussian_kernel, linear, 20, settings, generator=seeded()):
        num = population.x.shape[1]
        assert torch.equal(population.ancestors, torch.arange(num).expand(3, num))
        assert (population.log_z == 0).all()
        sizes.append(num)
    assert sizes == [4] * 8 + [3] * 8 + [2] * 4


@every_resampler
@pytest.mark.parametrize("min_ess", [0.5, 1.0])
def test_one_particle_is_the_plain_chain(resampler: str, min_ess: float) -> None:
    settings = Settings(reward_scale=10, resampler=resampler, min_ess=min_ess)
    final = run_gaussian(linear, settings, k=1, runs=5, seed=2)
    assert torch.equal(final.x, plain_chain(5, 1, seed=2))
    torch.testing.assert_close(final.log_z, 10 * final.x[:, 0])


@every_potential
@every_tempering
def test_without_resampling_it_is_best_of_k(potential: str, tempering: str) -> None:
    settings = Settings(reward_scale=3.7, potential=potential, tempering=tempering, min_ess=0)
    final = run_gaussian(linear, settings, k=8, runs=20, seed=4)
    x = plain_chain(20, 8, seed=4)
    assert torch.equal(final.x, x)
    assert torch.equal(final.log_weights, 3.7 * x)  # exactly, so the ranking is exact too


def test_min_ess_of_one_resamples_at_every_score() -> None:
    settings = Settings(min_ess=1.0)
    x, generator = torch.randn(9, 8, generator=seeded(), dtype=torch.float64), seeded(3)
    for population in particle_filter(
        x, gaussian_kernel, linear, 20, settings, generator=generator
    ):
        if population.rewards is not None and population.step < 19:
            assert (population.log_weights == 0).all()
    weighed = fk.weigh(fk.start(2, 4), torch.ones(2, 4), settings, 0.5)
    generators = [seeded(0), seeded(1)]
    state, _, sizes, _ = fk.resample(weighed, settings, generators)
    assert sizes.tolist() == [4, 4]  # not less than k, and resampled all the same
    assert state.log_z.tolist() == [10.0, 10.0]


def test_weights_are_kept_where_the_ess_is_high_and_folded_where_it_is_low() -> None:
    settings = Settings(reward_scale=1.0, min_ess=0.5)
    rewards = torch.tensor([[0.0, 0.1, 0.2, 0.3], [0.0, 0.0, 0.0, 9.0]])
    weighed = fk.weigh(fk.start(2, 4), rewards, settings, 0.5)
    state, ancestors, _, _ = fk.resample(weighed, settings, [seeded(0), seeded(1)])
    assert torch.equal(state.log_weights[0], rewards[0])
    assert ancestors[0].tolist() == [0, 1, 2, 3]
    assert state.log_z[0] == 0
    assert state.log_weights[1].tolist() == [0] * 4
    assert ancestors[1].tolist() == [3] * 4
    assert state.log_z[1].item() == pytest.approx(math.log((3 + math.exp(9)) / 4))


@pytest.mark.parametrize("stochastic", [False, torch.tensor(False)])
def test_no_resampling_before_a_noiseless_move(stochastic: bool | Tensor) -> None:
    settings = Settings(min_ess=1.0)
    weighed = fk.weigh(fk.start(1, 3), torch.tensor([[0.0, 1.0, 5.0]]), settings, 0.5)
    state, ancestors, sizes, _ = fk.resample(weighed, settings, seeded(), stochastic=stochastic)
    assert torch.equal(state.log_weights, weighed.log_weights)
    assert ancestors.tolist() == [[0, 1, 2]]
    assert sizes[0] < 3


def test_a_noiseless_chain_is_weighted_and_never_resampled() -> None:
    settings = Settings(min_ess=1.0)
    x = torch.randn(4, 6, generator=seeded(), dtype=torch.float64)

    def kernel(step: int, x: Tensor) -> Transition:
        return Transition(0.9 * x, torch.zeros(()), x)

    final = last(particle_filter(x, kernel, linear, 10, settings, generator=seeded()))
    torch.testing.assert_close(final.x, 0.9**10 * x)
    assert torch.equal(final.log_weights, 10 * final.x)


def test_a_prompt_is_resampled_alike_alone_and_among_others() -> None:
    settings = Settings(reward_scale=3.0)
    rewards = torch.randn(4, 3, 8, generator=seeded(), dtype=torch.float64)  # scores, b, k

    def run(prompts: slice) -> tuple[FilterState, list[Tensor]]:
        generators = [seeded(i) for i in range(3)][prompts]
        state, lineage = fk.start(len(generators), 8), []
        for score in rewards:
            state = fk.weigh(state, score[prompts], settings, 0.5)
            state, ancestors, _, _ = fk.resample(state, settings, generators)
            lineage.append(ancestors)
        return fk.close(state, rewards[0][prompts], settings), lineage

    together, lineage = run(slice(None))
    for i in range(3):
        alone, lineage_alone = run(slice(i, i + 1))
        assert torch.equal(alone.log_weights[0], together.log_weights[i])
        assert torch.equal(fk.final_log_z(alone)[0], fk.final_log_z(together)[i])
        for a, b in zip(lineage_alone, lineage, strict=True):
            assert torch.equal(a[0], b[i])


@pytest.mark.gpu
@every_resampler
@every_tempering
def test_a_score_never_waits_for_the_gpu(resampler: str, tempering: str) -> None:
    settings = Settings(resampler=resampler, tempering=tempering)
    generators = [seeded(i) for i in range(3)]
    rewards = torch.randn(2, 3, 8, generator=seeded(9)).cuda()
    noisy = torch.tensor(True).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        state = fk.start(3, 8, "cuda")
        for i in range(2):
            state = fk.weigh(state, rewards[i], settings, (i + 1) / 3)
            state, _, _, _ = fk.resample(state, settings, generators, None, noisy)
        state = fk.close(state, rewards[0], settings)
        log_z = fk.final_log_z(state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert log_z.isfinite().all()


@pytest.mark.gpu
@every_resampler
def test_the_gpu_draws_the_ancestors_of_the_cpu(resampler: str) -> None:
    weights = torch.softmax(torch.randn(50, 16, generator=seeded(), dtype=torch.float64), dim=1)
    expected = RESAMPLERS[resampler](weights, 16, seeded(1))
    assert torch.equal(RESAMPLERS[resampler](weights.cuda(), 16, seeded(1)).cpu(), expected)


def test_populations_step_by_step() -> None:
    settings = Settings(reward_scale=2.0, num_scores=3, funnel=(8, 5, 2))
    x, generator = torch.randn(2, 8, 3, generator=seeded()), seeded(1)

    def kernel(step: int, x: Tensor) -> Transition:
        return Transition(x, torch.full((x.shape[1], 1), 0.1), 2 * x)

    seen = list(
        particle_filter(x, kernel, lambda x0: x0.sum(-1), 10, settings, generator=generator)
    )
    assert [population.step for population in seen] == list(range(10))
    scored = [population.step for population in seen if population.rewards is not None]
    assert scored == [*scored_steps(10, settings), 9] == [2, 5, 8, 9]
    sizes = [population.x.shape for population in seen]
    assert sizes == [(2, 8, 3)] * 5 + [(2, 5, 3)] * 3 + [(2, 2, 3)] * 2
    final = seen[-1]
    torch.testing.assert_close(final.ess, ess(final.log_weights))
    assert final.log_weights.shape == final.ancestors.shape == (2, 2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_named(value: float) -> None:
    def reward(x0: Tensor) -> Tensor:
        rewards = torch.zeros(2, 3)
        rewards[1, 2] = value
        return rewards

    x = torch.zeros(2, 3)

    def kernel(step: int, x: Tensor) -> Transition:
        return Transition(x, torch.ones(()), x)

    with pytest.raises(ValueError, match=rf"prompt 1, particle 2 at step 2 is {value}"):
        last(particle_filter(x, kernel, reward, 10, Settings(), generator=seeded()))


def test_a_reward_or_kernel_of_the_wrong_shape_is_refused() -> None:
    x = torch.zeros(2, 3, 4)

    def good(step: int, x: Tensor) -> Transition:
        return Transition(x, torch.ones(()), x)

    def bad(step: int, x: Tensor) -> Transition:
        return Transition(x[:, :2], torch.ones(()), x)

    with pytest.raises(ValueError, match=r"reward returned shape \(2, 3, 4\)"):
        last(particle_filter(x, good, linear, 10, Settings(), generator=seeded()))
    with pytest.raises(ValueError, match=r"return the shape of x, \(2, 3, 4\)"):
        last(particle_filter(x, bad, linear, 10, Settings(), generator=seeded()))
