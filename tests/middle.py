"""FeynmanKac with a window in the middle of the run, whatever its defaults are."""

import functools

from steering import FeynmanKac

Settings = functools.partial(
    FeynmanKac,
    reward_scale=10.0,
    min_ess=0.5,
    score_from=0.2,
    score_to=0.8,
    num_scores=4,
    tempering="none",
)
