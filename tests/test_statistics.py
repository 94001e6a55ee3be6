"""Intervals and win rates: coverage, seeds, ties, and two rewards that drift apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tilt.statistics import alarm, bootstrap, win_rate


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_bootstrap_is_seeded_and_covers_the_mean_as_often_as_it_says():
    values = normal(40)
    first, again = (bootstrap(values, seeded(1)) for _ in range(2))
    assert first == again
    assert first.mean == pytest.approx(values.mean().item())
    assert first != bootstrap(values, seeded(2))
    inside = [
        (found := bootstrap(normal(40, seed=s), seeded(s), samples=400, confidence=0.9)).low < 0
        and found.high > 0
        for s in range(300)
    ]
    # the percentile interval of 40 values covers a little less than 90 %
    assert abs(np.mean(inside) - 0.885) < 4 * math.sqrt(0.9 * 0.1 / 300)


def test_the_width_of_the_bootstrap_is_that_of_the_mean():
    found = bootstrap(normal(400), seeded())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 / 20, rel=0.1)


def test_a_win_rate_counts_ties_as_half_and_averages_within_a_prompt():
    a = torch.tensor([[1.0, 1.0], [0.0, 5.0], [2.0, 2.0]])
    b = torch.tensor([[0.0, 1.0], [1.0, 6.0], [1.0, 0.0]])
    prompts = ["a", "a", "b", "b", "c", "c"]
    found = win_rate(a.flatten(), b.flatten(), prompts, seeded())
    assert found.mean == pytest.approx((0.75 + 0 + 1) / 3)
    assert 0 <= found.low <= found.mean <= found.high <= 1
    flat = win_rate(a[:, 0], b[:, 0], "abc", seeded())
    assert flat.mean == pytest.approx(2 / 3)
    assert win_rate(a.flatten(), a.flatten(), prompts, seeded()).low == 0.5


def test_the_one_shot_alarm_needs_both_intervals_clear_of_0():
    up, down = normal(100) + 1, normal(100, seed=1) - 1
    assert alarm(up, down, seeded()).raised
    assert not alarm(up, up, seeded()).raised
    assert not alarm(down, down, seeded()).raised
    assert not alarm(up, normal(100, seed=2) * 30 - 0.1, seeded()).raised
    assert not alarm(down, up, seeded()).raised
    found = alarm(up, down, seeded())
    assert found.train.low > 0 > found.heldout.high


def test_the_one_shot_alarm_is_rarely_wrong():
    rung = [
        alarm(normal(30, seed=s) + 1, normal(30, seed=1000 + s), seeded(s), samples=400).raised
        for s in range(300)
    ]
    # one side of a 95 % interval, which is a little narrow at 30 prompts
    assert np.mean(rung) < 0.03 + 4 * math.sqrt(0.03 * 0.97 / 300)


def test_weights_make_it_a_ratio_and_strata_a_mean_of_means():
    values, weights = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([3.0, 1.0, 1.0, 1.0])
    assert bootstrap(values, seeded(), weights=weights).mean == pytest.approx(4 / 6)
    uneven = bootstrap(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]), seeded(), strata="aaabb")
    assert (uneven.mean, uneven.low, uneven.high) == (0.5, 0.5, 0.5)
    assert math.isnan(bootstrap(values, seeded(), strata="aaab").low)
    assert bootstrap(normal(1), seeded()).text("+") == "+1.541"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap(normal(0), seeded()), "needs finite values"),
        (lambda: bootstrap(normal(3) / 0, seeded()), "not finite"),
        (lambda: win_rate(normal(3), normal(4), "abc", seeded()), "of n prompts"),
        (lambda: win_rate(normal(3) * math.nan, normal(3), "abc", seeded()), "NaN"),
        (lambda: alarm(normal(3), normal(4), seeded()), "the same prompts"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
