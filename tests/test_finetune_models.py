"""The trainable networks against what the pipelines themselves feed them, and adapters on them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from tiny_pipelines import family
from torch import nn

from finetune import lora
from finetune.models import FAMILIES, Noising, encode, family_of, noising_of, predict

NAMES = ["sd", "sd2", "sdxl", "sd3", "flux"]
PROMPTS = ["a red star", "two blue circles"]


def recorded(pipe, part, call):
    """What the network was given and returned at the first step of the pipeline's own call."""
    seen = []
    network = getattr(pipe, part)
    handle = network.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True
    )
    with torch.no_grad():
        generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
        pipe(PROMPTS, **call, generator=generators, output_type="latent")
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_network_is_called_as_the_pipeline_calls_it(name):
    pipe, call = family(name)
    own = family_of(pipe)
    call |= {"guidance_scale": 3.5 if name == "flux" else 1.0}
    args, kwargs, out = recorded(pipe, own.network, call)
    x = kwargs.get("hidden_states", args[0] if args else kwargs.get("sample"))
    timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
    noising = noising_of(pipe)
    scale = noising.num_train_timesteps
    t = torch.as_tensor(timestep).float().flatten().expand(len(PROMPTS)).clone()
    t = t if name == "flux" else t / scale  # flux is told t itself
    t = t if noising.flow else t + 0.5 / scale
    given = encode(pipe, PROMPTS, **call)
    assert all(len(value) == len(PROMPTS) for value in given.values())
    with torch.no_grad():
        found = predict(getattr(pipe, own.network), own, noising, x, t, given)
    torch.testing.assert_close(found, out[0], atol=2e-5, rtol=1e-5)


def test_other_pipelines_are_refused_by_name():
    pipe, _ = family("pixart")
    with pytest.raises(ValueError, match="PixArtAlphaPipeline cannot be fine-tuned"):
        family_of(pipe)


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


# --- adapters


def attached(name="sd3", rank=2):
    pipe, call = family(name)
    own = family_of(pipe)
    network = getattr(pipe, own.network)
    weights = lora.attach(network, own.targets, rank, 4, torch.Generator().manual_seed(3))
    return pipe, call, own, network, weights


def shaken(weights):
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for value in weights.values():
            value.add_(torch.randn(value.shape, generator=generator) * 0.05)


def output(pipe, network, own, call):
    x = torch.randn(2, *_shape(pipe, call), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        given = encode(pipe, PROMPTS, **call)
        return predict(network, own, noising_of(pipe), x, torch.tensor([0.3, 0.8]), given)


def _shape(pipe, call):
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        return pipe(
            "a", **call | {"num_inference_steps": 1}, generator=generator, output_type="latent"
        )[0].shape[1:]


@pytest.mark.parametrize("name", NAMES)
def test_an_untouched_adapter_changes_nothing_and_the_reference_stays(name):
    pipe, call = family(name)
    own = family_of(pipe)
    network = getattr(pipe, own.network)
    before = output(pipe, network, own, call)
    weights = lora.attach(network, own.targets, 2, 4, torch.Generator().manual_seed(3))
    assert torch.equal(output(pipe, network, own, call), before)
    assert {name for name, p in network.named_parameters() if p.requires_grad} == set(weights)
    shaken(weights)
    after = output(pipe, network, own, call)
    assert (after - before).abs().max() > 1e-4
    with lora.reference(network):
        assert torch.equal(output(pipe, network, own, call), before)
    assert torch.equal(output(pipe, network, own, call), after)


def test_the_adapter_depends_on_its_generator_alone_and_has_pefts_spread():
    _, _, _, _, weights = attached(rank=8)
    torch.rand(3)
    _, _, _, _, again = attached(rank=8)
    for name, value in weights.items():
        assert torch.equal(value, again[name])
        if "lora_A" in name:
            layer = nn.Linear(value.shape[1], 8, bias=False)
            nn.init.kaiming_uniform_(layer.weight, a=5**0.5)
            bound = layer.weight.abs().max().item()
            assert value.abs().max().item() <= value.shape[1] ** -0.5
            assert value.abs().max().item() == pytest.approx(bound, rel=0.2)
        else:
            assert value.abs().max() == 0


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_a_saved_adapter_loads_into_a_fresh_pipeline(name, tmp_path):
    pipe, call, own, network, weights = attached(name)
    shaken(weights)
    after = output(pipe, network, own, call)
    file = lora.save(type(pipe), own.network, network, tmp_path)
    assert file.is_file()
    fresh, _ = family(name)
    fresh.load_lora_weights(tmp_path)
    network = getattr(fresh, own.network)
    torch.testing.assert_close(output(fresh, network, own, call), after, atol=1e-5, rtol=1e-5)


def test_the_average_follows_its_formula_and_is_lent():
    _, _, _, _, weights = attached()
    average = lora.Average(weights, 0.2)
    name, value = next((n, p) for n, p in weights.items() if "lora_B" in n)
    wanted = torch.zeros_like(value)
    for step in range(1, 4):
        with torch.no_grad():
            value.fill_(float(step))
        average.update(weights)
        decay = min(0.2, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * step
    torch.testing.assert_close(average.weights[name], wanted.detach())
    with lora.swapped(weights, average.weights):
        torch.testing.assert_close(value.detach(), wanted.detach())
    assert (value == 3).all()
    other = lora.Average(weights, 0.2)
    other.load_state_dict(average.state_dict())
    assert other.step == 3
    torch.testing.assert_close(other.weights[name], wanted.detach())


def test_the_average_is_one_of_many_updates():
    """Of 300 updates at 0.9, the last three are 1 - 0.9³ of it, not nearly all."""
    weights = {"w": nn.Parameter(torch.zeros(()))}
    average = lora.Average(weights, 0.9)
    for step in range(300):
        with torch.no_grad():
            weights["w"].fill_(float(step >= 297))
        average.update(weights)
    assert average.weights["w"] == pytest.approx(1 - 0.9**3, abs=1e-5)


def test_targets_that_match_nothing_name_those_that_would():
    pipe, _ = family("sd")
    with pytest.raises(ValueError, match=r"no layer of UNet2DConditionModel .*to_k"):
        lora.attach(pipe.unet, ["qkv"], 2, 2, torch.Generator())


def test_every_family_has_the_targets_it_names():
    for name in ("sd", "sdxl", "sd3", "flux"):
        pipe, _ = family(name)
        own = FAMILIES[type(pipe).__name__]
        layers = [
            n
            for n, part in getattr(pipe, own.network).named_modules()
            if isinstance(part, nn.Linear)
        ]
        for target in own.targets:
            assert any(n.endswith(f".{target}") for n in layers), (name, target)
