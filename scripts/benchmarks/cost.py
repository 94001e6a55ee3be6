"""Seconds of k steered particles over seconds of k plain samples, in pairs inside one run.

    python -m scripts.bench cost --model tiny-sd3 --particles 8 --pairs 9

The plain run is the pipeline's own call for one prompt and k images with the same chain; the
steered one scores `--num-scores` times in mid-run, through the preview decoder or the pipeline's
own, and once at the end. Machines
are shared and their speed drifts, so the two alternate and the figure is the ratio pair by pair.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import platform
import statistics
import time
from collections.abc import Callable

import diffusers
import torch

import rewards
from steering import FeynmanKac, generators, steer, tiny
from steering.schedulers import stochastic

PROMPT = "a red circle left of a blue star"


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(
    model: str, k: int, pairs: int, reward_spec: str, preview: bool, num_scores: int
) -> list[float]:
    """The ratios steered/plain of alternating pairs, after one warm-up of each."""
    pipe = tiny.load(model)
    pipe.set_progress_bar_config(disable=True)
    keywords = tiny.call_defaults(model)
    reward = rewards.load(reward_spec)
    settings = FeynmanKac(num_scores=num_scores)
    plain_pipe = copy.copy(pipe)
    decoder = tiny.preview() if preview else None

    def plain() -> object:
        draws = generators(0, [PROMPT], k)
        vars(plain_pipe)["scheduler"] = stochastic(pipe.scheduler, settings.noise, draws)
        return plain_pipe(PROMPT, num_images_per_prompt=k, generator=draws, **keywords)

    def steered() -> object:
        return steer(
            pipe,
            [PROMPT],
            reward,
            particles=k,
            settings=settings,
            preview=decoder,
            progress=False,
            **keywords,
        )

    plain()
    steered()
    ratios = []
    for pair in range(pairs):
        # Which comes first changes, so that a drift in speed favours neither.
        first, second = (plain, steered) if pair % 2 == 0 else (steered, plain)
        a, b = seconds(first), seconds(second)
        ratios.append(b / a if pair % 2 == 0 else a / b)
    return ratios


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, measure, print one Markdown row a model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", choices=tiny.NAMES, default=list(tiny.NAMES))
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--num-scores", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--reward", default="clip(tiny)")
    args = parser.parse_args(argv)
    print(
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, {platform.machine()} CPU,"
        f" {torch.get_num_threads()} threads, float32, {args.reward}, {args.pairs} pairs\n"
    )
    print("| model | k | scores | decoder | steered / plain: median [min, max] |")
    print("|---|---|---|---|---|")
    for model, count, preview in itertools.product(args.model, args.num_scores, (True, False)):
        ratios = measure(model, args.particles, args.pairs, args.reward, preview, count)
        print(
            f"| {model} | {args.particles} | {count} | {'preview' if preview else 'full'} |"
            f" {statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}] |",
            flush=True,
        )


if __name__ == "__main__":
    main()
