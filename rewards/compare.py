"""Agreement of two rewards, and detection of reward hacking in training.

Legend: n images, t evaluations, h held-out rewards; a and b (n,) are two rewards of the same
images. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Agreement", "agreement", "hacked", "kendall_tau", "per_prompt", "starc_distance"]

ALONE = "every prompt has only one image, so no two can be compared; give more"


@dataclass(frozen=True)
class Agreement:
    """How two rewards rank the images of the same prompt.

    Attributes:
        tau: Mean over prompts of Kendall's τ-b, NaN if it is defined for no prompt.
        prompts: Number of prompts for which τ-b is defined.
        concordant: Share of the pairs of images that both rewards order in the same way.
        pairs: Number of pairs of images of the same prompt.
    """

    tau: float
    prompts: int
    concordant: float
    pairs: int


def starc_distance(a: Tensor, b: Tensor, prompts: Sequence[Hashable]) -> float:
    """Return the distance of two rewards, from 0 to 2, up to changes that affect no choice.

    STARC (Skalse et al. 2024, arXiv 2309.15257) canonicalises, normalises and measures. For one
    choice per prompt, without states that follow, a reward is canonical when its mean over each
    prompt's images is 0; it is then divided by its norm, and the distance is Euclidean. It is 0
    for a = s·b + f(prompt) with s > 0, √2 for rewards that are uncorrelated within prompts, and 2
    for opposite ones. A reward that is constant within every prompt stays 0, at distance 1 from
    all others. a and b (n,) on n images with their prompts, of which one at least occurs twice.
    """
    x, y = (_standardised(r, prompts) for r in _pair(a, b, prompts))
    return float((x - y).norm())


def agreement(a: Tensor, b: Tensor, prompts: Sequence[Hashable]) -> Agreement:
    """Measure how similarly two rewards a and b (n,) rank the images of the same prompt.

    A pair of images of one prompt counts 1 if both rewards order it in the same way or both tie,
    and ½ if one of them ties, so a constant reward has ½ with any other.
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
    """Return Kendall's τ-b of a and b (n,), (C - D)/√((P - Tₐ)(P - T_b)); NaN if one is constant.

    C of the P pairs are concordant and D discordant, Tₐ tie in a and T_b in b.
    """
    a, b = _pair(a, b, range(len(a)))
    return _tau(_order(a), _order(b))


def per_prompt(values: Tensor, prompts: Sequence[Hashable]) -> Tensor:
    """Return the mean of each prompt's values (n,), in the order in which prompts first occur."""
    if values.shape != (len(prompts),):
        raise ValueError(f"{len(prompts)} prompts but values of shape {tuple(values.shape)}")
    return torch.stack([values[rows].double().mean() for rows in _groups(prompts)])


def hacked(train: Tensor, heldout: Tensor, patience: int = 3) -> Tensor:
    """Detect where the trained reward rose while a held-out one fell, `patience` times in a row.

    train (t,) and heldout (t,) or (t, h) have one row for each evaluation, in order. Returns bool
    of heldout's shape, true at an evaluation where each of the last `patience` steps raised the
    trained reward and lowered that held-out one. A step into or out of NaN does neither.
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


def _pair(a: Tensor, b: Tensor, prompts: Sequence[Hashable]) -> tuple[Tensor, Tensor]:
    if isinstance(prompts, str) or not a.shape == b.shape == (len(prompts),):
        raise ValueError(
            f"two rewards of n images with n prompts are compared, but got {tuple(a.shape)}, "
            f"{tuple(b.shape)} and {len(prompts)} prompts"
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("rewards that are not finite cannot be compared; leave those images out")
    return a.detach().cpu().double(), b.detach().cpu().double()


def _groups(prompts: Sequence[Hashable]) -> list[Tensor]:
    """Return the rows of each prompt, in the order in which prompts first occur."""
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
        # a constant must become exactly 0, which subtracting a rounded mean does not ensure
        canonical[rows] = values - values.mean() if (values != values[0]).any() else 0.0
    length = canonical.norm()
    return canonical / length if length else canonical


def _order(values: Tensor) -> Tensor:
    """Return the sign of each of the n(n - 1)/2 differences."""
    i, j = torch.triu_indices(len(values), len(values), 1)
    return (values[i] - values[j]).sign()


def _tau(x: Tensor, y: Tensor) -> float:
    untied = (x != 0).sum().double() * (y != 0).sum()
    return float((x * y).sum() / untied.sqrt()) if untied else float("nan")
