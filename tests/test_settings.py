"""Settings: which are refused, and which steps they score."""

import math

import pytest
import torch
from chains import gaussian_kernel, linear, seeded
from middle import Settings

from steering.filter import particle_filter
from steering.settings import scored_steps


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reward_scale": math.nan}, "reward_scale is nan"),
        ({"reward_scale": math.inf}, "reward_scale is inf"),
        ({"reward_scale": "10"}, "reward_scale is '10'"),
        ({"potential": "maximum"}, "'maximum', not one of .* did you mean 'max'"),
        ({"resampler": "sistematic"}, "did you mean 'systematic'"),
        ({"tempering": "linar"}, "did you mean 'linear'"),
        ({"min_ess": 1.5}, "min_ess is 1.5: pass a number from 0 to 1"),
        ({"noise": -0.1}, "noise is -0.1"),
        ({"num_scores": 0}, "num_scores is 0"),
        ({"score_from": 0.9}, "score_from=0.9 is greater than score_to=0.8"),
        ({"score_to": 1.2}, "score_to is 1.2"),
        ({"funnel": (4, 2, 3, 1)}, "grows"),
        ({"funnel": (4, 2)}, "2 populations for num_scores=4"),
        ({"funnel": (4, 2, 2, 0)}, "each 1 or more"),
        ({"funnel": [4, 2, 2, 1]}, "pass a tuple"),
    ],
)
def test_bad_settings_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**fields)


@pytest.mark.parametrize(
    ("fields", "num_steps", "k", "message"),
    [
        ({}, 1, 4, "no step to score"),
        ({"score_from": 0.99, "score_to": 1.0}, 20, 4, "no step to score"),
        ({"funnel": (8, 4, 4, 2)}, 20, 4, "grows from 4 particles to 8"),
        ({"funnel": (4, 4, 4, 2)}, 4, 4, "only 2 steps are scored"),
        ({}, 20, 0, "number of particles is 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_the_first_step(
    fields: dict, num_steps: int, k: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        particle_filter(
            torch.zeros(1, k), gaussian_kernel, linear, num_steps, Settings(**fields),
            generator=seeded(),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("num_steps", "fields", "expected"),
    [
        (100, {}, (20, 40, 60, 80)),
        (20, {}, (4, 8, 12, 16)),
        (10, {"score_from": 0.7, "score_to": 0.7}, (7,)),
        (4, {}, (1, 2)),
        (2, {"score_from": 0.0}, (0,)),
        (20, {"score_from": 0.0, "score_to": 1.0, "num_scores": 100}, tuple(range(19))),
        (30, {"num_scores": 1}, (6,)),
    ],
)
def test_scored_steps(num_steps: int, fields: dict, expected: tuple[int, ...]) -> None:
    assert scored_steps(num_steps, Settings(**fields)) == expected
