"""Tournaments: the published code's ranks, a judge who knows, and one who prefers the first."""

from __future__ import annotations

import math

import pytest
import torch

from rewards.tournament import bracket, tournament

# scores of the first and second of each ordered pair of 8, and the ranks that
# single_elimination.py of Alibaba-NLP/qqr (commit 944a2e2) gives them
TABLE = """
1300313130010310 2120212030201220 3311320211133121 1001001332102332
1113001302001312 3001323321021332 3103113200223333 1330222003311130
"""
PUBLISHED = [6, 0, 3, 1, 7, 4, 2, 5]


def knowing(strengths: list[float], asked: list[list[tuple[int, int]]] | None = None):
    """A judge who sees the true strengths; every call is noted."""

    def judge(pairs):
        if asked is not None:
            asked.append(pairs)
        return torch.tensor([[strengths[i], strengths[j]] for i, j in pairs])

    return judge


def test_ranks_are_those_of_the_published_code():
    scores = torch.tensor([int(c) for c in "".join(TABLE.split())]).view(8, 8, 2).double()
    found = tournament(lambda pairs: torch.stack([scores[pair] for pair in pairs]), 8)
    assert found.ranks.tolist() == PUBLISHED


@pytest.mark.parametrize(
    ("n", "seeds"),
    [(2, [0, 1]), (4, [0, 3, 1, 2]), (8, [0, 7, 3, 4, 1, 6, 2, 5])],
)
def test_a_bracket_keeps_the_best_apart(n, seeds):
    assert bracket(n) == seeds
    assert bracket(n - 1) == (seeds if n > 2 else [0])


@pytest.mark.parametrize("n", range(2, 18))
def test_a_judge_who_knows_ranks_all_by_strength(n):
    strengths = torch.randperm(n, generator=torch.Generator().manual_seed(n)).double().tolist()
    for anchor in (0, n - 1):
        found = tournament(knowing(strengths), n, anchor)
        order = sorted(range(n), key=lambda i: -strengths[i])
        assert found.ranks[order[0]] == 0
        assert found.ranks[order[1]] == 1
        assert sorted(found.ranks.tolist()) == list(range(n))
        if n & (n - 1) == 0:  # with byes a round of losers has several strengths
            assert found.ranks.argsort().tolist() == order
        torch.testing.assert_close(found.rewards, 1 - found.ranks / (n - 1))


@pytest.mark.parametrize("n", [2, 3, 5, 8, 13])
def test_a_round_is_asked_at_once_each_pair_once_in_both_orders(n):
    asked: list[list[tuple[int, int]]] = []
    found = tournament(knowing([float(i) for i in range(n)], asked), n)
    assert len(asked) <= 1 + math.ceil(math.log2(n))
    pairs = [pair for call in asked for pair in call]
    assert len(set(pairs)) == len(pairs)
    assert {(j, i) for i, j in pairs} == set(pairs)
    assert found.comparisons == len(pairs) // 2 <= 2 * (n - 1)


def test_preferring_the_first_changes_nothing():
    strengths = [3.0, 1.0, 4.0, 1.5, 5.0, 9.0, 2.0, 6.0]
    fair = tournament(knowing(strengths), 8)

    def partial(pairs):
        return knowing(strengths)(pairs) + torch.tensor([100.0, 0.0])

    assert torch.equal(tournament(partial, 8).ranks, fair.ranks)


def test_the_best_seeds_have_the_byes():
    asked: list[list[tuple[int, int]]] = []
    tournament(knowing([5.0, 4.0, 3.0, 2.0, 1.0, 0.0], asked), 6)
    first_round = {frozenset(pair) for pair in asked[1]}
    assert first_round == {frozenset((3, 4)), frozenset((2, 5))}


def test_a_lucky_weak_contestant_is_caught_in_the_bracket():
    # 3 beats the anchor by far, so it is the first seed, and then loses to everybody
    def judge(pairs):
        rows = []
        for i, j in pairs:
            if {i, j} == {0, 3}:
                rows.append([9.0, 0.0] if i == 3 else [0.0, 9.0])
            else:
                strengths = [0.0, 2.0, 3.0, 1.0]
                rows.append([strengths[i], strengths[j]])
        return torch.tensor(rows)

    assert tournament(judge, 4).ranks[2] == 0


@pytest.mark.parametrize(
    ("judge", "n", "message"),
    [
        (knowing([1.0]), 1, "n >= 2"),
        (lambda pairs: torch.zeros(len(pairs)), 4, "shape"),
        (lambda pairs: torch.full((len(pairs), 2), math.nan), 4, "not finite"),
    ],
)
def test_a_judge_that_fails_has_no_say(judge, n, message):
    with pytest.raises(ValueError, match=message):
        tournament(judge, n)
