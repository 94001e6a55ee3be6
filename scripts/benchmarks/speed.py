"""What everything costs, as ratios, in ten minutes on two cores.

    python -m scripts.bench speed --out speed.json
    python -m scripts.bench speed --against speed.json

Each case is a list of ratios of alternating runs. --out writes them as JSON. With --against, a case
is slower if its median is worse than the earlier one by more than the spread (highest minus lowest)
of either; then the exit status is 1. Ratios measured on another device are not compared.
"""

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

from ..parser import parser_of
from ..tables import head, line, span
from . import processes, training
from .cost import PROMPT, Case, measure, subject
from .frontier import FUNNELS
from .machine import about, peak
from .timing import ratios

CPU = torch.device("cpu")
# the default steps of the embedded models, and those of the pipelines that they stand for
STEPS = {"tiny-sd3": (20, 28), "tiny-sd": (20, 50)}
PROCESSES = "prompts a second of two processes / of one"  # the only case where more is better


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
    """A reward that takes no time, so that the filter and its decoder remain."""
    return images.mean((1, 2, 3))


def overhead(model: str, steps: int, preview: bool, pairs: int, reward: Any = None) -> list[float]:
    """Steered over plain: k = 8, four scores, by clip(tiny) unless told otherwise."""
    pipe, call, decoder = subject(model, CPU, torch.float32)
    call = call | {"num_inference_steps": steps}
    reward = reward or rewards.load("clip(tiny)")
    return measure(Case(pipe, call, reward, 8, decoder if preview else None, 4), pairs)


def cheaper(change: dict[str, Any], pairs: int) -> list[float]:
    """Sixteen particles with `change` over sixteen without, on tiny-sd3."""
    pipe, call, decoder = subject("tiny-sd3", CPU, torch.float32)
    reward = rewards.load("clip(tiny)")

    def run(**more: Any) -> object:
        given = {"preview": decoder, "progress": False} | call | more
        return steer(pipe, [PROMPT], reward, 16, **given)

    return ratios(partial(run, **change), run, pairs)


def cases(pairs: int) -> dict[str, Callable[[], list[float]]]:
    """What is measured, by name."""
    found: dict[str, Callable[[], list[float]]] = {}
    for model, counts in STEPS.items():
        for steps in counts:
            name = f"steered / plain, {model}, {steps} steps, preview decoder"
            found[name] = partial(overhead, model, steps, True, pairs)
        name = f"steered / plain, {model}, {counts[0]} steps"
        free = partial(overhead, model, counts[0], True, pairs, brightness)
        found[f"{name}, preview decoder, a reward that takes no time"] = free
        found[f"{name}, full decoder"] = partial(overhead, model, counts[0], False, pairs)
    funnel = {"settings": FeynmanKac(funnel=FUNNELS["16 to 4"])}
    few = max(2, pairs // 2)
    found["funnel 16 to 4 / 16"] = partial(cheaper, funnel, few)
    half = {"guidance_interval": (0.0, 0.5)}
    found["guided 0-0.5 / guided throughout"] = partial(cheaper, half, few)
    for method in training.METHODS:
        name = f"training step / its network alone, {method}"
        found[name] = lambda m=method: training.measure("tiny-sd3", m, pairs)["ratios"]
    found[PROCESSES] = lambda: processes.measure(few, 8)["second"]
    return found


def slower(before: dict[str, Timed], now: dict[str, Timed]) -> dict[str, str]:
    """The cases that both have and that got worse by more than the spread of either."""
    found = {}
    for name in before.keys() & now.keys():
        old, new = before[name], now[name]
        worse = (new.median - old.median) * (-1 if new.higher_is_better else 1)
        if worse > max(old.spread, new.spread):
            found[name] = f"{old.median:.3f} -> {new.median:.3f}"
    return found


def read(path: Path) -> tuple[str, dict[str, Timed]]:
    """The device and the cases of a file; ValueError if it was not written by this command."""
    try:
        content = json.loads(path.read_text())
        return content["device"], {name: Timed(**case) for name, case in content["cases"].items()}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is no result of `bench speed` ({error}): write one with --out"
        ) from None


def run(only: str, pairs: int) -> dict[str, Timed]:
    """Measure the cases whose names contain `only`, and print them."""
    began, found = time.monotonic(), {}
    print(head("case", "median [lowest, highest]"))
    with peak(CPU) as most:
        for name, case in cases(pairs).items():
            if only in name:
                found[name] = Timed(case(), higher_is_better=name == PROCESSES)
                print(line(name, span(found[name].values)), flush=True)
    print(f"\n{time.monotonic() - began:.0f} s, {most.gigabytes:.2f} GB at most")
    return found


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, write JSON, compare; the exit status is 1 if a case got slower."""
    parser = parser_of(__doc__, __name__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    parser.add_argument("--against", type=Path, help="an earlier result to compare with")
    args = parser.parse_args(argv)
    try:
        earlier = read(args.against) if args.against else None
    except ValueError as error:
        sys.exit(f"speed: {error}")
    device = about(CPU, torch.float32)
    print(f"{device}, {args.pairs} pairs\n")
    found = run(args.only, args.pairs)
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
