"""How well the reward of the image predicted in mid-run foretells that of the final image.

    python -m scripts.bench foresight --model tiny-sd3 --task ocr

Where the correlation is low, a score chooses by chance; where it is near 1, little noise is left to
tell children apart. The window (`score_from`, `score_to`) belongs between. Nothing is resampled
here. Correlations are between particles of the same prompt, pooled over prompts; 95 % bootstrap
intervals over prompts. Prompts are those on which settings are chosen (`lift --split tune`).
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from steering import FeynmanKac, tiny
from tilt.statistics import percentile_interval

from .lift import TASKS, prompts_of, steered


def rewards_on_the_way(
    model: str, task: str, k: int, count: int, seed: int
) -> dict[int, np.ndarray]:
    """{step: (b, k) rewards of the predicted images}; the number of steps stands for the end."""
    every = FeynmanKac(min_ess=1e-9, num_scores=1000, score_from=0.0, score_to=1.0)
    out = steered(model, task, k, seed, every, prompts_of(task, count, "tune"))
    seen = {score.step: score.rewards.numpy() for score in out.lineage.scores}
    return seen | {out.lineage.num_steps: out.rewards.numpy()}


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of (prompts, k) arrays, within prompts; 0 where one of them does not vary."""
    a, b = (values - values.mean(1, keepdims=True) for values in (a, b))
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale > 0 else 0.0


def interval(a: np.ndarray, b: np.ndarray, seed: int = 0) -> str:
    """The correlation and its 95 % bootstrap interval over prompts."""
    rng = np.random.default_rng(seed)
    draws = [rng.integers(len(a), size=len(a)) for _ in range(1000)]
    resampled = torch.tensor([correlation(a[rows], b[rows]) for rows in draws])
    found = percentile_interval(correlation(a, b), resampled)
    return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, measure, print one Markdown row a step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=tiny.NAMES, default="tiny-sd3")
    parser.add_argument("--task", choices=sorted(TASKS), default="ocr")
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    seen = rewards_on_the_way(args.model, args.task, args.particles, args.prompts, args.seed)
    end = max(seen)
    print(
        f"{args.model}, {TASKS[args.task]['reward']}, {args.prompts} prompts x {args.particles}\n"
    )
    print(f"| step of {end} | mean reward | correlation with the final reward |\n|---|---|---|")
    for step, values in sorted(seen.items()):
        print(f"| {step} | {values.mean():.3f} | {interval(values, seen[end])} |")


if __name__ == "__main__":
    main()
