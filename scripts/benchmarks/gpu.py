"""Everything that only a GPU can show, in one command and one Markdown file.

    python -m scripts.bench gpu --out gpu.md
    python -m scripts.bench gpu --only parity cost

parity: steer() against the pipeline's own call, bit for bit, in float32 and bfloat16. cost: steered
over plain at the published sizes. attention: the backends over PyTorch's own. memory: training
micro-batches, computed against measured. training: steps over their bare network. commands: the
documented ones, from rollouts to a LoRA, by both trainers. tests: those that need CUDA.

The file is written section by section, so that what was measured is kept whatever comes later; a
section that fails says by what, and the exit status is 1. Under eight minutes on one card of the
H100's class, where the networks are the published ones by their configurations, with random
weights, in bfloat16. On a CPU (--device cpu) the same runs with the embedded models, to rehearse.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import rewards
from finetune import lora
from finetune.models import FAMILIES
from steering import FeynmanKac, steer, tiny
from tilt import loading

from . import attention, cost, memory, networks, training
from .machine import about, peak

ROOT = Path(__file__).resolve().parents[2]
STEPS = {"sd15": 28, "sdxl": 20, "sd35m": 28, "tiny-sd": 4, "tiny-sd3": 4}
# model, method, gradient checkpointing: docs/memory.md has each
MICRO_BATCHES = (
    ("sd15", "gdro", True),
    ("sdxl", "gdro", True),
    ("sd35m", "gdro", False),
    ("sd35m", "gdro", True),
)
WORDS = 'the word "CRAB"\nthe word "HIVE"\nthe word "SOAP"\n'
# a user's own words, one after another in one folder; --dtype auto is bfloat16 on CUDA
COMMANDS = (
    "tilt rollout --prompts words.txt --out words --images 8 --dtype {dtype}"
    " --call.guidance-scale 1.0",
    "tilt score words --reward ocr",
    "tilt train gdro --config scripts/configs/gdro_tiny.yaml"
    " --rollouts words --out tuned --dtype {dtype} --gdro.steps 4",
    "tilt train adversarial --config scripts/configs/grpo_tiny.yaml"
    " --prompts words.txt --reward ocr --out online --dtype {dtype} --grpo.steps 2",
    "tilt evaluate --prompts words.txt --out judged --lora tuned/lora --reward ocr --images 2"
    " --dtype {dtype} --call.guidance-scale 1.0",
    "tilt steer --prompt-file words.txt --lora online/lora --reward ocr --out steered"
    " --particles 4 --dtype {dtype}",
)


def published(device: torch.device) -> tuple[str, ...]:
    """The models of a section: of published size on CUDA, else the embedded ones."""
    return tuple(networks.MODELS) if device.type == "cuda" else tiny.NAMES


def table(*heads: str) -> str:
    """The first two lines of a table."""
    return f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|"


def span(values: list[float]) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def parity(device: torch.device) -> Iterator[str]:
    """Unsteered latents against the pipeline's own call: equal bits, and the largest difference."""
    yield table("model", "dtype", "particles", "equal bits", "largest difference")
    for model in tiny.NAMES:
        for dtype in (torch.float32, torch.bfloat16):
            pipe, keywords, _ = cost.subject(model, device, dtype)
            for k, scale in ((4, 0.0), (1, 10.0)):
                settings = FeynmanKac(reward_scale=scale)
                given = (pipe, [cost.PROMPT], rewards.load("jpeg", device), k, settings)
                ours = steer(*given, progress=False, **keywords).latents[0]
                theirs = cost.plain(pipe, keywords, k)(output_type="latent")[0].cpu()
                off = (ours.float() - theirs.float()).abs().max().item()
                kind = str(dtype).removeprefix("torch.")
                equal = "yes" if torch.equal(ours, theirs) else "NO"
                yield f"| {model} | {kind} | {k} | {equal} | {off:.1e} |"


def steered(device: torch.device) -> Iterator[str]:
    """Steered over plain: k = 8, four scores, preview decoder, CLIP ViT-B/32's size."""
    heads = ("model", "steps", "steered / plain", "decoding and scoring alone", "peak GB")
    yield table(*heads)
    cuda = device.type == "cuda"
    reward = rewards.load("clip(source=random:0)" if cuda else "clip(tiny)", device)
    for model in published(device):
        dtype = torch.bfloat16 if cuda else torch.float32
        pipe, keywords, preview = cost.subject(model, device, dtype)
        call = keywords | {"num_inference_steps": STEPS[model]}
        given = (pipe, call, reward, 8, 5 if cuda else 1, preview, 4)
        with peak(device) as most:
            found = cost.measure(*given)
        floor = span(cost.least(*given))
        yield f"| {model} | {STEPS[model]} | {span(found)} | {floor} | {most.gigabytes:.2f} |"
        del pipe, preview, given
        release()


def backends(device: torch.device) -> Iterator[str]:
    """Each attention backend over PyTorch's own, 16 rows."""
    cuda = device.type == "cuda"
    yield table("network", "backend", "ms", "over native", "difference", "reason")
    for name in attention.PUBLISHED if cuda else attention.SMALL:
        dtype = torch.bfloat16 if cuda else torch.float32
        rows, rounds = (4 if name == "flux" else 16, 5) if cuda else (1, 1)
        for entry in attention.measure(name, attention.BACKENDS, device, dtype, rows, rounds):
            yield attention.line(entry)
        release()


def micro_batches(device: torch.device) -> Iterator[str]:
    """GB of a training micro-batch, as docs/memory.md computes it and as the allocator held it."""
    if device.type != "cuda":
        yield "PyTorch's allocator on a CPU keeps no peak: nothing to compare with."
        return
    yield table("model", "side", "method", "checkpointing", "k", "computed GB", "measured GB")
    for name, method, less in MICRO_BATCHES:
        k = memory.METHODS[method][0]
        row = documented(name, method, less)
        yield f"{row} {held(name, less, k, device):.2f} |"
        release()


def documented(name: str, method: str, less: bool) -> str:
    """The row of docs/memory.md up to the computed GB of a group, which take minutes to compute."""
    pattern = rf"^\| {name} \| \d+ \| {method} \| {'yes' if less else 'no'} \| \d+ \| [\d.]+ \|"
    found = re.search(pattern, (ROOT / "docs/memory.md").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise ValueError(f"docs/memory.md has no row of {name}, {method}, checkpointing {less}")
    return found[0]


def held(name: str, less: bool, images: int, device: torch.device) -> float:
    """The most GB that one group's forward and backward passes of GDRO hold on the device."""
    model = networks.MODELS[name]
    network = networks.filled(lambda: networks.network_of(model), device, torch.bfloat16)
    weights = lora.attach(network, FAMILIES[model.family].targets, 32, 32, torch.Generator())
    if less:
        network.enable_gradient_checkpointing()
    kept = [torch.zeros_like(weight) for weight in weights.values() for _ in range(3)]
    with peak(device) as most, torch.device(device):
        for _ in range(2):  # the second has gradients left by the first, as in a run
            memory.step(network, model, images, True, device.type)
    del kept
    return most.gigabytes


def trained(device: torch.device) -> Iterator[str]:
    """A step of each trainer over the calls of its network alone."""
    pairs = 4 if device.type == "cuda" else 2
    models = published(device) if device.type == "cuda" else ("tiny-sd",)
    yield training.HEAD
    for model in models:
        for method in training.METHODS:
            yield training.line(training.measure(model, method, pairs, device))
            release()


def commands(device: torch.device) -> Iterator[str]:
    """The documented commands in half precision, from prompts to pictures steered with a LoRA."""
    yield table("command", "seconds", "ended")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment |= {"PATH": path}
    if device.type == "cpu":
        environment |= {"ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "scripts").symlink_to(ROOT / "scripts")
        (Path(folder) / "words.txt").write_text(WORDS)
        for line in COMMANDS:
            start = time.monotonic()
            words = line.format(dtype="bfloat16").split()
            done = subprocess.run(
                words, cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
            seconds, said = time.monotonic() - start, done.stderr.strip().splitlines()
            ended = "well" if done.returncode == 0 else f"{done.returncode}: {said[-1:]}"
            yield f"| `{' '.join(words)}` | {seconds:.0f} | {ended} |"
            if done.returncode:
                raise RuntimeError(f"{' '.join(words)}\n{done.stderr[-3000:]}")


def tests(device: torch.device) -> Iterator[str]:
    """`pytest -m gpu`, its last line."""
    if importlib.util.find_spec("pytest") is None:
        yield "pytest is not installed."
        return
    if device.type != "cuda":
        yield "They need CUDA."
        return
    line = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    yield done.stdout.strip().splitlines()[-1]
    if done.returncode:
        raise RuntimeError(done.stdout[-3000:])


SECTIONS: dict[str, Callable[[torch.device], Iterator[str]]] = {
    "parity": parity,
    "cost": steered,
    "attention": backends,
    "memory": micro_batches,
    "training": trained,
    "commands": commands,
    "tests": tests,
}


def release() -> None:
    """Give back what the last network held, so that the next has the card to itself."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def write(out: Path, name: str, device: torch.device) -> bool:
    """Append a section to the file, and print it, line by line; whether it went well."""
    function, start, well = SECTIONS[name], time.monotonic(), True

    def say(line: str) -> None:
        with out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    say(f"\n## {name}\n\n{function.__doc__}\n")
    try:
        for line in function(device):
            say(line)
    except Exception:  # the other sections are worth their minutes all the same
        well = False
        say(f"\nThis section failed:\n\n```\n{traceback.format_exc()}```")
    say(f"\n{time.monotonic() - start:.0f} s")
    release()
    return well


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, run the sections, write the file."""
    parser = argparse.ArgumentParser(
        prog="gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu.md"), help="gpu.md by default")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(argv)
    try:
        device = loading.pick_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    title = f"# What a GPU shows\n\n{about(device, dtype)}"
    args.out.write_text(title + "\n", encoding="utf-8")
    print(title)
    well = [write(args.out, name, device) for name in args.only]
    sys.exit(0 if all(well) else 1)
