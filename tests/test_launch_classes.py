"""Two processes train the networks of today's pipelines as one does, over gloo on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from two_processes import run_pair

pytestmark = pytest.mark.slow  # a process takes ten seconds to import all it needs

# the time and the prompt of each row, and rows of unequal lengths, are among what is compared
PROGRAM = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from zoo.training import trained_of
from finetune import lora, sharding
from finetune.data import Data
from finetune.gdro import Gdro, GdroTrainer
from finetune.groups import Group

name, out, grouped = sys.argv[1:]
accelerator = Accelerator(cpu=True)
sharding.shard(accelerator)
it, k = trained_of(name), 4
generator = torch.Generator().manual_seed(0)
latents = torch.randn(2 * k, *it.given.form.shape, generator=generator)
groups = [Group(i, torch.arange(k) + k * i, torch.arange(k) / k) for i in range(2)]
settings = Gdro(groups=4, k=3, micro_groups=int(grouped), rank=2, alpha=2, lr=1e-3)
data = Data(latents, it.given, groups, 0)
trainer = GdroTrainer(it.network, it.model, data, settings, accelerator)
for _ in range(3):
    trainer.train_step()
weights = lora.whole(trainer.learner.weights)
if accelerator.is_main_process:
    save_file({n: w.detach().clone() for n, w in weights.items()}, out)
"""


def trained(tmp_path: Path, name: str, count: int, grouped: int) -> dict[str, torch.Tensor]:
    file = tmp_path / f"{count}.safetensors"
    run_pair(PROGRAM, name, str(file), str(grouped), port=60 + count, count=count)
    return load_file(file)


CLASSES = [("QwenImage", 2), ("Flux2Klein", 2), ("ZImage", 1)]


@pytest.mark.parametrize(("name", "grouped"), CLASSES)
def test_two_processes_train_what_one_trains(name, grouped, tmp_path):
    one, two = (trained(tmp_path, f"{name}Pipeline", count, grouped) for count in (1, 2))
    assert one.keys() == two.keys()
    for weight in one:
        torch.testing.assert_close(two[weight], one[weight], atol=1e-5, rtol=0)


def test_two_processes_with_half_a_network_each_train_what_one_trains(tmp_path, monkeypatch):
    one = trained(tmp_path, "Flux2KleinPipeline", 1, 1)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    two = trained(tmp_path, "Flux2KleinPipeline", 2, 1)
    for weight, value in one.items():
        torch.testing.assert_close(two[weight], value, atol=1e-5, rtol=0)
