"""One reward from several: means, minimum, and penalties for disagreement.

In a spec the parts are arguments, `lcb(clip + 0.3*ocr, aesthetic, kappa=2)`; in Python they are
sums that `rewards.load` made, `lcb(load("clip + 0.3*ocr"), load("aesthetic"))`. The functions
combine scores directly, so parts of different scales should be `calibrated(...)`.

Legend: n images, m parts of a weight other than 0, r_i the score of part i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import check_number
from ..combine import Aggregate, Range, Scores, WeightedSum
from ..spec import Call, Value, aggregator, chosen

__all__ = ["harmonic", "lcb", "log_sigmoid", "mean", "median", "minimum", "uncertainty"]

HARMONIC_FLOOR = 1e-8  # added to every score, as in RPO's code, for a gradient at 0


def mean(*parts: WeightedSum) -> Aggregate:
    """The mean, (1/m) Σ r_i."""
    return _rising("mean", parts, lambda r: r.mean(0))


def median(*parts: WeightedSum) -> Aggregate:
    """The median r_i, or the mean of the two middle ones, which alone get gradients."""
    return _rising("median", parts, _median)


def minimum(*parts: WeightedSum) -> Aggregate:
    """The minimum, min_i r_i: worst-case optimisation of Coste et al. 2024 (arXiv 2310.02743)."""
    return _rising("min", parts, lambda r: r.amin(0))


def lcb(*parts: WeightedSum, kappa: float = 1.0) -> Aggregate:
    """Lower confidence bound, r̄ - κ·s with s² = (1/m) Σ (r_i - r̄)².

    Uncertainty-weighted optimisation of Coste et al. 2024 (arXiv 2310.02743), with the standard
    deviation instead of their variance, so that κ has no unit.
    """
    kappa = check_number("lcb's kappa", kappa, least=0)
    several("lcb", parts)
    low, high = ends(parts)
    # s is at most half the width (Popoviciu)
    range_ = bounds(low.mean() - kappa * (high.max() - low.min()) / 2, high.mean())
    score = pointwise(parts, lambda r: r.mean(0) - kappa * _deviation(r))
    return build("lcb", parts, score, range_, kappa=kappa)


def harmonic(*parts: WeightedSum, weight: float | None = None) -> Aggregate:
    """Harmonic mean 1 / Σ (λ_i / u_i) of scores scaled to [0, 1], near 0 if any of them is.

    RPO's λ-harmonic reward (Miao et al. 2024, arXiv 2407.12164), which has two cosines and
    λ = 0.3 for the first. u_i = (r_i - low_i) / (high_i - low_i) for the range of the part, which
    is (1 + cosine)/2 in the paper. `weight` is λ of the first part, and the others share 1 - λ;
    None weights all equally. Raises ValueError if a part has no finite range.
    """
    several("harmonic", parts)
    counted = [part for part in parts if part.counts]
    for part in counted:
        if part.range[0] is None or part.range[1] is None or part.range[0] >= part.range[1]:
            raise ValueError(
                f"harmonic needs scores between finite bounds but {part} has the range "
                f"{part.range}; write calibrated({part}, file=..., method=quantile)"
            )
    first = 1 / len(counted) if weight is None else check_number("harmonic's weight", weight, 0, 1)
    shares = [first] + [(1 - first) / (len(counted) - 1)] * (len(counted) - 1)
    low, high = ends(parts)
    combine = partial(_harmonic, low=low, high=high, shares=torch.tensor(shares))
    return build("harmonic", parts, pointwise(parts, combine), (0.0, 1.0), weight=weight)


def log_sigmoid(*parts: WeightedSum, ref: float = 0.0) -> Aggregate:
    """Σ log σ(r_i - ref), roughly the log probability that all parts approve of the image.

    The log-sigmoid-centred transform and its sum, a logical AND, of Wang et al. 2024 (arXiv
    2402.00742), which saturates above `ref`. Their reference is a high quantile of the base
    model's rewards; for calibrated parts, 1 is the 84th percentile of a normal distribution.
    """
    ref = check_number("log_sigmoid's ref", ref)
    several("log_sigmoid", parts, least=1)
    return _rising("log_sigmoid", parts, lambda r: F.logsigmoid(r - ref).sum(0), 1, ref=ref)


def uncertainty(*parts: WeightedSum, penalty: float = 1.0) -> Aggregate:
    """r̄·exp(-U) - λ·U, with U the mean of |r_i - r_j| over all pairs and λ the penalty.

    Ctrl-U (Zhang et al. 2025, arXiv 2410.11236), eq. 3, L·exp(-U) + λU for a loss L = -r. Its U
    (eq. 2) is the distance of two scores of one condition, from two generations in the paper and
    from the parts for one image here. Scores shrink towards 0 where parts disagree, so 0 must be
    neutral: use calibrated parts.
    """
    penalty = check_number("uncertainty's penalty", penalty, least=0)
    several("uncertainty", parts)
    low, high = ends(parts)
    worst = low.mean().clamp(max=0) - penalty * (high.max() - low.min())
    range_ = bounds(worst, high.mean().clamp(min=0))
    score = pointwise(parts, partial(_uncertain, penalty=penalty))
    return build("uncertainty", parts, score, range_, penalty=penalty)


def _median(r: Tensor) -> Tensor:
    ordered = r.sort(0).values
    middle = (len(r) - 1) // 2
    return (ordered[middle] + ordered[len(r) // 2]) / 2


def _deviation(r: Tensor) -> Tensor:
    variance = (r - r.mean(0)).square().mean(0)
    # the root has no derivative if all scores agree; 0 is one of its subgradients
    apart = variance > 0
    return torch.where(apart, variance, torch.ones_like(variance)).sqrt() * apart


def _harmonic(r: Tensor, low: Tensor, high: Tensor, shares: Tensor) -> Tensor:
    low, high, shares = (x.to(r)[:, None] for x in (low, high, shares))
    unit = (r - low) / (high - low)
    unit = torch.where(unit < 0, 0.0, unit)  # clamp has no gradient at 0 itself
    return 1 / (shares / (unit + HARMONIC_FLOOR)).sum(0)


def _uncertain(r: Tensor, penalty: float) -> Tensor:
    apart = torch.stack([(r[i] - r[j]).abs() for i, j in combinations(range(len(r)), 2)]).mean(0)
    return r.mean(0) * torch.exp(-apart) - penalty * apart


def _rising(
    name: str,
    parts: Sequence[WeightedSum],
    combine: Callable[[Tensor], Tensor],
    least: int = 2,
    **options: Value,
) -> Aggregate:
    """Make an aggregate of a function that increases with every score and so maps the ranges."""
    several(name, parts, least)
    low, high = (combine(end[:, None])[0] for end in ends(parts))
    return build(name, parts, pointwise(parts, combine), bounds(low, high), **options)


def build(
    name: str, parts: Sequence[WeightedSum], score: Scores, range: Range, **options: Value
) -> Aggregate:
    """Make the aggregate that `rewards.load` makes from this name, these parts and options."""
    sums = tuple(part.terms for part in parts)
    spec = str(Call(name, (), chosen(aggregator(name)[0], options), sums))
    return Aggregate(name, spec, tuple(parts), score, range)


def pointwise(parts: Sequence[WeightedSum], combine: Callable[[Tensor], Tensor]) -> Scores:
    """Return Scores by `combine`, which maps r (m, n) to (n,); NaN if any r_i of an image is."""

    def score(images: Tensor, prompts: Sequence[str], references: Any) -> Any:
        totals, components = [], {}
        for part in parts:
            total, found = part.evaluate(images, prompts, references=references)
            components |= found
            totals += [total] if part.counts else []
        r = torch.stack(totals)
        return torch.where(r.isnan().any(0), torch.nan, combine(r)), components

    return score


def several(name: str, parts: Sequence[WeightedSum], least: int = 2) -> None:
    """Require `least` parts of a weight other than 0, all made by `rewards.load`."""
    _refuse_strangers(name, parts)
    counted = sum(part.counts for part in parts)
    if counted < least:
        wanted = f"{least} or more rewards, as in {name}({', '.join(['clip', 'ocr'][:least])})"
        zero = " of a weight other than 0" if counted < len(parts) else ""
        raise ValueError(f"{name} takes {wanted}, but got {counted}{zero}; separate them by commas")


def single(name: str, parts: Sequence[WeightedSum]) -> WeightedSum:
    """Return the part of an aggregator that takes exactly one; raises ValueError otherwise."""
    _refuse_strangers(name, parts)
    if len(parts) != 1:
        raise ValueError(
            f"{name} takes one reward, or a sum as in {name}(clip + ocr), but got {len(parts)}"
        )
    if not parts[0].counts:
        raise ValueError(f"{name} got {parts[0]}, which is always 0; give it a weight")
    return parts[0]


def _refuse_strangers(name: str, parts: Sequence[Any]) -> None:
    for part in parts:
        if not isinstance(part, WeightedSum):
            raise ValueError(f"a part of {name} is {part!r}; make it with rewards.load(...)")


def ends(parts: Sequence[WeightedSum]) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of the parts of a weight other than 0, infinite where unknown."""
    ranges = [part.range for part in parts if part.counts]
    low = [-math.inf if low is None else low for low, _ in ranges]
    high = [math.inf if high is None else high for _, high in ranges]
    return torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)


def bounds(low: Tensor, high: Tensor) -> Range:
    """Return a range from two numbers, None if they are infinite or NaN (∞ - ∞)."""
    ends = (low.item(), high.item())
    known = [end if math.isfinite(end) else None for end in ends]
    return known[0], known[1]
