"""Ranks by pairwise comparisons: seeded single elimination, in about 2n comparisons.

ArenaRL (Zhang et al. 2026, arXiv 2601.06487; `single_elimination.py` of Alibaba-NLP/qqr).
Legend: n contestants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Standing", "bracket", "tournament"]

# m ordered pairs of contestants -> scores (m, 2) of the first and the second of each pair
ComparePairs = Callable[[list[tuple[int, int]]], Tensor]


@dataclass(frozen=True)
class Standing:
    """The result of a tournament.

    Attributes:
        ranks: (n,), 0 for the winner.
        rewards: (n,), 1 - rank/(n - 1).
        comparisons: Number of pairs that were compared, each in both orders.
    """

    ranks: Tensor
    rewards: Tensor
    comparisons: int


@dataclass
class _Arena:
    """Compares each pair once, in both orders, and keeps every contestant's points."""

    compare_pairs: ComparePairs
    points: list[list[float]]
    known: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)

    def compare(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[float, float]]:
        """Return the scores of both of each pair, averaged over the two orders."""
        new = [pair for pair in pairs if pair not in self.known]
        if new:
            asked = [*new, *[(j, i) for i, j in new]]
            scores = torch.as_tensor(self.compare_pairs(asked)).detach().cpu().double()
            if scores.shape != (len(asked), 2) or not scores.isfinite().all():
                raise ValueError(
                    f"compare_pairs must return finite scores of shape ({len(asked)}, 2), of "
                    f"the first and second of each pair, but returned {tuple(scores.shape)}"
                    f"{'' if scores.isfinite().all() else ', some not finite'}"
                )
            there, back = scores[: len(new)], scores[len(new) :].flip(1)
            for (i, j), (x, y) in zip(new, ((there + back) / 2).tolist(), strict=True):
                self.known[i, j], self.known[j, i] = (x, y), (y, x)
        return [self.known[pair] for pair in pairs]

    def average(self, i: int) -> float:
        return sum(self.points[i]) / len(self.points[i])


def tournament(compare_pairs: ComparePairs, n: int, anchor: int = 0) -> Standing:
    """Rank n ≥ 2 contestants by a seeded single elimination.

    Every contestant is first compared with the anchor (in ArenaRL, the greedy sample), and these
    scores seed a bracket in which the best meet last; the anchor's seed is its mean score. The
    loser of a match is eliminated, and of a draw the lower in the bracket. Ranks follow the round
    of elimination and, within one round, the average of all points. Each pair is compared in both
    orders, whose scores are averaged, so a preference for the first has no effect. All pairs of a
    round are passed in one call. If n is not a power of 2 the best seeds have byes; the published
    code closes the gaps of the bracket instead.

    Args:
        compare_pairs: Maps m ordered pairs of contestants to scores (m, 2), on any scale.
        n: Number of contestants.
        anchor: The contestant that all others are compared with first.

    Raises ValueError if a score is not finite.
    """
    if n < 2 or not 0 <= anchor < n:
        raise ValueError(f"a tournament needs n >= 2 and an anchor below n, but got {n}, {anchor}")
    arena = _Arena(compare_pairs, [[] for _ in range(n)])
    others = [i for i in range(n) if i != anchor]
    met = arena.compare([(i, anchor) for i in others])
    for i, (mine, _) in zip(others, met, strict=True):
        arena.points[i].append(mine)
    arena.points[anchor].append(sum(score for _, score in met) / len(met))
    seeds = sorted(range(n), key=lambda i: -arena.average(i))
    alive = [seeds[s] if s < n else None for s in bracket(n)]
    rounds: list[list[int]] = []
    while len(alive) > 1:
        alive, losers = _round(arena, alive)
        rounds.append(losers)
    order = [i for i in alive if i is not None]
    for losers in reversed(rounds):
        order += sorted(losers, key=lambda i: -arena.average(i))
    ranks = torch.tensor(order).argsort()
    return Standing(ranks, 1 - ranks.float() / (n - 1), len(arena.known) // 2)


def bracket(n: int) -> list[int]:
    """Seeds 0, 1, ... in the order of the first round, such that 0 and 1 meet in the final only.

    There are as many as the next power of 2; those from n on are byes.
    """
    seeds = [0]
    while len(seeds) < n:
        size = 2 * len(seeds)
        seeds = [s for seed in seeds for s in (seed, size - 1 - seed)]
    return seeds


def _round(arena: _Arena, alive: list[int | None]) -> tuple[list[int | None], list[int]]:
    """Return one round of matches between neighbours: the winners, in order, and the losers."""
    matches = list(zip(alive[::2], alive[1::2], strict=True))
    pairs = [(i, j) for i, j in matches if i is not None and j is not None]
    results = dict(zip(pairs, arena.compare(pairs), strict=True))
    winners: list[int | None] = []
    losers: list[int] = []
    for i, j in matches:
        if i is None or j is None:
            winners.append(j if i is None else i)
            continue
        x, y = results[i, j]
        arena.points[i].append(x)
        arena.points[j].append(y)
        winners.append(i if x >= y else j)
        losers.append(j if x >= y else i)
    return winners, losers
