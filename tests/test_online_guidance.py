"""Guidance in online training: what a class of pipelines cannot do is refused, not left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_network import made

from tilt.commands.train_adversarial import TrainAdversarial
from tilt.conditioning import recorder_of

CPU = torch.device("cpu")


def recorder(name: str, scale: float | None, negative: str = "", **call: Any) -> Any:
    pipe, own = made(f"{name}Pipeline")
    settings = TrainAdversarial(negative_prompt=negative, call=call)
    settings.grpo.guidance_scale = scale
    own = {n: v for n, v in own.items() if not n.startswith(("negative", "guidance", "true"))}
    return recorder_of(settings, pipe, own | call, CPU)


@pytest.mark.parametrize("kind", ["QwenImage", "Flux"])
def test_a_true_cfg_scale_in_the_call_guides(kind):
    found = recorder(kind, None, " ", true_cfg_scale=3.0)
    assert found.guided
    assert found.call["true_cfg_scale"] == 3.0
    assert not recorder(kind, None, true_cfg_scale=1.0).guided
    assert recorder(kind, None).call["true_cfg_scale"] == 1.0


def test_a_scale_that_is_an_input_of_the_network_stays_one():
    pipe, _ = made("FluxPipeline")
    assert pipe.transformer.config.guidance_embeds
    found = recorder("Flux", 4.0, " ", true_cfg_scale=3.0)
    assert (found.embedded, found.guided) == (True, True)
    assert (found.call["guidance_scale"], found.call["true_cfg_scale"]) == (4.0, 3.0)
    assert not recorder("Flux", 4.0).guided


@pytest.mark.parametrize(
    ("kind", "given", "why"),
    [
        ("QwenImage", {"scale": 4.0}, "guidance_scale is 4.0 but has no effect on QwenImageP"),
        ("QwenImage", {"scale": None, "true_cfg_scale": 4.0}, "is 4.0 and needs a negative prompt"),
        ("QwenImage", {"scale": None, "negative": "a"}, "set call.true_cfg_scale above 1"),
        ("ZImage", {"scale": 1.0}, "is 1, with which ZImagePipeline still has guidance"),
        ("ZImage", {"scale": None, "negative": "a"}, "set grpo.guidance_scale above 1"),
        ("Flux2Klein", {"scale": 4.0, "negative": "a"}, "takes no negative_prompt; leave neg"),
    ],
)
def test_guidance_without_effect_is_refused(kind, given, why):
    with pytest.raises(ValueError, match=why):
        recorder(kind, **given)
