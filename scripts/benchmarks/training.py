"""A training step against the network's own forward and backward, and memory over many steps.

    python -m scripts.bench training --model tiny-sd3 --pairs 15

The bare step is, on the same rows and the same network, a forward without the adapter, a forward
with it, the backward of a mean square, and nothing else: no loss of groups, no optimiser. The two
alternate and the figure is the ratio pair by pair, as machines are shared and their speed drifts.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from finetune import lora
from finetune.data import Data
from finetune.gdro import Gdro, Trainer
from finetune.groups import Group
from finetune.models import encode, family_of, noising_of, predict
from steering import tiny

from .cost import seconds

PROMPTS = [f"a {colour} star" for colour in ("red", "blue", "green", "orange", "yellow", "purple")]


def trainer_of(model: str, settings: Gdro) -> Trainer:
    """A trainer on random latents and rewards, of real prompts."""
    pipe = tiny.load(model)
    family, call = family_of(pipe), tiny.call_defaults(model)
    network, noising, m = getattr(pipe, family.network), noising_of(pipe), 2 * settings.k
    draws = torch.Generator().manual_seed(0)
    side = network.config.sample_size
    shape = (len(PROMPTS) * m, network.config.in_channels, side, side)
    groups = [
        Group(i, torch.arange(m) + m * i, torch.rand(m, generator=draws))
        for i in range(len(PROMPTS))
    ]
    data = Data(torch.randn(shape, generator=draws), encode(pipe, PROMPTS, **call), groups, 0)
    return Trainer(network, family, noising, data, settings, Accelerator(cpu=True))


def bare_step(trainer: Trainer) -> Callable[[], None]:
    """The networks' share of a step, on inputs made beforehand."""
    s, batches = trainer.settings, []
    for prompts, rows, _, t, noise, _ in trainer._micro_batches(0):
        x0 = trainer.data.latents[rows]
        times = t.repeat_interleave(s.k)
        noise = noise.expand_as(x0).flatten(0, 1)
        x, target = trainer.noising.noised(x0.flatten(0, 1), noise, times)
        given = {n: v[prompts].repeat_interleave(s.k, 0) for n, v in trainer.data.given.items()}
        batches.append((x, target, times, given))

    def step() -> None:
        for x, target, times, given in batches:
            inputs = (
                trainer.learner.bare,
                trainer.learner.family,
                trainer.noising,
                x,
                times,
                given,
            )
            with torch.no_grad(), lora.reference(trainer.learner.bare):
                predict(*inputs)
            (predict(*inputs) - target).square().mean().backward()
        for parameter in trainer.learner.weights.values():
            parameter.grad = None

    return step


def resident() -> float:
    """This process's resident memory in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main(argv: list[str]) -> None:
    """Print the ratio, images a second, and memory after few and after many steps."""
    parser = argparse.ArgumentParser(
        prog="training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-sd3", choices=["tiny-sd3", "tiny-sd"])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=200, help="steps over which memory is watched")
    args = parser.parse_args(argv)
    settings = Gdro(groups=4, micro_groups=4)
    trainer = trainer_of(args.model, settings)
    bare = bare_step(trainer)
    own: list[float] = []
    ratios = []
    for pair in range(args.pairs + 1):
        times = seconds(trainer.train_step), seconds(bare)
        if pair:  # the first is a warm-up
            own.append(times[0])
            ratios.append(times[0] / times[1])
    images = settings.groups * settings.k
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    print(
        f"{args.model}: step / bare: median {statistics.median(ratios):.3f}, "
        f"quartiles {low:.3f} and {high:.3f}, {args.pairs} pairs"
    )
    print(f"{images / statistics.median(own):.1f} images a second, {images} a step")
    before = resident()
    for _ in range(args.steps):
        trainer.train_step()
    print(f"memory {before:.0f} MiB, after {args.steps} more steps {resident():.0f} MiB")
