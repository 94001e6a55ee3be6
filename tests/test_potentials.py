"""Potentials: each by hand, and the product along every line of descent."""

import math

import pytest
import torch
from chains import close_with_maximum, every_potential, every_tempering
from torch import Tensor

from steering import filter as fk
from steering.filter import FeynmanKac
from steering.potentials import adaptive
from steering.weights import conditional_ess, ess


def double(state: fk.FilterState) -> fk.FilterState:
    history = fk.History(*(values.double() for values in state.history))
    return fk.FilterState(
        state.log_weights.double(),
        state.log_z.double(),
        history,
        state.scale.double(),
        state.anchor.double(),
    )


def random_rewards(b: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, k, generator=generator, dtype=torch.float64) - 1


@pytest.mark.parametrize(
    ("potential", "expected"),
    [
        # rewards -2, 1, -1; log G / λ of each score
        ("difference", [-2, 1 - -2, -1 - 1]),
        ("max", [-2, 1, 1]),  # not max(0, -2): the running maximum starts at nothing, not at 0
        ("sum", [-2, -2 + 1, -2 + 1 - 1]),
        ("immediate", [-2, 1, -1]),
    ],
)
def test_potentials_by_hand(potential: str, expected: list[float]) -> None:
    settings = FeynmanKac(reward_scale=3.0, potential=potential)
    state = fk.start(1, 1)
    for reward, log_potential in zip((-2.0, 1.0, -1.0), expected, strict=True):
        weighed = fk.weigh(state, torch.tensor([[reward]]), settings, 1.0)
        gained = weighed.log_weights - state.log_weights
        assert gained.item() == pytest.approx(3 * log_potential)
        state = weighed
    closed = fk.close(state, torch.tensor([[0.5]]), settings)
    assert closed.log_weights.item() == pytest.approx(3 * 0.5)


@every_potential
@every_tempering
def test_without_resampling_the_closed_weights_are_exactly_the_target(
    potential: str, tempering: str
) -> None:
    settings = FeynmanKac(reward_scale=7.3, potential=potential, tempering=tempering, min_ess=0)
    state = fk.start(3, 5)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    for i in range(4):
        state = fk.weigh(state, random_rewards(3, 5, i).float(), settings, (i + 1) / 5)
        state, _, _, _ = fk.resample(state, settings, generators)
    final = random_rewards(3, 5, 9).float()
    assert torch.equal(fk.close(state, final, settings).log_weights, 7.3 * final)


@every_potential
@every_tempering
@pytest.mark.parametrize("min_ess", [0.5, 1.0])
def test_the_product_along_every_line_of_descent_is_the_target(
    potential: str, tempering: str, min_ess: float
) -> None:
    settings = FeynmanKac(
        reward_scale=2.0, potential=potential, tempering=tempering, min_ess=min_ess
    )
    state = double(fk.start(40, 6))
    generators = [torch.Generator().manual_seed(i) for i in range(40)]
    product = torch.zeros(40, 6, dtype=torch.float64)
    resampled = False
    for i in range(4):
        before = state.log_weights
        state = fk.weigh(state, random_rewards(40, 6, i), settings, (i + 1) / 5)
        product = product + state.log_weights - before
        state, ancestors, _, _ = fk.resample(state, settings, generators)
        product = fk.take(product, ancestors)
        resampled |= not torch.equal(ancestors, torch.arange(6).expand(40, 6))
    final = random_rewards(40, 6, 9)
    before = state.log_weights
    product = product + fk.close(state, final, settings).log_weights - before
    assert resampled
    torch.testing.assert_close(product, 2.0 * final, rtol=0, atol=1e-9)


def test_closing_with_the_running_maximum_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fk, "close", close_with_maximum)
    with pytest.raises(AssertionError):
        test_without_resampling_the_closed_weights_are_exactly_the_target("max", "none")
    with pytest.raises(AssertionError):
        test_the_product_along_every_line_of_descent_is_the_target("max", "none", 0.5)


def test_linear_tempering_follows_progress() -> None:
    settings = FeynmanKac(reward_scale=8.0, tempering="linear")
    state = fk.weigh(fk.start(2, 3), torch.ones(2, 3), settings, 0.25)
    assert state.scale.tolist() == [2.0, 2.0]
    assert state.log_weights.tolist() == [[2.0] * 3] * 2


@pytest.mark.parametrize("reward_scale", [20.0, -20.0])
def test_adaptive_tempering_leaves_half_of_the_population(reward_scale: float) -> None:
    settings = FeynmanKac(reward_scale=reward_scale, tempering="adaptive")
    rewards = random_rewards(50, 16, 0)
    rewards[0] = 0.3  # all equal: nothing holds λ back
    rewards[1] *= 1e-3  # nearly so
    state = fk.weigh(double(fk.start(50, 16)), rewards, settings, 0.2)
    assert state.scale[:2].tolist() == [reward_scale, reward_scale]
    held = state.scale[2:]
    assert ((held / reward_scale > 0) & (held / reward_scale < 1)).all()
    half = torch.full_like(held, 8)
    torch.testing.assert_close(ess(state.log_weights)[2:], half, rtol=1e-5, atol=0)
    assert (ess(state.log_weights)[2:] < half).all()  # so that min_ess = 0.5 resamples


def test_adaptive_tempering_counts_from_the_weights_that_are_there() -> None:
    log_weights, total = random_rewards(20, 16, 1), 3 * random_rewards(20, 16, 2)
    applied = random_rewards(20, 16, 3) * 0.1
    scale = torch.full((20,), 0.1, dtype=torch.float64)
    found = adaptive(log_weights, total, applied, scale, 30.0)
    left = conditional_ess(log_weights, found[:, None] * total - applied)
    torch.testing.assert_close(left, torch.full_like(left, 8), rtol=1e-5, atol=0)


@every_potential
@every_tempering
def test_a_constant_reward_leaves_equal_weights_and_its_own_log_z(
    potential: str, tempering: str
) -> None:
    settings = FeynmanKac(reward_scale=4.0, potential=potential, tempering=tempering, min_ess=1)
    state = fk.start(2, 6)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    for i in range(3):
        state = fk.weigh(state, torch.full((2, 6), -1.7), settings, (i + 1) / 4)
        state, ancestors, sizes, _ = fk.resample(state, settings, generators)
        assert sizes.tolist() == [6, 6]
        assert torch.equal(ancestors, torch.arange(6).expand(2, 6))
    state = fk.close(state, torch.full((2, 6), -1.7), settings)
    assert fk.final_log_z(state).tolist() == pytest.approx([4.0 * -1.7] * 2, rel=1e-5)


@every_potential
@every_tempering
def test_nothing_is_read_from_the_device(potential: str, tempering: str) -> None:
    # A tensor on "meta" has no values: reading one, or branching on one, raises.
    settings = FeynmanKac(potential=potential, tempering=tempering)
    generators = [torch.Generator() for _ in range(3)]
    state = fk.start(3, 4, "meta")
    rewards = torch.empty(3, 4, device="meta")
    state = fk.weigh(state, rewards, settings, 0.2)
    noisy = torch.empty((), device="meta") > 0
    state, ancestors, sizes, _ = fk.resample(state, settings, generators, 2, noisy)
    state = fk.close(state, rewards[:, :2], settings)
    assert fk.final_log_z(state).shape == sizes.shape == (3,)
    assert ancestors.shape == (3, 2)


def test_half_precision_rewards_are_weighed_in_float32() -> None:
    rewards = torch.tensor([[1.0, -math.pi]], dtype=torch.float16)
    settings = FeynmanKac(reward_scale=1000.0)  # λ r overflows in half precision
    state = fk.weigh(fk.start(1, 2), 100 * rewards, settings, 1.0)
    assert state.log_weights.dtype == torch.float32
    assert state.log_weights.isfinite().all()
