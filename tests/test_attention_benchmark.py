"""scripts/benchmarks/attention.py: the published networks take its inputs, the small ones run."""

import math

import pytest
import torch

from scripts.benchmarks import attention
from scripts.benchmarks.networks import filled, network_of

OUT = {"sd15": (2, 4, 64, 64), "sdxl": (2, 4, 128, 128), "sd35m": (2, 16, 128, 128)}
# in billions, of the published checkpoints
SIZES = {"sd15": 0.860, "sdxl": 2.567, "sd35m": 2.243, "flux": 11.901}


@pytest.mark.parametrize("name", attention.PUBLISHED)
def test_published_networks_take_the_inputs(name):
    with torch.device("meta"):
        network = network_of(attention.LARGE[name]).to(torch.bfloat16)
    size = sum(weight.numel() for weight in network.parameters())
    assert size / 1e9 == pytest.approx(SIZES[name], rel=0.002)
    given = attention.inputs(name, torch.device("meta"), torch.bfloat16, 2)
    with torch.no_grad():
        out = network(**given, return_dict=False)[0]
    assert out.shape == OUT.get(name, (2, 4096, 64))


def test_networks_are_filled_where_they_stand_and_pass_on_finite_numbers():
    cpu = torch.device("cpu")
    first, again = (
        filled(lambda: network_of(attention.FILLED["small-flux"]), cpu, dtype)
        for dtype in (torch.bfloat16, torch.bfloat16)
    )
    assert {weight.dtype for weight in first.parameters()} == {torch.bfloat16}
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    given = attention.inputs("small-flux", cpu, torch.bfloat16, 1)
    with torch.no_grad():
        out = first(**given, return_dict=False)[0]
    assert out.isfinite().all()
    assert 0.01 < out.float().std() < 100


def test_backends_alternate_and_agree_and_the_others_say_why_not():
    backends = ["_native_math", "flex", "xformers", "flash", "nonsense"]
    cpu = torch.device("cpu")
    entries = attention.measure("small-flux", backends, cpu, torch.float32, 1, 2)
    found = {entry["backend"]: entry for entry in entries}
    assert list(found) == ["native", *backends]
    for backend in ("native", "_native_math", "flex"):
        assert len(found[backend]["seconds"]) == len(found[backend]["ratios"]) == 2
        assert found[backend]["difference"] < 1e-5
        assert all(math.isfinite(ratio) for ratio in found[backend]["ratios"])
    assert found["native"]["ratios"] == [1, 1]
    for backend in ("xformers", "flash", "nonsense"):
        assert found[backend]["seconds"] == []
        assert found[backend]["reason"]
    assert "there is no attention nonsense" in attention.row(found["nonsense"])


def test_a_network_is_left_as_it_was():
    given = ("tiny-sd", torch.device("cpu"), torch.float32)
    network, given = attention.build(*given), attention.inputs(*given, 1)
    before = network.attn_processors
    with pytest.raises(RuntimeError, match="no switch"):
        attention.evaluate(network, given, "flex")
    attention.evaluate(network, given, "_native_math")
    assert network.attn_processors == before
