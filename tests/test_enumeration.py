"""The filter on a chain so small that every expectation is a finite sum: no tolerance but rounding.

A chain on the integers whose parity is the state: x' = x + z with z in {0, 1}, P(z = 1) = FLIP.
Three steps, two particles, two scores. One prompt for each combination of initial states, noises
and resampling outcomes, so that a sum over prompts, weighted by the probability of their
combination, is an expectation without error.
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from chains import (
    close_not,
    close_with_maximum,
    every_potential,
    every_tempering,
    last,
    resample_and_drop,
    seeded,
)
from torch import Generator, Tensor

from steering import filter as fk
from steering.filter import FeynmanKac, Population, Transition, particle_filter
from steering.resampling import RESAMPLERS
from steering.weights import normalize

STEPS = 3
FLIP = 0.3
FIRST_ODD = 0.4
CHANCE = torch.tensor([1 - FLIP, FLIP], dtype=torch.float64)
FIRST = torch.tensor([1 - FIRST_ODD, FIRST_ODD], dtype=torch.float64)
PAIRS = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
# The reward of the final state, even or odd, and what is predicted of it at steps 0 and 1.
FINAL_REWARD = (-0.4, 0.9)
PREDICTED = ((0.3, 0.1), (-0.5, 0.4))


def exact_two_state(scale: float) -> tuple[float, float]:
    """Z and P(odd) under the tilted law, by summing over all paths."""
    total = odd = 0.0
    for path in itertools.product((0, 1), repeat=STEPS + 1):
        state, noises = sum(path) % 2, path[1:]
        chance = FIRST[path[0]].item() * math.prod(CHANCE[z].item() for z in noises)
        tilted = chance * math.exp(scale * FINAL_REWARD[state])
        total += tilted
        odd += tilted * state
    return total, odd / total


def enumerate_filter(
    settings: FeynmanKac, monkeypatch: pytest.MonkeyPatch, scout: bool = False
) -> tuple[Tensor, Population]:
    """The probability of every combination (b,), and what the filter makes of each.

    scout: whether the predictions are scored by another reward than the final state.
    """
    choices = torch.cartesian_prod(*[torch.arange(4)] * (1 + STEPS + 2))
    first, noises, outcomes = choices[:, 0], choices[:, 1 : 1 + STEPS], choices[:, 1 + STEPS :]
    chance = FIRST[PAIRS[first]].prod(dim=1) * CHANCE[PAIRS[noises]].flatten(1).prod(dim=1)
    scores, moves = iter(outcomes.unbind(1)), iter(noises.unbind(1))

    def enumerated(weights: Tensor, num: int, generator: object) -> Tensor:
        nonlocal chance
        ancestors = PAIRS[next(scores)]
        # A second slot that a funnel does not use is counted twice, with half the chance each.
        drawn = weights.gather(1, ancestors)
        drawn[:, num:] = 0.5
        chance = chance * drawn.prod(dim=1)
        return ancestors[:, :num]

    def noise(mean: Tensor, generator: Generator) -> Tensor:
        return PAIRS[next(moves)][:, : mean.shape[1]].to(mean.dtype)

    def kernel(step: int, x: Tensor) -> Transition:
        # x0 carries the step, from which the reward looks up its prediction.
        return Transition(x, torch.ones(()), x % 2 + 10 * (step + 1))

    def reward(x0: Tensor) -> Tensor:
        parity, step = (x0 % 10).long() % 2, (x0 // 10).long()
        table = torch.tensor([FINAL_REWARD, *PREDICTED], dtype=torch.float64)
        return table[step, parity]

    def ends(x: Tensor) -> Tensor:
        assert (x < 10).all(), "the reward was asked for a prediction"
        return reward(x)

    monkeypatch.setitem(RESAMPLERS, "multinomial", enumerated)
    monkeypatch.setattr(fk, "_noise_like", noise)
    x = PAIRS[first].double()
    scorers = (ends, {"on_the_way": lambda x0: 0.5 - 2 * reward(x0)}) if scout else (reward, {})
    reached, more = scorers
    final = last(particle_filter(x, kernel, reached, STEPS, settings, generator=seeded(), **more))
    return chance, final


def two_state_settings(**fields) -> FeynmanKac:
    defaults = {"resampler": "multinomial", "num_scores": 2, "score_from": 0.0, "score_to": 1.0}
    return FeynmanKac(**{"reward_scale": 1.5, **defaults, **fields})


@every_potential
@every_tempering
@pytest.mark.parametrize("min_ess", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("funnel", [(), (2, 1)])
@pytest.mark.parametrize("scout", [False, True])
def test_enumeration_of_a_two_state_chain_gives_z_exactly(
    potential: str,
    tempering: str,
    min_ess: float,
    funnel: tuple[int, ...],
    scout: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = two_state_settings(
        potential=potential, tempering=tempering, min_ess=min_ess, funnel=funnel
    )
    chance, final = enumerate_filter(settings, monkeypatch, scout)
    z, odd = exact_two_state(settings.reward_scale)
    estimates = final.log_z.exp()
    assert chance.sum().item() == pytest.approx(1, abs=1e-12)
    assert (chance * estimates).sum().item() == pytest.approx(z, rel=1e-12)
    # Not Z alone: the weighted population is an unbiased estimate of Z times the tilted law.
    steered = (normalize(final.log_weights) * (final.x % 2)).sum(dim=1)
    assert (chance * estimates * steered).sum().item() == pytest.approx(z * odd, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "bug", "potential", "scout"),
    [
        ("resample", resample_and_drop, "difference", False),
        ("close", close_with_maximum, "max", False),
        ("close", close_not, "difference", True),
    ],
)
def test_enumeration_rejects_planted_bugs(
    name: str, bug: Callable, potential: str, scout: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = two_state_settings(potential=potential, min_ess=0.95)
    z, _ = exact_two_state(settings.reward_scale)
    monkeypatch.setattr(fk, name, bug)
    chance, final = enumerate_filter(settings, monkeypatch, scout)
    assert abs((chance * final.log_z.exp()).sum().item() - z) > 0.01 * z
