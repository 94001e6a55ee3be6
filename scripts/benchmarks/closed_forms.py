"""Every potential and resampler against a chain whose answers are known exactly.

    python -m scripts.bench closed-forms

The chain is DDIM (eta 1, 20 steps) with the exact noise prediction for data from N(1/2, 1). Each of
its steps is x' = a x + b + c z, so the law of *this chain* is a Gaussian N(μ, v) whose μ and v
follow by recursion, and exp(λ r) tilts it to another one:

    r(x) = x              Z = exp(λμ + λ²v/2)                             mean μ + λv
    r(x) = -(x - c)²/2    Z = exp(-λ(μ-c)² / (2(1+λv))) / √(1+λv)         mean (μ + λvc)/(1+λv)

docs/closed-forms.md explains the table that this prints, and why λ differs between potentials.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steering.filter import FeynmanKac, Transition, particle_filter
from steering.resampling import RESAMPLERS
from steering.transitions import ddim_transition
from steering.weights import normalize

from ..parser import parser_of
from ..tables import head, line

__all__ = ["main"]

STEPS = 20
DATA_MEAN = 0.5
SIZES = (2, 4, 16, 64)
CENTRE = 2.0  # c


def alpha_bars() -> Tensor:
    """ᾱ at the STEPS + 1 ends of the steps: a cosine schedule from nearly no signal to no noise."""
    return torch.cos(torch.linspace(0.99, 0, STEPS + 1, dtype=torch.float64) * math.pi / 2) ** 2


def gaussian_kernel(step: int, x: Tensor) -> Transition:
    """The DDIM step of the chain, with the noise prediction that is exact for N(DATA_MEAN, 1)."""
    alpha_bar, alpha_bar_prev = alpha_bars()[step], alpha_bars()[step + 1]
    noise = (1 - alpha_bar).sqrt() * (x - alpha_bar.sqrt() * DATA_MEAN)
    return ddim_transition(noise, x, alpha_bar, alpha_bar_prev, 1.0, "epsilon")


def chain_law() -> tuple[float, float]:
    """Mean and variance of x_final."""
    mean, variance = 0.0, 1.0
    for step in range(STEPS):
        ends = gaussian_kernel(step, torch.tensor([[0.0, 1.0]], dtype=torch.float64))
        b, a_plus_b = ends.mean[0].tolist()
        mean = (a_plus_b - b) * mean + b
        variance = (a_plus_b - b) ** 2 * variance + float(ends.std) ** 2
    return mean, variance


class Case(NamedTuple):
    """One exactly solvable target."""

    title: str
    settings: FeynmanKac
    reward: Callable[[Tensor], Tensor]
    z: float
    mean: float


def cases() -> list[Case]:
    """The potentials with a linear reward, and one with a quadratic reward."""
    mu, v = chain_law()

    window: dict[str, Any] = {"score_from": 0.2, "score_to": 0.8, "num_scores": 4}
    settings = partial(FeynmanKac, tempering="none", **window)

    def linear(potential: str, scale: float) -> Case:
        z = math.exp(scale * mu + scale**2 * v / 2)
        tilt = settings(potential=potential, reward_scale=scale)
        return Case("x", tilt, lambda x: x, z, mean=mu + scale * v)

    scale = 1.5
    widened = 1 + scale * v
    z = math.exp(-scale * (mu - CENTRE) ** 2 / (2 * widened)) / math.sqrt(widened)
    mean = (mu + scale * v * CENTRE) / widened
    quadratic = settings(potential="difference", reward_scale=scale)
    scales = {"difference": 1.5, "max": 0.75, "sum": 0.2, "immediate": 0.75}
    return [
        *(linear(*item) for item in scales.items()),
        Case("-(x-2)²/2", quadratic, lambda x: -((x - CENTRE) ** 2) / 2, z, mean),
    ]


def estimate(
    reward: Callable[[Tensor], Tensor], settings: FeynmanKac, k: int, runs: int, seed: int
) -> tuple[float, ...]:
    """Mean estimate of Z, its standard error, and the mean of the steered populations."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(runs, k, generator=draws, dtype=torch.float64)
    *_, last = particle_filter(x, gaussian_kernel, reward, STEPS, settings, generator=draws)
    z = last.log_z.exp()
    steered = (normalize(last.log_weights) * last.x).sum(dim=1)
    return float(z.mean()), float(z.std()) / math.sqrt(runs), float(steered.mean())


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, a row for each case, resampler and threshold."""
    parser = parser_of(__doc__, __name__)
    add = parser.add_argument
    add(
        "--runs", type=int, default=16384, help="runs a cell (default: %(default)s); fewer at k > 4"
    )
    add("--seed", type=int, default=0, help="seed of the first cell (default: 0)")
    args = parser.parse_args(argv)
    began, seed, deviations = time.perf_counter(), args.seed, []
    sizes = [f"k={k}" for k in SIZES]
    print(head("r", "potential", "λ", "resampler", "min_ess", "Z", "mean", *sizes))
    for case, resampler, min_ess in itertools.product(cases(), RESAMPLERS, (0.5, 1.0)):
        settings = replace(case.settings, resampler=resampler, min_ess=min_ess)
        cells = []
        for k in SIZES:
            runs = max(args.runs * 4 // max(k, 4), 2)
            z, error, mean = estimate(case.reward, settings, k, runs, seed)
            deviations.append((z - case.z) / error)
            cells.append(f"{z:.3f} ± {error:.3f} ({deviations[-1]:+.1f}), {mean:.3f}")
            seed += 1
        scale, numbers = f"{settings.reward_scale:g}", (f"{case.z:.3f}", f"{case.mean:.3f}")
        kind = (case.title, settings.potential, scale, resampler, f"{min_ess:g}")
        print(line(*kind, *numbers, *cells), flush=True)
    worst = max(deviations, key=abs)
    within = sum(abs(deviation) < 4 for deviation in deviations)
    print(
        f"\n{within} of {len(deviations)} estimates of Z within 4 standard errors, the farthest "
        f"{worst:+.1f}; {time.perf_counter() - began:.0f} s."
    )
