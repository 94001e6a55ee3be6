"""Comparing rewards: brute force, torchmetrics, closed forms and the published code's numbers."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.regression import kendall_rank_corrcoef

import rewards
from rewards.best_of_n import (
    best_of_n,
    choice_results,
    read_choices,
    score_choices,
    ties_score,
)
from rewards.compare import (
    agreement,
    hacked,
    kendall_tau,
    per_prompt,
    starc_distance,
)

PROMPTS = ["a", "b", "a", "c", "b", "a", "b", "a"]  # c has one image only


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_prompt(*levels: float) -> torch.Tensor:
    return torch.tensor([dict(zip("abc", levels, strict=True))[prompt] for prompt in PROMPTS])


def test_starc_does_not_see_scale_and_prompt_offsets_and_2_is_the_opposite():
    a = normal(8)
    same = 3.5 * a + by_prompt(10.0, -4.0, 100.0)
    assert starc_distance(a, same, PROMPTS) == pytest.approx(0, abs=1e-6)
    assert starc_distance(a, -same, PROMPTS) == pytest.approx(2)
    assert starc_distance(a, a, PROMPTS) == 0


def test_starc_is_the_within_prompt_correlation_in_another_scale():
    a, b = normal(8), normal(8, seed=1)
    x, y = a.clone(), b.clone()
    for prompt in "abc":
        rows = [i for i, p in enumerate(PROMPTS) if p == prompt]
        x[rows] -= x[rows].mean()
        y[rows] -= y[rows].mean()
    correlation = float(x @ y / (x.norm() * y.norm()))
    expected = math.sqrt(2 * (1 - correlation))
    assert starc_distance(a, b, PROMPTS) == pytest.approx(expected, rel=1e-5)
    assert starc_distance(b, a, PROMPTS) == pytest.approx(expected, rel=1e-5)


def test_starc_of_a_reward_without_any_preference():
    constant = by_prompt(0.1, 0.7, 0.3)
    assert starc_distance(constant, normal(8), PROMPTS) == pytest.approx(1)
    assert starc_distance(constant, constant + 1, PROMPTS) == 0


def test_starc_is_a_distance():
    a, b, c = (normal(8, seed=s) for s in range(3))
    ab, bc, ac = (starc_distance(x, y, PROMPTS) for x, y in ((a, b), (b, c), (a, c)))
    assert ac <= ab + bc


@pytest.mark.parametrize("levels", [2, 4, 100])
def test_tau_equals_torchmetrics_and_the_count_of_pairs(levels):
    a, b = (torch.randint(levels, (12,), generator=seeded(s)).float() for s in (3, 4))
    c = d = only_a = only_b = 0
    for i, j in itertools.combinations(range(12), 2):
        x, y = np.sign(float(a[i] - a[j])), np.sign(float(b[i] - b[j]))
        c, d = c + (x * y > 0), d + (x * y < 0)
        only_a, only_b = only_a + (x == 0 != y), only_b + (y == 0 != x)
    expected = (c - d) / math.sqrt((c + d + only_a) * (c + d + only_b))
    assert kendall_tau(a, b) == pytest.approx(expected)
    assert kendall_tau(a, b) == pytest.approx(
        torch.as_tensor(kendall_rank_corrcoef(a, b)).item(), abs=1e-6
    )


def test_tau_of_orders_that_are_equal_opposite_and_constant():
    a = torch.tensor([1.0, 5.0, 2.0, 2.0])
    assert kendall_tau(a, a.exp()) == pytest.approx(1)
    assert kendall_tau(a, -a) == pytest.approx(-1)
    assert math.isnan(kendall_tau(a, torch.ones(4)))


def test_agreement_looks_within_prompts_only():
    a = torch.tensor([1.0, 9.0, 2.0, 0.0, 8.0, 3.0, 7.0, 4.0])
    b = a + by_prompt(0.0, -100.0, 5.0)
    found = agreement(a, b, PROMPTS)
    assert (found.tau, found.concordant, found.pairs, found.prompts) == (1, 1, 9, 2)


def test_agreement_counts_ties_as_half_and_common_ties_as_agreement():
    a = torch.tensor([1.0, 1.0, 2.0, 3.0])
    b = torch.tensor([4.0, 4.0, 4.0, 1.0])
    # pairs 01 tied in both, 02 and 12 tied in b, 03 13 23 opposite
    found = agreement(a, b, ["p"] * 4)
    assert found.concordant == pytest.approx((1 + 0.5 + 0.5) / 6)
    assert found.tau == pytest.approx(kendall_tau(a, b))
    constant = agreement(a, torch.ones(4), ["p"] * 4)
    assert constant.concordant == pytest.approx((1 + 5 / 2) / 6)
    assert constant.prompts == 0
    assert math.isnan(constant.tau)
    assert agreement(a, a, ["p"] * 4).concordant == 1


def test_a_reward_agrees_by_half_with_chance():
    a, b = normal(4000), normal(4000, seed=1)
    found = agreement(a, b, [i // 4 for i in range(4000)])
    assert found.pairs == 6000
    assert abs(found.concordant - 0.5) < 4 * 0.5 / math.sqrt(2000)  # 2 independent pairs a prompt
    assert abs(found.tau) < 4 * 0.5 / math.sqrt(1000)


def test_best_of_n_shares_the_point_among_the_highest():
    assert best_of_n(torch.tensor([3.0, 1.0, 2.0])) == 1
    assert best_of_n(torch.tensor([3.0, 3.0, 3.0, 2.0])) == pytest.approx(1 / 3)
    assert best_of_n(torch.tensor([1.0, 3.0])) == 0


TIES: list[tuple[str, int, list[float]]] = [
    ("ref:0", 1, [5.0, 4.75, 2.0]),
    ("tied:0", 3, [5.0, 4.5, 4.75, 2.0, 1.0]),
    ("ref:1", 1, [1.0, 3.0]),
    ("tied:1", 2, [4.0, 2.0, 1.5]),
    ("ref:2", 1, [2.5, 2.25]),
    ("tied:2", 2, [3.0, 3.0, 1.0, 2.0]),
    ("ref:3", 1, [2.0, 1.0]),
    ("tied:3", 2, [2.0, 2.0, 2.0]),
    ("ref:4", 1, [7.0, 1.0]),
    ("tied:5", 2, [1.0, 0.0, 9.0]),
]


def ties(kind: str) -> dict[str, Any]:
    named = [(id.partition(":"), k, torch.tensor(s)) for id, k, s in TIES]
    return {number: (s[:k], s[k:]) for (found, _, number), k, s in named if found == kind}


def test_the_ties_score_is_the_published_one():
    # printed by process_single_model of allenai/reward-bench, commit a009692, for TIES
    assert ties_score(ties("ref"), ties("tied")) == pytest.approx(0.5689346381566605, abs=1e-12)


def test_a_perfect_ties_score_is_101_percent():
    perfect = {"0": (torch.tensor([9.0, 9.0]), torch.tensor([0.0]))}
    assert ties_score({"0": (torch.tensor([9.0]), torch.tensor([0.0]))}, perfect) == pytest.approx(
        1.01
    )


def test_files_of_choices_are_read_scored_and_summed_up_by_subset(tmp_path):
    for level in range(0, 250, 5):
        Image.new("RGB", (4 + level % 3, 5), (level,) * 3).save(tmp_path / f"{level}.png")
    lines: list[dict[str, Any]] = [
        {"prompt": "a\u2028b", "chosen": "50.png", "rejected": ["10.png", "20.png"], "subset": "x"},
        {"prompt": "a", "chosen": ["50.png"], "rejected": ["50.png", "20.png"], "subset": "x"},
        {"prompt": "a", "chosen": ["50.png"], "rejected": ["60.png"], "subset": "y", "more": 1},
    ]
    for id, k, scores in TIES:
        paths = [f"{round(20 * score)}.png" for score in scores]
        lines.append(
            {
                "prompt": "t",
                "chosen": paths[:k],
                "rejected": paths[k:],
                "subset": "Ties",
                "id": id,
            }
        )
    file = tmp_path / "choices.jsonl"
    file.write_text(
        "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8"
    )
    choices = read_choices(file)
    assert len(choices) == 13
    assert choices[0].prompt == "a\u2028b"
    reward = rewards.load(lambda images, prompts: images.mean((1, 2, 3)) * 255 / 20)
    scores = score_choices(reward, choices, tmp_path)
    results = choice_results(choices, scores)
    assert results["x"] == pytest.approx((1 + 1 / 2) / 2)
    assert results["y"] == 0
    assert results["ties"] == pytest.approx(0.5689346381566605, abs=1e-5)


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "a", "chosen": "x"}',
        '{"prompt": "a", "chosen": "x", "rejected": []}',
        '{"prompt": "a", "chosen": [], "rejected": ["y"]}',
        '{"prompt": "a", "chosen": "x", "rejected": "y"}',
        '{"prompt": 1, "chosen": "x", "rejected": ["y"]}',
        '["a", "x", "y"]',
        "a,x,y",
    ],
)
def test_a_broken_line_of_choices_is_named(tmp_path, line):
    file = tmp_path / "choices.jsonl"
    file.write_text('{"prompt": "a", "chosen": "x", "rejected": ["y"]}\n' + line)
    with pytest.raises(ValueError, match=r"choices\.jsonl, line 2"):
        read_choices(file)


def test_values_are_averaged_a_prompt_in_the_order_of_the_prompts():
    values = torch.tensor([1.0, 10.0, 2.0, 7.0, 20.0, 3.0, 30.0, 6.0])
    assert per_prompt(values, PROMPTS).tolist() == [3, 20, 7]


def test_the_alarm_rings_when_rewards_go_apart_for_long_enough():
    train = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 4.0, 5.0, 6.0])
    held = torch.tensor([5.0, 4.0, 3.0, 2.0, 3.0, 2.0, 1.0, 0.0])
    #  apart:                  1    1    1    0    0    1    1
    assert hacked(train, held, 2).nonzero().flatten().tolist() == [2, 3, 7]
    assert hacked(train, held, 3).nonzero().flatten().tolist() == [3]
    assert not hacked(train, held, 4).any()
    assert not hacked(train, held, 20).any()
    both = hacked(train, torch.stack([held, train], 1), 2)
    assert torch.equal(both[:, 0], hacked(train, held, 2))
    assert not both[:, 1].any()
    assert not hacked(-train, held, 1)[[1, 2, 3]].any()  # both fall: no hacking
    assert not hacked(train[:1], held[:1]).any()
    held[2] = float("nan")
    assert hacked(train, held, 1).nonzero().flatten().tolist() == [1, 6, 7]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: starc_distance(normal(3), normal(3), ["a", "b", "c"]), "only one image"),
        (lambda: agreement(normal(3), normal(3), ["a", "b", "c"]), "only one image"),
        (lambda: starc_distance(normal(3), normal(4), ["a"] * 3), "3 prompts"),
        (lambda: starc_distance(normal(3), normal(3), "abc"), "3 prompts"),
        (lambda: agreement(normal(3) / 0, normal(3), ["a"] * 3), "not finite"),
        (lambda: best_of_n(torch.tensor([1.0, float("nan")])), "finite scores"),
        (lambda: best_of_n(torch.tensor([1.0])), "two or more"),
        (lambda: ties_score({"1": ([1.0], [0.0])}, {"2": ([1.0], [0.0])}), "found none"),
        (lambda: ties_score({"1": ([1.0], [])}, {"1": ([1.0], [0.0])}), "correct and a wrong"),
        (lambda: hacked(normal(3), normal(4)), "patience"),
        (lambda: hacked(normal(3), normal(3), 0), "patience"),
        (lambda: per_prompt(normal(3), ["a"]), "1 prompts"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_ties_need_their_ids_and_other_subsets_one_chosen_picture(tmp_path):
    file = tmp_path / "choices.jsonl"
    entry = {"prompt": "p", "chosen": ["a", "b"], "rejected": ["c"]}
    file.write_text(json.dumps(entry))
    with pytest.raises(ValueError, match="2 chosen images"):
        choice_results(read_choices(file), [normal(3)])
    file.write_text(json.dumps(entry | {"subset": "Ties", "id": "7"}))
    with pytest.raises(ValueError, match="ref:NUMBER"):
        choice_results(read_choices(file), [normal(3)])
