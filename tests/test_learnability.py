"""What is said of rewards that a model can learn little from."""

from __future__ import annotations

import math

import pytest

from finetune.learnability import little_to_learn

FLOOR, CEILING, FLAT = "near the lower end", "near the upper end", "the same reward"
UNIT = (0.0, 1.0)


@pytest.mark.parametrize(
    ("rewards", "bounds", "said"),
    [
        ([0, 0, 0, 0.25], UNIT, FLOOR),
        ([0, 0, 0, 0], UNIT, FLOOR),
        ([1, 1, 1, 0.75], UNIT, CEILING),
        ([0, 0.5, 1, 0.5], UNIT, ""),
        ([0.05, 0.3, 0.1, 0.2], UNIT, ""),
        ([0.3, 0.3, 0.6, 0.6], UNIT, FLAT),  # one prompt has 0.3 twice, the other 0.6
        ([-1, -0.9, -1, -0.95], (-1.0, 1.0), FLOOR),
        ([5.1, 5.3, 5.2, 5.4], (None, None), ""),
        ([5.1, 5.1, 5.2, 5.2], (None, None), FLAT),
        ([7, 7, 7, 7], (None, None), FLAT),
        ([-3, -1, -2, -2.5], (None, 0.0), ""),
        ([math.nan, 0.5, 1, 0.2], UNIT, ""),
        ([math.nan] * 4, UNIT, ""),
    ],
)
def test_rewards_at_one_end_or_alike_are_told(rewards, bounds, said):
    found = little_to_learn([0, 0, 1, 1], rewards, bounds)
    assert said in found
    assert bool(found) == bool(said)


def test_without_a_range_nine_of_ten_at_an_end_are_told():
    prompts = [i // 4 for i in range(40)]
    sparse = [0.0] * 36 + [0.0, 0.0, 0.5, 1.0]
    assert FLOOR in little_to_learn(prompts, sparse)
    assert CEILING in little_to_learn(prompts, [1 - reward for reward in sparse])
    assert not little_to_learn(prompts, [0.1 * (i % 4) for i in range(40)])
