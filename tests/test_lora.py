"""Adapters: what they change, their average, and that diffusers loads what is saved."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from tiny_pipelines import family
from torch import nn

from finetune import lora
from finetune.network import part_of, predict, targets_of
from finetune.recording import record

NAMES = ["sd", "sd2", "sdxl", "sd3", "flux"]
PROMPTS = ["a red star", "two blue circles"]


def attached(name="sd3", rank=2):
    pipe, call = family(name)
    part = part_of(pipe)
    network = getattr(pipe, part)
    weights = lora.attach(network, targets_of(network), rank, 4, torch.Generator().manual_seed(3))
    return pipe, call, part, network, weights


def shaken(weights):
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for value in weights.values():
            value.add_(torch.randn(value.shape, generator=generator) * 0.05)


def output(pipe, call):
    given = record(pipe, PROMPTS, **call)
    x = torch.randn(2, *given.form.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return predict(pipe, given, x, torch.tensor([0.3, 0.8]))


@pytest.mark.parametrize("name", NAMES)
def test_an_untouched_adapter_changes_nothing_and_the_reference_stays(name):
    pipe, call = family(name)
    network = getattr(pipe, part_of(pipe))
    before = output(pipe, call)
    weights = lora.attach(network, targets_of(network), 2, 4, torch.Generator().manual_seed(3))
    assert torch.equal(output(pipe, call), before)
    assert {name for name, p in network.named_parameters() if p.requires_grad} == set(weights)
    shaken(weights)
    after = output(pipe, call)
    assert (after - before).abs().max() > 1e-4
    with lora.reference(network):
        assert torch.equal(output(pipe, call), before)
    assert torch.equal(output(pipe, call), after)


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
    pipe, call, part, network, weights = attached(name)
    shaken(weights)
    after = output(pipe, call)
    file = lora.save(type(pipe), part, network, tmp_path)
    assert file.is_file()
    fresh, _ = family(name)
    fresh.load_lora_weights(tmp_path)
    torch.testing.assert_close(output(fresh, call), after, atol=1e-5, rtol=1e-5)


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


def test_blocks_whose_projections_are_one_layer_are_adapted():
    """FLUX.2 has more blocks of one stream, with a single layer for all, than of two."""
    with torch.device("meta"):
        network = Flux2Transformer2DModel(num_layers=1, num_single_layers=2)
        weights = lora.attach(network, targets_of(network), 2, 2, torch.Generator())
    blocks = {".".join(name.split(".")[:2]) for name in weights}
    assert blocks == {"transformer_blocks.0", *(f"single_transformer_blocks.{i}" for i in (0, 1))}


def test_targets_that_match_nothing_name_those_that_would():
    pipe, _ = family("sd")
    with pytest.raises(ValueError, match=r"no layer of UNet2DConditionModel .*to_k"):
        lora.attach(pipe.unet, ["qkv"], 2, 2, torch.Generator())
