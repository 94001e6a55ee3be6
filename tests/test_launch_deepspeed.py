"""Two processes under DeepSpeed's ZeRO 2 (gloo, CPU) train what one process alone trains."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from test_launch import command, logged
from test_launch_fsdp import folder, ran, words_of  # noqa: F401 - a fixture

pytestmark = [
    pytest.mark.slow,  # a process takes ten seconds to import all it needs
    pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs deepspeed"),
]

ZERO = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
# the script, which first says who trains
SCRIPT = """
import sys
from deepspeed import DeepSpeedEngine
from tilt.commands import {name}
from tilt import training

loop = training.loop

def looked(trainer, *rest):
    learner = trainer.learner
    assert isinstance(learner.network, DeepSpeedEngine)
    share = learner.optimizer.param_groups[0]["params"][0].numel()
    whole = sum(p.numel() for p in learner.weights.values())
    assert share < 0.6 * whole, (share, whole)
    loop(trainer, *rest)

training.loop = looked
sys.exit({name}.main(sys.argv[1:]))
"""


def close(one, two) -> None:
    file = "lora/pytorch_lora_weights.safetensors"
    whole, halves = load_file(one / file), load_file(two / file)
    assert whole.keys() == halves.keys()
    assert sum(float(v.abs().sum()) for name, v in whole.items() if "lora_B" in name) > 0
    for name, value in whole.items():
        torch.testing.assert_close(halves[name], value, atol=1e-5, rtol=1e-3)
    for a, b in zip(logged(one), logged(two), strict=True):
        assert a == pytest.approx(b, abs=1e-3, rel=1e-3)


def test_two_processes_train_what_one_trains_and_resume(folder, tmp_path):  # noqa: F811
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(name="train_gdro"))
    one, two, cut = (tmp_path / name for name in ("one", "two", "cut"))
    more = [
        "--gdro.refresh=2",
        "--gdro.weight-decay=0.1",
    ]  # the reference is swapped in from step 2 on
    ran(command("train_gdro.py", *words_of(folder, one, 4), *more))
    ran(command(str(script), *words_of(folder, two, 4), *more, processes=2), **ZERO)
    close(one, two)
    for steps in (3, 4):
        own = [*words_of(folder, cut, steps), *more, "--resume"]
        ran(command(str(script), *own, processes=2), **ZERO)
    states = [torch.load(out / "state.pt", weights_only=True) for out in (two, cut, one)]
    for name, value in states[0]["weights"].items():
        assert torch.equal(states[1]["weights"][name], value)
    moments = [state["optimizer"]["state"] for state in states]
    assert moments[0].keys() == moments[1].keys() == moments[2].keys()
    for i, every in moments[2].items():
        for name, value in every.items():
            assert torch.equal(moments[1][i][name], moments[0][i][name])
            torch.testing.assert_close(moments[0][i][name], value, atol=1e-5, rtol=1e-3)
    # another number of processes goes on from it, as from its own
    for out in (one, two):
        ran(command("train_gdro.py", *words_of(folder, out, 5), *more, "--resume"))
    close(one, two)


def test_a_network_in_bfloat16_too(folder, tmp_path):  # noqa: F811
    one, two = tmp_path / "one", tmp_path / "two"
    ran(command("train_gdro.py", *words_of(folder, one, 4), "--dtype=bfloat16"))
    more = ["--dtype=bfloat16"]
    ran(command("train_gdro.py", *words_of(folder, two, 4), *more, processes=2), **ZERO)
    for a, b in zip(logged(one), logged(two), strict=True):
        assert a == pytest.approx(b, abs=2e-3, rel=1e-2)
    state = torch.load(two / "state.pt", weights_only=True)
    assert {value.dtype for value in state["weights"].values()} == {torch.float32}


def test_online_grpo_too(folder, tmp_path):  # noqa: F811
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(name="train_adversarial"))
    words = [
        f"--prompts={folder / 'prompts.txt'}",
        "--method=grpo",
        "--reward=jpeg",
        "--log-every=1",
    ]
    words += ["--grpo.groups=2", "--grpo.k=2", "--grpo.rank=2", "--grpo.lr=1e-3", "--grpo.steps=2"]
    words += ["--grpo.num-inference-steps=3", "--grpo.warmup=1"]
    one, two = tmp_path / "one", tmp_path / "two"
    ran(command("train_adversarial.py", *words, f"--out={one}"))
    ran(command(str(script), *words, f"--out={two}", processes=2), **ZERO)
    close(one, two)
