"""Peers' objectives against numbers of their published code on the same tensors.

The numbers were computed once, by the functions of Flow-GRPO, Flow-CPS, DanceGRPO, GRPO-Guard,
DiffusionNFT and AWM, in float32. Schedule: SD3's in ten steps (shift 3).
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from finetune import lora, nft
from finetune.awm import Awm
from finetune.chains import Schedule
from finetune.grpo import mean_log_prob
from finetune.nft import Nft, Rows
from finetune.noising import Noising
from finetune.policy_losses import (
    group_advantages,
    guarded_log_ratio,
    matching_score,
    nft_loss,
    policy_loss,
)
from tilt.commands.train_adversarial import OPTIONS
from tilt.idle_settings import check_adversarial

NOW = [1, 0.9601293, 0.913349, 0.8576923, 0.7903683, 0.7072785, 0.6021506, 0.464876, 0.2780488]
SIGMAS = torch.tensor([*NOW, 0.008928572, 0])
FLOW = Noising("velocity", 1000)


def wave(scale: float, shift: float) -> torch.Tensor:
    return torch.sin(scale * torch.arange(24.0) + shift).view(2, 2, 2, 3)


X, V, Y = wave(1.0, 0.0), torch.cos(1.7 * torch.arange(24.0)).view(2, 2, 2, 3), wave(0.9, 0.3)
CPS = math.sin(0.8 * math.pi / 2)  # the published level 0.8 as our fraction
LEVEL = {"flow": 0.7, "dance": 0.3, "cps": CPS}
# of each kind and step: the mean of the first six elements, the standard deviation, and the
# log-density of Y per element of each image (of cps the squared error, with a minus)
MOVES = {
    ("flow", 0): (
        [-0.03987068, 0.6404477, 0.7250665, 0.09147537, -0.6060494, -0.6999853],
        0.6999999,
        [-0.6522155, -1.352775],
    ),
    ("flow", 4): (
        [-0.1034468, 0.7730857, 0.9210091, 0.08831546, -0.773247, -0.8035285],
        0.3917942,
        [-0.2564633, -2.923073],
    ),
    ("flow", 8): (
        [-0.3350547, 0.8077909, 1.150183, 0.001588449, -0.9789808, -0.6696407],
        0.2253605,
        [-0.7721379, -9.40991],
    ),
    ("dance", 0): (
        [-0.03987068, 0.8450984, 0.9462129, 0.1257966, -0.7901081, -0.9332012],
        0.3 * math.sqrt(1 - 0.9601293),
        [-10.19132, -132.272],
    ),
    ("dance", 4): (
        [-0.08408149, 0.8483236, 0.9862856, 0.1086714, -0.8263225, -0.9037698],
        0.3 * math.sqrt(0.7903683 - 0.7072785),
        [-4.451432, -63.62195],
    ),
    ("dance", 8): (
        [-0.3005648, 0.8435468, 1.160278, 0.02136662, -0.9851503, -0.7362148],
        0.3 * math.sqrt(0.2780488 - 0.008928572),
        [-1.732317, -20.42772],
    ),
    ("cps", 0): (
        [-0.03987068, 0.2883484, 0.3445863, 0.03242608, -0.2893782, -0.2987396],
        0.9131373,
        [-0.2290287, -0.5827059],
    ),
    ("cps", 4): (
        [-0.1855404, 0.4541354, 0.6442881, 0.002021976, -0.5482484, -0.3785838],
        0.6726618,
        [-0.1550347, -0.6916469],
    ),
    ("cps", 8): (
        [-0.2735743, 0.8715281, 1.168179, 0.03684428, -0.9899782, -0.7883132],
        0.008491577,
        [-0.126201, -1.053982],
    ),
}


def close(found: torch.Tensor, expected: object, rtol: float = 1e-4) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(found.float(), expected, rtol=rtol, atol=2e-7)


def schedule_of(sde: str) -> Schedule:
    return Schedule(FLOW, (2, 2, 3), SIGMAS[:-1], SIGMAS[:-1], SIGMAS[1:], sde)


@pytest.mark.parametrize(("sde", "step"), MOVES)
def test_moves_and_their_densities_are_the_published_ones(sde, step):
    mean, std, scores = MOVES[sde, step]
    move = schedule_of(sde).transition(step, V, X, LEVEL[sde])
    close(move.mean[0, 0].flatten(), mean)
    close(move.std, std)
    error = (move.mean - Y).square().flatten(1).mean(1)
    close(-error if sde == "cps" else mean_log_prob(move, Y), scores)


def test_the_options_of_the_published_forms_are_read_and_each_has_an_effect():
    page = (Path(__file__).parents[1] / "docs" / "adversarial.md").read_text(encoding="utf-8")
    table = page.split("| published code | options |")[1].split("\n\n")[0]
    rows = [line.split("`")[1].split() for line in table.splitlines() if "`" in line]
    assert len(rows) == 6
    for words in rows:
        check_adversarial(OPTIONS.read(words))


def docs_row(name: str) -> list[float]:
    """A row of numbers of the docs' table of gradients."""
    page = (Path(__file__).parents[1] / "docs" / "adversarial.md").read_text(encoding="utf-8")
    (line,) = (line for line in page.splitlines() if line.startswith(f"| {name} |"))
    return [float(cell) for cell in line.split("|")[2:-1]]


@pytest.mark.parametrize(
    ("row", "sde", "noise", "by"),
    [
        ("Flow-CPS, `--grpo.ratio density`", "cps", 0.951, lambda std, h: 1 / std),
        ("Flow-CPS, `--grpo.ratio error`", "cps", 0.951, lambda std, h: 2 * std),
        ("Flow-GRPO, `--grpo.ratio density`", "flow", 0.7, lambda std, h: 1 / std),
        ("Flow-GRPO, `--grpo.ratio guard`", "flow", 0.7, lambda std, h: 1 / h),
    ],
)
def test_the_gradients_in_the_docs_are_these(row, sde, noise, by):
    """∇ of the score by v, per unit of noise and element: |∂μ/∂v| times 1/σ, 2σ or 1/h."""
    schedule, zero = schedule_of(sde), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    found = []
    for step in range(0, 9, 2):
        move = schedule.transition(step, zero + 1, zero, noise)
        h = float(schedule.now[step] - schedule.after[step])
        found.append(float(move.mean.abs()) * by(float(move.std), h))
    assert found == pytest.approx(docs_row(row), abs=6e-4)


def test_the_factor_that_flow_cps_leaves_out_grows_to_6934():
    schedule = schedule_of("cps")
    factors = [1 / (2 * float(schedule.transition(step, V, X, CPS).std) ** 2) for step in range(9)]
    assert factors[0] == pytest.approx(0.60, abs=0.005)
    assert factors[-1] == pytest.approx(6934, abs=1)
    assert factors == sorted(factors)


def test_divergences_are_the_published_ones():
    """Flow-GRPO's code divides |μ - μ_ref|² by 2σ_t² instead of by 2σ_t² Δt, so ours by Δt."""
    schedule = schedule_of("flow")
    move, ref = (schedule.transition(4, v, X, 0.7) for v in (V, 0.5 * V))
    apart = (move.mean - ref.mean).square().flatten(1).mean(1)
    ours = apart / (2 * move.std.square())
    close(ours * 0.08308977, [0.0003921075, 0.0003321629])
    close((0.5 * V).square().flatten(1).mean(1), [0.1353848, 0.1146875])


def test_the_ratio_of_grpo_guard_is_the_published_one():
    schedule = schedule_of("flow")
    move, old = (schedule.transition(4, v, X, 0.7) for v in (V, 0.5 * V))
    now, before = mean_log_prob(move, Y), mean_log_prob(old, Y)
    close((now - before).exp(), [0.9882885, 0.9461967])
    log_ratio = guarded_log_ratio(now, before, move.mean, old.mean, move.std)
    close(log_ratio.exp(), [0.9972371, 0.9800988])
    loss = policy_loss(log_ratio, torch.zeros(2), torch.tensor([1.5, -0.5]), clip=1e-4)
    close(loss / (SIGMAS[4] - SIGMAS[5]), [-18.00289, 6.016987])


PRED, OLD, TARGET = wave(1.0, 0.0), wave(0.8, 0.2), wave(1.3, 0.5)
T, ADVANTAGES = torch.tensor([0.3, 0.8]), torch.tensor([2.0, -5.0])
NFT = {  # by beta: the loss times the clip 5, and the first column of its gradient
    1.0: (
        [2.123132, 10.52809],
        [-0.07668805, -0.01425686, 0.08531203, -0.06616963, 0.4536615, 0.9551269],
    ),
    0.1: (
        [19.13195, 58.03377],
        [-0.0421421, -0.01699752, 0.1177262, -0.02458953, 0.04858336, 0.7251042],
    ),
}


@pytest.mark.parametrize("beta", NFT)
def test_the_adaptive_weight_of_diffusion_nft_is_the_published_one(beta):
    pred = PRED.clone().requires_grad_()
    settings = Nft(beta=beta, adaptive=True)
    loss, _ = settings.loss(FLOW, Rows(T, pred, OLD, TARGET, ADVANTAGES))
    close(loss.detach(), NFT[beta][0])
    (gradient,) = torch.autograd.grad(loss.sum(), pred)
    close(gradient[:, 0, 0].flatten(), NFT[beta][1])


AWM = {  # by (power, time_power): the scores, ratios to the old policy, and losses
    (1.0, 0.0): ([-1.373539, -0.4262888], [0.7198387, 1.849309], [-0.2879355, 1.849309]),
    (1.0, 1.0): ([-0.4120617, -0.341031], [0.9060884, 1.635338], [-0.3624353, 1.635338]),
    (1.0, 2.0): ([-0.1236185, -0.2728248], [0.9708478, 1.482129], [-0.3883391, 1.482129]),
    (0.25, 1.0): ([-1.295302, -2.575568], [0.9177101, 1.909228], [-0.3670841, 1.909228]),
}


@pytest.mark.parametrize(("power", "time_power"), AWM)
def test_advantage_weighted_matching_is_the_published_one(power, time_power):
    scores, ratios, losses = AWM[power, time_power]
    close(matching_score(PRED, TARGET, T, power=power, time_power=time_power), scores)
    settings = Awm(power=power, time_power=time_power)
    loss, seen = settings.loss(FLOW, Rows(T, PRED, OLD, TARGET, ADVANTAGES))
    close(seen["ratio"], ratios)
    close(loss, losses)


def test_the_huber_form_of_advantage_weighted_matching_is_half_of_power_one_half():
    found = matching_score(PRED, TARGET, T, power=0.5, time_power=1.0)
    close(found / 2, [-0.3515912, -0.5223184])


REWARDS = torch.tensor([[0.1, 0.4, 0.4, 0.9], [1.0, 0.2, 0.3, 0.7], [0.5, 0.5, 0.5, 0.5]])
BY_GROUP = [-1.218119, -0.1740171, -0.1740171, 1.566154, 1.405125, -1.092875, -0.780625, 0.468375]
BY_ALL = [-1.390207, -0.1986009, -0.1986009, 1.787408, 1.787408, -1.390207, -0.9930047, 0.5958028]


@pytest.mark.parametrize(("spread", "expected"), [("group", BY_GROUP), ("global", BY_ALL)])
@pytest.mark.parametrize("kept", [None, torch.ones(3, 4, dtype=torch.bool)])
def test_advantages_by_the_populations_deviation_are_the_published_ones(spread, expected, kept):
    found = group_advantages(REWARDS, spread=spread, population=True, kept=kept)
    close(found.flatten(), [*expected, 0, 0, 0, 0])
    sample = group_advantages(REWARDS, spread=spread, eps=0.0)
    whole = group_advantages(REWARDS, spread=spread, eps=0.0, population=True)
    count = 4 if spread == "group" else 12
    torch.testing.assert_close(sample[:2] * math.sqrt(count / (count - 1)), whole[:2])


def test_averages_follow_the_published_laws():
    """Decay min((1 + s)/(10 + s), 0.9) of Flow-GRPO and NFT, min(s/1000, 0.5) of NFT's old policy.

    The weights are s modulo 7.
    """
    weights = {"w": nn.Parameter(torch.zeros(1))}
    average = lora.Average(weights, 0.9)
    seen = {}
    for step in range(1, 121):
        weights["w"].data.fill_(float(step % 7))
        average.update(weights)
        seen[step] = float(average.weights["w"])
    published = {1: 0.818182, 2: 1.704545, 3: 2.601399, 10: 2.376786, 79: 2.780321, 120: 2.868236}
    assert {step: seen[step] for step in published} == pytest.approx(published, abs=1e-5)
    laws = [min(0.5, nft.slowly(step)) for step in (1, 2, 100, 500, 600)]
    assert laws == [0.001, 0.002, 0.1, 0.5, 0.5]


def test_without_the_adaptive_weight_nft_is_the_papers():
    loss, _ = Nft(beta=0.4).loss(FLOW, Rows(T, PRED, OLD, TARGET, ADVANTAGES))
    good = ADVANTAGES / 10 + 0.5
    assert torch.equal(loss, nft_loss(PRED, OLD, TARGET, good, beta=0.4))
