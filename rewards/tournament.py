"""Ranks from a pairwise judge by seeded single elimination, in about 2n comparisons.

ArenaRL (Zhang et al. 2026, arXiv 2601.06487; `single_elimination.py` of Alibaba-NLP/qqr).
Legend: n contestants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Standing", "bracket", "tournament"]

# m ordered pairs of contestants -> (m, 2) scores, of the first and of the second of each
Judge = Callable[[list[tuple[int, int]]], Tensor]


@dataclass(frozen=True)
class Standing:
    """ranks (n,), 0 for the champion; rewards (n,) = 1 - rank/(n - 1); how many pairs were
    judged, each in both orders."""

    ranks: Tensor
    rewards: Tensor
    comparisons: int


@dataclass
class _Arena:
    """Asks each pair once, in both orders, and keeps every contestant's points."""

    judge: Judge
    points: list[list[float]]
    known: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)

    def compare(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[float, float]]:
        """The scores of both of each pair, averaged over the two orders."""
        new = [pair for pair in pairs if pair not in self.known]
        if new:
            asked = [*new, *[(j, i) for i, j in new]]
            scores = torch.as_tensor(self.judge(asked)).detach().cpu().double()
            if scores.shape != (len(asked), 2) or not scores.isfinite().all():
                raise ValueError(
                    f"the pairwise judge must give finite scores of shape ({len(asked)}, 2), of "
                    f"the first and second of each pair, but gave {tuple(scores.shape)}"
                    f"{'' if scores.isfinite().all() else ', some not finite'}"
                )
            there, back = scores[: len(new)], scores[len(new) :].flip(1)
            for (i, j), (x, y) in zip(new, ((there + back) / 2).tolist(), strict=True):
                self.known[i, j], self.known[j, i] = (x, y), (y, x)
        return [self.known[pair] for pair in pairs]

    def average(self, i: int) -> float:
        return sum(self.points[i]) / len(self.points[i])


def tournament(judge: Judge, n: int, anchor: int = 0) -> Standing:
    """Rank n ≥ 2 contestants by a seeded single elimination.

    Everybody first meets the anchor (ArenaRL: the greedy sample), and the scores seed a bracket
    in which the best meet last; the anchor's seed is the mean of its scores. The loser of a
    match is out; of a draw, the lower in the bracket. Ranks follow the round of leaving, within
    one round the average of all points. Each pair is judged in both orders, which are averaged,
    so that a judge who prefers the first gains it nothing; all pairs of a round are asked in one
    call. Where n is no power of 2 the best seeds have byes (the published code closes the gaps
    of the bracket instead).

    Args: judge, m ordered pairs -> (m, 2) scores of first and second, on any scale.
    Raises ValueError where a score is not finite: a judge that fails has no say.
    """
    if n < 2 or not 0 <= anchor < n:
        raise ValueError(f"a tournament needs n >= 2 and an anchor below n, but got {n}, {anchor}")
    arena = _Arena(judge, [[] for _ in range(n)])
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
    """Seeds 0, 1, ... in the order of the first round, so that 0 and 1 can meet in the final only.

    As many as the next power of 2; those from n on are byes.
    """
    seeds = [0]
    while len(seeds) < n:
        size = 2 * len(seeds)
        seeds = [s for seed in seeds for s in (seed, size - 1 - seed)]
    return seeds


def _round(arena: _Arena, alive: list[int | None]) -> tuple[list[int | None], list[int]]:
    """One round of neighbours: who goes on, in order, and who leaves."""
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
