"""Means with bootstrap intervals over prompts, win rates, and an alarm for reward hacking.

Legend: p prompts, n images. Everything is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewards.compare import per_prompt

__all__ = ["Alarm", "Interval", "alarm", "bootstrap", "percentile_interval", "win_rate", "wins"]

SAMPLES, CONFIDENCE = 4000, 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its interval, which are NaN if there are too few values."""

    mean: float
    low: float
    high: float

    def text(self, sign: str = "") -> str:
        """Return "0.500 [0.400, 0.600]"; sign: "+" also marks positive numbers."""
        ends = "" if math.isnan(self.low) else f" [{self.low:{sign}.3f}, {self.high:{sign}.3f}]"
        return f"{self.mean:{sign}.3f}{ends}"


def percentile_interval(mean: float, resampled: Tensor, confidence: float = CONFIDENCE) -> Interval:
    """Return the percentile interval of a mean, from means (samples,) of resampled data."""
    tail = round((1 - confidence) / 2, 12)  # 0.025 exactly
    low, high = (
        resampled.double().quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    )
    return Interval(mean, low, high)


def bootstrap(
    values: Tensor,
    generator: torch.Generator,
    *,
    weights: Tensor | None = None,
    strata: Sequence[str] = (),
    samples: int = SAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Return the mean of values (p,), one per prompt, with a percentile bootstrap over prompts.

    With weights (p,) the mean is Σwv/Σw, for example of character error rates weighted by
    lengths. With strata, a label for each prompt, it is the mean of the labels' means, and
    prompts are resampled within their label, as for GenEval's overall score. Ends are NaN if a
    label has only one prompt. Raises ValueError for values that are not finite.
    """
    if values.ndim != 1 or not len(values) or not values.isfinite().all():
        raise ValueError(
            "an interval needs finite values, one for each prompt, but got "
            f"{tuple(values.shape)}{'' if values.isfinite().all() else ', some not finite'}"
        )
    v, labels = values.detach().double().cpu(), list(strata) or [""] * len(values)
    w = torch.ones_like(v) if weights is None else weights.double().cpu()
    groups = [torch.tensor([i for i, x in enumerate(labels) if x == y]) for y in sorted({*labels})]

    def mean(groups: list[Tensor]) -> Tensor:
        return torch.stack([(w[i] * v[i]).sum(-1) / w[i].sum(-1) for i in groups]).mean(0)

    if min(map(len, groups)) < 2:
        return Interval(float(mean(groups)), math.nan, math.nan)
    drawn = [i[torch.randint(len(i), (samples, len(i)), generator=generator)] for i in groups]
    return percentile_interval(float(mean(groups)), mean(drawn), confidence)


def wins(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 where a > b, ½ where a == b and 0 elsewhere, float64."""
    return (a > b).double() + (a == b).double() / 2


def win_rate(
    a: Tensor, b: Tensor, prompts: Sequence[Hashable], generator: torch.Generator, **options: Any
) -> Interval:
    """Return how often a exceeds b, ties counting ½, with an interval over prompts.

    a and b (n,) are paired: entry i of both belongs to the same prompt and seed. Pairs are
    averaged within a prompt first. `options` are those of `bootstrap`.
    """
    if not a.shape == b.shape == (len(prompts),):
        raise ValueError(
            f"a win rate pairs values (n,) of n prompts, but got {tuple(a.shape)}, "
            f"{tuple(b.shape)} and {len(prompts)} prompts"
        )
    if a.isnan().any() or b.isnan().any():
        raise ValueError("a win rate cannot pair NaN; leave such images out of both")
    return bootstrap(per_prompt(wins(a, b), prompts), generator, **options)


@dataclass(frozen=True)
class Alarm:
    """The gains of a trained and a held-out reward, and whether they significantly diverge."""

    train: Interval
    heldout: Interval
    raised: bool


def alarm(
    train_gain: Tensor, heldout_gain: Tensor, generator: torch.Generator, **options: Any
) -> Alarm:
    """Test whether the trained reward rose while a held-out one fell.

    Gains (p,) are tuned minus base, averaged for each prompt. The alarm is raised if the whole
    interval of the trained gain is above 0 and that of the held-out gain below.
    """
    if train_gain.shape != heldout_gain.shape:
        raise ValueError(
            "the gains of both rewards must be given for the same prompts, but got "
            f"{tuple(train_gain.shape)} and {tuple(heldout_gain.shape)}"
        )
    train = bootstrap(train_gain, generator, **options)
    heldout = bootstrap(heldout_gain, generator, **options)
    return Alarm(train, heldout, train.low > 0 and heldout.high < 0)
