"""How much two rewards agree, and whether one that is trained on is being hacked.

Legend: n pictures, p prompts, t evaluations, h held-out rewards; a, b (n,) two rewards of the
same pictures. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Agreement",
    "Alarm",
    "Interval",
    "agreement",
    "alarm",
    "bootstrap",
    "hacked",
    "kendall_tau",
    "per_prompt",
    "retention",
    "starc_distance",
    "win_rate",
]


ALONE = "every prompt has one picture only, so no two can be compared; give more"


@dataclass(frozen=True)
class Agreement:
    """tau: mean over prompts of Kendall's τ-b, NaN where no prompt has one; prompts: how many
    have one; concordant: the share of pairs put in the same order; pairs: how many there are."""

    tau: float
    prompts: int
    concordant: float
    pairs: int


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Alarm:
    """The gains of a trained and a held-out reward, and whether they go apart for certain."""

    train: Interval
    heldout: Interval
    raised: bool


def starc_distance(a: Tensor, b: Tensor, prompts: Sequence[Hashable]) -> float:
    """The distance of two rewards up to what cannot change a choice, from 0 to 2.

    STARC (Skalse et al. 2024, arXiv 2309.15257): canonicalise, normalise, measure.
    For one choice a prompt, without states that follow, a reward is canonical when its mean over
    each prompt's pictures is 0; it is then divided by its length, and the distance is Euclidean.
    0 for a = s·b + f(prompt) with s > 0; √2 for rewards that are uncorrelated within prompts; 2
    for opposite ones. A reward that is constant within every prompt stays 0, at distance 1 from
    all others. a and b (n,) on a sample of pictures; prompts, n of them, at least one twice.
    """
    x, y = (_standardised(r, prompts) for r in _pair(a, b, prompts))
    return float((x - y).norm())


def agreement(a: Tensor, b: Tensor, prompts: Sequence[Hashable]) -> Agreement:
    """How alike two rewards rank the pictures of the same prompt. a, b (n,); n prompts.

    Of the pairs of pictures of one prompt, those in the same order (or tied in both) count 1 as
    concordant, those tied in one reward ½: a reward that is constant scores ½, whatever the other.
    """
    a, b = _pair(a, b, prompts)
    taus, points, pairs = [], 0.0, 0
    for rows in _groups(prompts):
        x, y = _order(a[rows]), _order(b[rows])
        points += float(((x == y).double() + (((x == 0) != (y == 0)) / 2)).sum())
        pairs += len(x)
        taus.append(_tau(x, y))
    found = torch.tensor(taus, dtype=torch.float64)
    if not pairs:
        raise ValueError(ALONE)
    known = found[~found.isnan()]
    return Agreement(float(known.mean()), len(known), points / pairs, pairs)


def kendall_tau(a: Tensor, b: Tensor) -> float:
    """Kendall's τ-b of a and b (n,): (C - D)/√((P - Tₐ)(P - T_b)), with P pairs of which C are
    in the same and D in opposite order, Tₐ tied in a, T_b in b. NaN where either is constant."""
    a, b = _pair(a, b, range(len(a)))
    return _tau(_order(a), _order(b))


def per_prompt(values: Tensor, prompts: Sequence[Hashable]) -> Tensor:
    """The mean (p,) of each prompt's values (n,), in the order in which prompts first occur."""
    if values.shape != (len(prompts),):
        raise ValueError(f"{len(prompts)} prompts but values of shape {tuple(values.shape)}")
    return torch.stack([values[rows].double().mean() for rows in _groups(prompts)])


def bootstrap(
    values: Tensor, generator: torch.Generator, *, samples: int = 2000, confidence: float = 0.95
) -> Interval:
    """The mean of values (p,), one a prompt, with its percentile interval over prompts."""
    values = values.detach().cpu().double()
    if values.ndim != 1 or len(values) < 2 or not values.isfinite().all():
        raise ValueError(
            f"a bootstrap needs two or more finite values, one a prompt, but got "
            f"{tuple(values.shape)}{'' if values.isfinite().all() else ', some not finite'}"
        )
    drawn = torch.randint(len(values), (samples, len(values)), generator=generator)
    tail = (1 - confidence) / 2
    means = values[drawn].mean(1)
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(float(values.mean()), low, high)


def win_rate(a: Tensor, b: Tensor, generator: torch.Generator, **options: Any) -> Interval:
    """How often a beats b, ties counting ½: a, b (p,) or (p, k), k pictures of the same seeds.

    Pairs are averaged within a prompt; the interval is `bootstrap`'s, over prompts.
    """
    if a.shape != b.shape or a.ndim not in (1, 2):
        raise ValueError(
            f"a win rate pairs values of one shape, (p,) or (p, k), but got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    if a.isnan().any() or b.isnan().any():
        raise ValueError("a win rate cannot pair NaN; leave such prompts out of both")
    wins = (a > b).double() + (a == b).double() / 2
    return bootstrap(wins.reshape(len(wins), -1).mean(1), generator, **options)


def retention(
    train_base: Tensor, train_tuned: Tensor, heldout_base: Tensor, heldout_tuned: Tensor
) -> float:
    """How much of the trained reward's gain a held-out one sees: Δz_heldout / Δz_train.

    Δz = (mean tuned - mean base)/std base, each over all values given. 1 keeps all, below 0 the
    held-out reward fell; NaN or infinite where the trained reward did not change.
    """
    pairs = ((heldout_base, heldout_tuned), (train_base, train_tuned))
    heldout, train = (_gain_in_deviations(base, tuned) for base, tuned in pairs)
    return float(heldout / train)


def hacked(train: Tensor, heldout: Tensor, patience: int = 3) -> Tensor:
    """Where the trained reward has risen while a held-out one fell, `patience` times running.

    train (t,) and heldout (t,) or (t, h), one row an evaluation in their order. Returns bool of
    heldout's shape: true at an evaluation where each of the last `patience` steps raised the
    trained reward and lowered that held-out one. A step into or out of NaN is neither.
    """
    if patience < 1 or train.ndim != 1 or heldout.ndim not in (1, 2) or len(train) != len(heldout):
        raise ValueError(
            "the alarm takes t evaluations, train (t,) and heldout (t,) or (t, h), and a patience "
            f"of 1 or more, but got {tuple(train.shape)}, {tuple(heldout.shape)} and {patience}"
        )
    rose = train.diff() > 0
    apart = rose.view(-1, *[1] * (heldout.ndim - 1)) & (heldout.diff(dim=0) < 0)
    raised = torch.zeros(heldout.shape, dtype=torch.bool, device=heldout.device)
    if len(apart) >= patience:
        raised[patience:] = apart.unfold(0, patience, 1).all(-1)
    return raised


def alarm(
    train_gain: Tensor, heldout_gain: Tensor, generator: torch.Generator, **options: Any
) -> Alarm:
    """One evaluation's alarm: raised if the trained gain is above 0 and the held-out one below,
    each by its whole bootstrap interval. Gains (p,): tuned minus base, averaged a prompt."""
    if train_gain.shape != heldout_gain.shape:
        raise ValueError(
            f"the gains are one a prompt for both rewards, but got {tuple(train_gain.shape)} and "
            f"{tuple(heldout_gain.shape)}"
        )
    train = bootstrap(train_gain, generator, **options)
    heldout = bootstrap(heldout_gain, generator, **options)
    return Alarm(train, heldout, train.low > 0 and heldout.high < 0)


def _pair(a: Tensor, b: Tensor, prompts: Sequence[Hashable]) -> tuple[Tensor, Tensor]:
    if isinstance(prompts, str) or not a.shape == b.shape == (len(prompts),):
        raise ValueError(
            f"two rewards of n pictures with n prompts are compared, but got {tuple(a.shape)}, "
            f"{tuple(b.shape)} and {len(prompts)} prompts"
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("rewards that are not finite cannot be compared; leave those pictures out")
    return a.detach().cpu().double(), b.detach().cpu().double()


def _groups(prompts: Sequence[Hashable]) -> list[Tensor]:
    """The rows of each prompt, in the order in which prompts first occur."""
    rows: dict[Hashable, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    return [torch.tensor(found) for found in rows.values()]


def _standardised(reward: Tensor, prompts: Sequence[Hashable]) -> Tensor:
    groups = _groups(prompts)
    if len(groups) == len(prompts):
        raise ValueError(ALONE)
    canonical = reward.clone()
    for rows in groups:
        values = reward[rows]
        # a mean is not exact: what is constant must come out as 0, not as rounding
        canonical[rows] = values - values.mean() if (values != values[0]).any() else 0.0
    length = canonical.norm()
    return canonical / length if length else canonical


def _order(values: Tensor) -> Tensor:
    """The sign of each of the n(n - 1)/2 differences."""
    i, j = torch.triu_indices(len(values), len(values), 1)
    return (values[i] - values[j]).sign()


def _tau(x: Tensor, y: Tensor) -> float:
    untied = (x != 0).sum().double() * (y != 0).sum()
    return float((x * y).sum() / untied.sqrt()) if untied else float("nan")


def _gain_in_deviations(base: Tensor, tuned: Tensor) -> Tensor:
    base, tuned = base.detach().cpu().double(), tuned.detach().cpu().double()
    deviation = base.std()
    if not (deviation > 0 and tuned.isfinite().all()):
        raise ValueError(
            "retention needs finite values, of which the base's are not all the same; "
            f"its standard deviation is {float(deviation):g}"
        )
    return (tuned.mean() - base.mean()) / deviation
