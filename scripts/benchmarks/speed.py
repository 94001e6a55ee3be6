"""What everything costs, as ratios, in ten minutes on two cores; as JSON, to compare with later.

    python -m scripts.bench speed --out speed.json
    python -m scripts.bench speed --against speed.json

Each case is a list of ratios of alternating runs. With --against a case is slower where its median
is worse than the earlier one by more than the spread (highest minus lowest) of either; then the
exit status is 1. Ratios of another device are not compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rewards
from steering import FeynmanKac, steer
from tilt import loading

from . import processes, training
from .cost import PROMPT, measure, ratios, subject
from .frontier import FUNNELS
from .machine import about, peak
from .sized import DTYPES

CPU = torch.device("cpu")
# the steps of the embedded models, and those that a user of the big ones takes by default
STEPS = {"tiny-sd3": (20, 28), "tiny-sd": (20, 50)}


@dataclass(frozen=True)
class Timed:
    """Ratios of one case; higher is worse, unless `higher_is_better`."""

    values: list[float]
    higher_is_better: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        return max(self.values) - min(self.values)


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """A reward that takes no time: what is left is the filter and its decoder."""
    return images.mean((1, 2, 3))


def overhead(
    model: str, steps: int, preview: bool, pairs: int, reward: Any = "clip(tiny)"
) -> list[float]:
    """Steered over plain: k = 8, four scores."""
    pipe, call, decoder = subject(model, CPU, torch.float32)
    call = call | {"num_inference_steps": steps}
    reward = rewards.load(reward) if isinstance(reward, str) else reward
    return measure(pipe, call, reward, 8, pairs, decoder if preview else None, 4)


def below(change: dict[str, Any], pairs: int) -> list[float]:
    """Sixteen particles with `change` over sixteen without, on tiny-sd3."""
    pipe, call, decoder = subject("tiny-sd3", CPU, torch.float32)
    reward = rewards.load("clip(tiny)")

    def run(**more: Any) -> object:
        given = {"preview": decoder, "progress": False} | call | more
        return steer(pipe, [PROMPT], reward, 16, **given)

    return ratios(lambda: run(**change), run, pairs)


def cases(pairs: int) -> dict[str, Callable[[], Timed]]:
    """What is measured, by name."""
    found: dict[str, Callable[[], Timed]] = {}
    for model, counts in STEPS.items():
        for steps in counts:
            name = f"steered / plain, {model}, {steps} steps, preview decoder"
            found[name] = partial(_case, overhead, model, steps, True, pairs)
        name = f"steered / plain, {model}, {counts[0]} steps"
        free = partial(_case, overhead, model, counts[0], True, pairs, brightness)
        found[f"{name}, preview decoder, a reward that takes no time"] = free
        found[f"{name}, full decoder"] = partial(_case, overhead, model, counts[0], False, pairs)
    funnel = {"settings": FeynmanKac(funnel=FUNNELS["16 to 4"])}
    half = {"guidance_interval": (0.0, 0.5)}
    few = max(2, pairs // 2)
    found["funnel 16 to 4 / 16"] = partial(_case, below, funnel, few)
    found["guided 0-0.5 / guided throughout"] = partial(_case, below, half, few)
    for method in ("gdro", "grpo"):
        found[f"training step / its network alone, {method}"] = partial(_training, method, pairs)
    found["prompts a second of two processes / of one"] = partial(_processes, few)
    return found


def _training(method: str, pairs: int) -> Timed:
    return Timed(training.measure("tiny-sd3", method, pairs)["ratios"])


def _processes(pairs: int) -> Timed:
    return Timed(processes.measure(pairs, 8)["second"], higher_is_better=True)


def _case(function: Callable[..., list[float]], *args: Any) -> Timed:
    return Timed(function(*args))


def slower(before: dict[str, Timed], now: dict[str, Timed]) -> dict[str, str]:
    """The cases that both have and that got worse by more than the spread of either."""
    found = {}
    for name in before.keys() & now.keys():
        old, new = before[name], now[name]
        worse = new.median - old.median
        if new.higher_is_better:
            worse = -worse
        if worse > max(old.spread, new.spread):
            found[name] = f"{old.median:.3f} -> {new.median:.3f}"
    return found


def read(path: Path) -> tuple[str, dict[str, Timed]]:
    """What was measured on, and the cases; ValueError for anything but a file of this command."""
    try:
        content = json.loads(path.read_text())
        return content["device"], {name: Timed(**case) for name, case in content["cases"].items()}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is no result of `bench speed` ({error}): write one with --out"
        ) from None


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, write JSON, compare; exit status 1 where something got slower."""
    parser = argparse.ArgumentParser(
        prog="speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    parser.add_argument("--against", type=Path, help="an earlier result to compare with")
    args = parser.parse_args(argv)
    try:
        earlier = read(args.against) if args.against else None
    except ValueError as error:
        sys.exit(f"speed: {error}")
    device = about(loading.pick_device("cpu"), DTYPES["float32"])
    print(f"{device}, {args.pairs} pairs\n\n| case | median [lowest, highest] |\n|---|---|")
    began, found = time.monotonic(), {}
    with peak(CPU) as most:
        for name, run in cases(args.pairs).items():
            if args.only in name:
                found[name] = case = run()
                ends = f"[{min(case.values):.3f}, {max(case.values):.3f}]"
                print(f"| {name} | {case.median:.3f} {ends} |", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s, {most.gigabytes:.2f} GB at most")
    if args.out:
        result = {"device": device, "cases": {name: asdict(case) for name, case in found.items()}}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if earlier is None:
        return
    if earlier[0] != device:
        sys.exit(f"speed: {args.against} is of {earlier[0]}: ratios of another device or version")
    worse = slower(earlier[1], found)
    for name, change in sorted(worse.items()):
        print(f"slower by more than the spread: {name}, {change}")
    print("nothing got slower by more than the spread" if not worse else "")
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    main()
