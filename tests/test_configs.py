"""The recipes of scripts/configs are settings of their scripts; the memory they need, computed."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from allocator import real_peak
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from scripts.benchmarks import larger, memory
from scripts.benchmarks.networks import network_of, parameters
from tilt.commands import evaluate, rollout, train_adversarial, train_gdro

READ = {
    "rollout": rollout.OPTIONS,
    "evaluate": evaluate.OPTIONS,
    "train gdro": train_gdro.OPTIONS,
    "train adversarial": train_adversarial.OPTIONS,
}
BILLIONS = {"flux-dev": 11.9, "klein-4b": 4.0, "z-image": 6.15, "qwen-image": 20.4}
BILLIONS |= {"wan22-5b": 5.0, "wan22-5b-image": 5.0}
TITLES = {  # in docs/recipes.md
    "flux-dev": "FLUX.1-dev,",
    "klein-4b": "FLUX.2-klein (4B),",
    "z-image": "Z-Image,",
    "qwen-image": "Qwen-Image,",
    "wan22-5b-image": "Wan 2.2 TI2V-5B, single frames of",
    "wan22-5b": "Wan 2.2 TI2V-5B, 33 frames of",
}
ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "scripts/configs").glob("*.yaml"))
LAUNCH = ROOT / "scripts/configs/fsdp.yaml"  # of accelerate, not of a script
ZERO = LAUNCH.with_name("deepspeed.yaml")  # too
GPUS = LAUNCH.with_name("gpus.yaml")  # too
RECIPES = [file for file in CONFIGS if file not in (LAUNCH, ZERO, GPUS)]
KINDS = {
    "gdro": train_gdro.OPTIONS,
    "grpo": train_adversarial.OPTIONS,
    "nft": train_adversarial.OPTIONS,
    "adversarial": train_adversarial.OPTIONS,
}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_holds_settings_of_its_script(file):
    kind = KINDS[file.stem.split("_")[0]]
    settings = kind.read(["--config", str(file)])
    method = settings.gdro if kind is train_gdro.OPTIONS else settings.tuned
    assert method.steps > 0


def test_the_commands_of_the_recipes_are_understood(monkeypatch):
    """Most are run by test_commands.py, which is slow; some online ones are only read here."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    every = re.findall(r"^tilt (?:[^\\\n]|\\\n)*", text, re.MULTILINE)
    read = 0
    for line in every:
        words = shlex.split(line.replace("\\\n", " "))[1:]
        name = " ".join(words[:2]) if words[0] == "train" else words[0]
        if name in READ:
            READ[name].read(words[len(name.split()) :])
            read += 1
    assert read >= 20


@pytest.mark.parametrize("name", larger.LARGER)
def test_larger_networks_have_about_the_parameters_of_their_cards(name):
    with torch.device("meta"):
        found = parameters(network_of(larger.LARGER[name]))
    assert found == pytest.approx(BILLIONS[name] * 1e9, rel=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("name", larger.LARGER)
def test_a_larger_network_is_computed_from_few_blocks(name, monkeypatch):
    """Of the smallest pictures: what one image takes, and what 4 bits save of it."""
    model, (setting, _) = larger.LARGER[name], larger.BLOCKS[name]
    monkeypatch.setitem(larger.BLOCKS, name, (setting, 6))
    more = {"num_layers": 1} if setting == "num_single_layers" else {}
    small = replace(model, config={**model.config, **more})
    monkeypatch.setitem(memory.LARGER, name, small)
    drawn = max(memory.whole_peaks(name, 64, "gdro", 1, True))
    six = replace(small, side=64, config={**small.config, setting: 6})
    whole = memory.peak(six, "gdro", 1, True, offline=False)
    assert drawn == pytest.approx(whole, rel=0.01)
    packed = memory.peak(six, "gdro", 1, True, "4bit", offline=False)
    with torch.device("meta"):
        held = 2 * parameters(network_of(six))
    assert 0.6 * held < whole - packed < 0.72 * held  # of 16 bits, 4.5 are left


def test_what_decodes_is_not_drawn_through_what_trains(monkeypatch):
    """With two and four blocks decoding needs more, and with all thirty training does."""

    def peaks(model, *_, **__):
        blocks = model.config["num_layers"]
        return 10.0 * blocks, 50.0 + blocks

    monkeypatch.setattr(memory, "peaks", peaks)
    assert memory.whole_peaks("wan22-5b", 640, "grpo", 1, True) == (300, 80)


def test_accelerate_launch_takes_the_configuration_of_fsdp():
    line = ["--config_file", str(LAUNCH), "train_gdro.py", "--gdro.groups=4"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(line))
    assert arguments.training_script_args == ["--gdro.groups=4"]
    assert (arguments.use_fsdp, arguments.fsdp_version) == (True, 2)
    assert arguments.mixed_precision == "no"
    assert arguments.fsdp_auto_wrap_policy == "TRANSFORMER_BASED_WRAP"


def test_accelerate_launch_has_nothing_to_guess_on_several_gpus(caplog):
    line = ["--config_file", str(GPUS), "--num_processes", "8", "rollout.py", "--images=4"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(line))
    assert arguments.training_script_args == ["--images=4"]
    assert (arguments.multi_gpu, arguments.num_processes, arguments.num_machines) == (True, 8, 1)
    assert (arguments.mixed_precision, arguments.dynamo_backend) == ("no", "no")
    assert not caplog.records  # what it says of values that were not passed


def test_accelerate_launch_takes_the_configuration_of_deepspeed():
    line = ["--config_file", str(ZERO), "train_gdro.py", "--gdro.groups=4"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(line))
    assert arguments.training_script_args == ["--gdro.groups=4"]
    assert (arguments.use_deepspeed, arguments.zero_stage) == (True, 2)
    assert arguments.mixed_precision == "no"
    assert arguments.offload_optimizer_device == "none"
    assert arguments.deepspeed_config_file is None


@pytest.mark.parametrize(
    ("name", "published"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)], ids=["sd15", "sdxl"]
)
def test_the_unets_have_the_parameters_of_the_published_ones(name, published):
    with torch.device("meta"):
        parts = memory.parts_of(memory.MODELS[name], online=True)
    assert [_numbers(part) for part in parts] == [published, 83_653_863, 86_580_480]


def test_the_transformer_has_the_two_and_a_half_billion_of_its_card():
    with torch.device("meta"):
        (network,) = memory.parts_of(memory.MODELS["sd35m"], online=False)
    places = sum(buffer.numel() for buffer in network.buffers())  # they are in the file too
    assert _numbers(network) + places == pytest.approx(2.5e9, rel=0.02)


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class Block(nn.Module):
    """Residual convolution, norm and attention, checkpointed or not."""

    def __init__(self, less: bool) -> None:
        super().__init__()
        self.less, self.norm = less, nn.GroupNorm(8, 64)
        self.conv, self.out = nn.Conv2d(64, 256, 3, padding=1), nn.Conv2d(256, 64, 1)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.silu(self.conv(self.norm(x)))
        q = x.flatten(2).mT[:, None]
        seen = nn.functional.scaled_dot_product_attention(q, q, q)[:, 0].mT
        return self.out(y) + seen.reshape(x.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (checkpoint(self.inner, x, use_reentrant=False) if self.less else self.inner(x))


def _step(less: bool) -> None:
    network = nn.Sequential(*(Block(less) for _ in range(4)))
    x = torch.zeros(4, 64, 32, 32)
    network(x).square().mean().backward()


@pytest.mark.parametrize("less", [False, True])
def test_the_peak_is_that_of_the_real_allocator(less):
    with FakeTensorMode(), memory.Count() as count:
        _step(less)
    assert count.peak == pytest.approx(real_peak(lambda: _step(less)), rel=0.01)


@pytest.mark.slow
def test_the_documented_table_is_what_the_command_prints():
    text = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    assert memory.row("sd15", "gdro", less=True) in text


def test_the_recipes_of_larger_models_take_what_the_table_of_memory_says():
    page, recipes = ((ROOT / f"docs/{n}.md").read_text("utf-8") for n in ("memory", "recipes"))
    table = re.findall(r"^\| (\S+) \| \d+ \| (\w+) \| yes \| (.+?) \|", page, re.MULTILINE)
    computed = {(name, method): gigabytes.split(" / ") for name, method, gigabytes in table}
    for name, title in TITLES.items():
        lines = re.findall(rf"^\| {re.escape(title)} .*$", recipes, re.MULTILINE)
        methods = ("gdro",) if name == "wan22-5b" else ("gdro", "grpo")  # images alone are online
        for line, method in zip(lines, methods, strict=True):
            said = re.findall(r"(?:\| |\(|takes )([\d.]+) GB", line)
            assert said[0] == computed[name, method][0], line
            assert set(said) <= set(computed[name, method]), line
