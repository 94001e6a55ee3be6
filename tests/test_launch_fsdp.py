"""Two processes that hold one network between them (FSDP 2, gloo, CPU) train what one trains."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_launch import CALL, ROOT, assert_alike, command, logged

from finetune import checks
from tilt.commands import rollout, score

pytestmark = pytest.mark.slow  # a process takes ten seconds to import all it needs

SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}
WORDS = [
    "--gdro.k=2",
    "--gdro.rank=2",
    "--gdro.micro-groups=1",
    "--gdro.lr=1e-3",
    "--gdro.groups=4",
]
WORDS += ["--log-every=1", "--check.every=2", "--check.images=2", "--check.train-prompts=0"]
# the script, which first says how the network lies
SCRIPT = """
import sys
from torch.distributed.tensor import DTensor
from tilt.commands import train_gdro
from tilt import training

loop = training.loop

def looked(trainer, *rest):
    learner = trainer.learner
    every = list(learner.bare.parameters())
    assert all(isinstance(p, DTensor) and p.device_mesh.size() == 2 for p in every)
    held = sum(p.to_local().numel() for p in every)
    whole = sum(p.numel() for p in every)
    assert held < 0.6 * whole, (held, whole)
    blocks = [m for m in learner.bare.modules() if hasattr(m, "unshard")]
    assert len(blocks) > 3, len(blocks)
    loop(trainer, *rest)

training.loop = looked
sys.exit(train_gdro.main(sys.argv[1:]))
"""


# before that: the second process has no weights of the network, and all those of the text encoders
READ_ONCE = """
import os
import torch
from diffusers import ModelMixin
from tilt import training

alone, made, from_pretrained = os.environ["RANK"] == "0", training.pipeline_of, vars(ModelMixin)
from_pretrained = from_pretrained["from_pretrained"].__func__

def reads(kind, *given, **more):
    assert alone or kind.__name__ not in ("SD3Transformer2DModel", "UNet2DConditionModel")
    return from_pretrained(kind, *given, **more)

ModelMixin.from_pretrained = classmethod(reads)

def made_as(load, *rest):
    pipe = made(load, *rest)
    network = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    assert all(weight.is_meta != alone for weight in network.parameters())
    assert len(list(network.buffers())) > 0 or hasattr(pipe, "unet")
    assert not any(buffer.is_meta for buffer in network.buffers())
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"  # transformers reads it, too
    return pipe

training.pipeline_of = made_as
"""


def ran(line: list[str], **more: str) -> None:
    alone = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | more
    done = subprocess.run(line, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("fsdp")
    words = ["CAT", "SUN", "DOG", "OWL"]
    (made / "prompts.txt").write_text("".join(f'the word "{word}"\n' for word in words))
    (made / "unseen.txt").write_text("".join(f'the word "{word}"\n' for word in ("HAT", "BOX")))
    (made / "script.py").write_text(SCRIPT)
    (made / "once.py").write_text(READ_ONCE + SCRIPT)
    own = [f"--prompts={made / 'prompts.txt'}", f"--out={made / 'run'}", "--images=3"]
    assert rollout.main([*own, *CALL]) == 0
    assert score.main([str(made / "run"), "--reward", "jpeg", "--device", "cpu"]) == 0
    return made


def words_of(folder: Path, out: Path, steps: int) -> list[str]:
    own = [f"--rollouts={folder / 'run'}", f"--check.prompts={folder / 'unseen.txt'}"]
    return [*own, f"--out={out}", f"--gdro.steps={steps}", *WORDS]


def test_two_shares_train_on_two_sizes_what_a_whole_network_trains(folder, tmp_path):
    """Whichever sizes a process gets, it calls the network as often as the other."""
    own = [f"--prompts={folder / 'prompts.txt'}", f"--out={tmp_path / 'wide'}", "--images=3"]
    assert rollout.main([*own, *CALL, "--call.height=64", "--call.width=96"]) == 0
    assert score.main([str(tmp_path / "wide"), "--reward", "jpeg", "--device", "cpu"]) == 0
    both = ["--rollouts", str(folder / "run"), str(tmp_path / "wide"), "--gdro.steps=4"]
    small = ["--gdro.k=2", "--gdro.rank=2", "--gdro.micro-groups=2", "--gdro.lr=1e-3"]
    words = [*both, *small, "--gdro.groups=6", "--log-every=1"]
    one, two = tmp_path / "one", tmp_path / "two"
    ran(command("train_gdro.py", *words, f"--out={one}"))
    ran(command(str(folder / "script.py"), *words, f"--out={two}", processes=2), **SHARDED)
    assert_alike(one, two)


def test_two_shares_of_a_network_train_what_a_whole_one_trains_and_resume(folder, tmp_path):
    script = str(folder / "script.py")
    one, two, cut = (tmp_path / name for name in ("one", "two", "cut"))
    more = [
        "--gdro.refresh=2",
        "--gdro.weight-decay=0.1",
    ]  # the reference is swapped in from step 2 on
    ran(command("train_gdro.py", *words_of(folder, one, 4), *more))
    ran(command(script, *words_of(folder, two, 4), *more, processes=2), **SHARDED)
    for steps in (3, 4):
        own = [*words_of(folder, cut, steps), *more, "--resume"]
        ran(command(script, *own, processes=2), **SHARDED)
    file = "lora/pytorch_lora_weights.safetensors"
    whole, halves, again = (load_file(out / file) for out in (one, two, cut))
    assert whole.keys() == halves.keys() == again.keys()
    assert sum(float(v.abs().sum()) for name, v in whole.items() if "lora_B" in name) > 0
    for name, value in whole.items():
        torch.testing.assert_close(halves[name], value, atol=1e-5, rtol=1e-3)
    for a, b in zip(logged(one), logged(two), strict=True):
        assert a == pytest.approx(b, abs=1e-3, rel=1e-3)
    states = [torch.load(out / "state.pt", weights_only=True) for out in (two, cut, one)]
    for name, value in states[0]["weights"].items():
        assert torch.equal(states[1]["weights"][name], value)
        torch.testing.assert_close(states[2]["weights"][name], value, atol=1e-5, rtol=1e-3)
    # another number of processes goes on from it
    ran(command("train_gdro.py", *words_of(folder, two, 5), *more, "--resume"))


def test_two_shares_of_a_network_in_bfloat16_train_what_a_whole_one_trains(folder, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--gdro.refresh=2", "--dtype=bfloat16"]
    ran(command("train_gdro.py", *words_of(folder, one, 4), *more))
    script = str(folder / "script.py")
    ran(command(script, *words_of(folder, two, 4), *more, processes=2), **SHARDED)
    for a, b in zip(logged(one), logged(two), strict=True):
        assert a == pytest.approx(b, abs=2e-3, rel=1e-2)
    state = torch.load(two / "state.pt", weights_only=True)
    assert {value.dtype for value in state["weights"].values()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_one_process_reads_are_trained_as_those_that_all_read(folder, tmp_path, dtype):
    """A further round, from a LoRA, with checks by both processes, and resumed."""
    first, one, two = (tmp_path / name for name in ("first", "one", "two"))
    more = [f"--dtype={dtype}", "--gdro.refresh=2"]
    if dtype == "float32":  # by one process alone, which has nothing to shard
        ran(command("train_gdro.py", *words_of(folder, first, 2)), **SHARDED)
        more.append(f"--lora={first / 'lora'}")
    ran(command("train_gdro.py", *words_of(folder, one, 4), *more))
    script, once = str(folder / "once.py"), SHARDED | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    for steps in (2, 4):
        own = [*words_of(folder, two, steps), *more, "--resume"]
        ran(command(script, *own, processes=2), **once)
    near = {"abs": 1e-3, "rel": 1e-3} if dtype == "float32" else {"abs": 2e-3, "rel": 1e-2}
    for a, b in zip(logged(one), logged(two), strict=True):
        assert a == pytest.approx(b, abs=near["abs"], rel=near["rel"])
    checked = [checks.read(out / "checks.csv") for out in (one, two)]
    for a, b in zip(*checked, strict=True):
        assert a == pytest.approx(b, rel=2e-2)
    states = [torch.load(out / "state.pt", weights_only=True)["weights"] for out in (one, two)]
    assert states[0].keys() == states[1].keys()
    if dtype == "float32":
        for name, value in states[0].items():
            torch.testing.assert_close(states[1][name], value, atol=1e-5, rtol=1e-3)


def test_a_swapped_adapter_is_gathered_again(folder, tmp_path):
    """DiffusionNFT samples with one adapter and learns another, between which it goes to and fro;
    weights that stay gathered from one to the other would not be seen to change.
    """
    words = [
        f"--prompts={folder / 'prompts.txt'}",
        "--method=nft",
        "--reward=jpeg",
        "--log-every=1",
    ]
    words += [
        "--nft.groups=2",
        "--nft.k=2",
        "--nft.rank=2",
        "--nft.num-inference-steps=2",
        "--nft.lr=1e-2",
    ]
    words += [
        "--nft.steps=2",
        "--nft.updates=2",
        "--nft.warmup=1",
        "--nft.kl=1e-2",
        "--nft.old-decay=0.9",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    ran(command("train_adversarial.py", *words, f"--out={one}"))
    ran(command("train_adversarial.py", *words, f"--out={two}", processes=2), **SHARDED)
    for a, b in zip(logged(one), logged(two), strict=True):
        # A grey level that rounds the other way changes a JPEG's size, and few pictures are drawn;
        # an adapter that is not seen makes `moved` 0, which is far beyond this.
        assert a == pytest.approx(b, abs=1e-4, rel=5e-2)
    assert logged(one)[1]["moved"] > 1e-6


def test_online_training_by_weights_that_one_process_reads_is_refused(folder, tmp_path):
    own = [f"--prompts={folder / 'prompts.txt'}", "--reward=jpeg", f"--out={tmp_path / 'out'}"]
    once = SHARDED | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    with pytest.raises(AssertionError, match="for which every process needs the weights"):
        ran(command("train_adversarial.py", *own, processes=2), **once)


def test_groups_that_do_not_divide_are_refused(folder, tmp_path):
    words = [*words_of(folder, tmp_path / "out", 1), "--gdro.groups=3"]
    with pytest.raises(
        AssertionError, match="groups is 3 but 2 processes need equal numbers of them"
    ):
        ran(command("train_gdro.py", *words, processes=2), **SHARDED)
