"""The noising of training against diffusers' own schedulers, and its weights in closed form."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from tiny_pipelines import family

from finetune.noising import Noising, noising_of


@pytest.mark.parametrize("name", ["sd", "sd2"])
def test_noising_with_betas_is_the_schedulers(name):
    pipe, _ = family(name)
    noising = noising_of(pipe)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 4, 8, 8, generator=generator)
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.9999])
    at = noising.timesteps(t)
    x, target = noising.noised(x0, noise, t)
    stock: Any = DDPMScheduler.from_config(pipe.scheduler.config)
    torch.testing.assert_close(x, stock.add_noise(x0, noise, at), atol=1e-5, rtol=1e-5)
    velocity = noising.prediction == "v_prediction"
    wanted = stock.get_velocity(x0, noise, at) if velocity else noise
    torch.testing.assert_close(target, wanted, atol=1e-5, rtol=1e-5)


def test_noising_of_a_flow_is_the_schedulers():
    pipe, _ = family("sd3")
    noising = noising_of(pipe)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    stock = copy.deepcopy(pipe.scheduler)
    at = stock.timesteps[[10, 500, 900]]
    t = stock.sigmas[[10, 500, 900]]
    x, target = noising.noised(x0, noise, t)
    torch.testing.assert_close(x, stock.scale_noise(x0, at, noise))
    torch.testing.assert_close(target, noise - x0)
    torch.testing.assert_close(noising.timesteps(t), at, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_likelihood_weight_makes_the_score_the_exact_log_ratio(prediction):
    """Two Gaussian models N(m, v) and N(m + shift, v) seen through a schedule with betas."""
    steps, m, v, shift = 4000, 0.3, 0.7, 0.25
    # from almost clean to almost noise, the log signal-to-noise ratio linear in t
    kept = torch.linspace(9, -9, steps, dtype=torch.float64).sigmoid()
    noising = Noising(prediction, steps, kept)
    t = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    nodes, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(12))
    x0 = torch.tensor([-1.0, 0.2, 1.7], dtype=torch.float64)
    signal, spread = kept.sqrt()[:, None, None], (1 - kept).sqrt()[:, None, None]

    def model(x, mean):  # E[x0 | x], then what the network is asked for
        clean = mean + signal * v / (signal**2 * v + spread**2) * (x - signal * mean)
        noise = (x - signal * clean) / spread
        return {
            "epsilon": noise,
            "v_prediction": signal * noise - spread * clean,
            "sample": clean,
        }[prediction]

    x = signal * x0[None, :, None] + spread * nodes
    target = {
        "epsilon": nodes.expand_as(x),
        "v_prediction": signal * nodes - spread * x0[None, :, None],
        "sample": x0[None, :, None].expand_as(x),
    }[prediction]
    score = (target - model(x, m)) ** 2 - (target - model(x, m + shift)) ** 2
    by_noise = (score * weights).sum(-1) / weights.sum()
    total = (noising.elbo_weight(t)[:, None] * by_noise).mean(0)
    wanted = shift * (x0 - m) / v - shift**2 / (2 * v)
    torch.testing.assert_close(total, wanted, atol=2e-3, rtol=2e-3)  # what the ends leave out


def test_the_velocity_weight_makes_one_error_cost_the_same_whatever_is_predicted():
    kept = torch.linspace(9, -9, 100, dtype=torch.float64).sigmoid()
    generator = torch.Generator().manual_seed(0)
    t, x0, noise, wrong = torch.rand(4, 7, 1, generator=generator, dtype=torch.float64)
    cost = {}
    for kind in ("epsilon", "v_prediction", "sample"):
        noising = Noising(kind, 100, kept)
        _, target = noising.noised(x0, noise, t[:, 0])
        x, _ = noising.noised(x0, noise, t[:, 0])
        signal = kept[noising.timesteps(t[:, 0])].sqrt()[:, None]
        spread = (1 - signal**2).sqrt()
        eps = (x - signal * wrong) / spread  # what a network says that takes x0 to be `wrong`
        said = {"epsilon": eps, "v_prediction": signal * eps - spread * wrong, "sample": wrong}
        cost[kind] = noising.velocity_weight(t[:, 0]) * (said[kind] - target).square()[:, 0]
    torch.testing.assert_close(cost["epsilon"], cost["v_prediction"])
    torch.testing.assert_close(cost["sample"], cost["v_prediction"])
    assert (Noising("velocity", 100).velocity_weight(t) == 1).all()


@pytest.mark.parametrize("name", ["sd", "sd2", "sd3"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_its_inputs(name, half):
    """Where 1 - ᾱ is 1e-3, which in bfloat16 is 0, and where a timestep is no 16-bit number."""
    noising = noising_of(family(name)[0])
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 4, 8, 8, generator=generator).to(half)
    t = torch.tensor([0.0, 0.0025, 0.3, 0.68, 0.995]).to(half)
    assert torch.equal(noising.timesteps(t), noising.timesteps(t.float()))
    close: dict[str, Any] = {"rtol": torch.finfo(half).eps * 2, "atol": torch.finfo(half).eps * 4}
    for found, exact in zip(
        noising.noised(x0, noise, t),
        noising.noised(x0.double(), noise.double(), t.double()),
        strict=True,
    ):
        torch.testing.assert_close(found.double(), exact, **close)
    for weight in (noising.velocity_weight, noising.x0_error):
        torch.testing.assert_close(weight(t).double(), weight(t.double()), **close)
