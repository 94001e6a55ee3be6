"""How well the reward of the image predicted in mid-run foretells that of the final image.

    python -m scripts.bench foresight --model tiny-sd3 --task ocr

Where the correlation is low, scores select by chance. Where it is near 1, too little noise is left
for the children of one particle to differ. The window (`score_from`, `score_to`) belongs between
the two. Nothing is resampled. Correlations are between particles of the same prompt, pooled over
the prompts on which settings are chosen (`lift --split tune`).
"""

import numpy as np
import torch

from steering import FeynmanKac, tiny
from tilt.statistics import percentile_interval

from ..parser import parser_of
from ..tables import head, line
from .lift import TASKS, prompts_of, steered


def intermediate_rewards(
    model: str, task: str, k: int, count: int, seed: int
) -> dict[int, np.ndarray]:
    """{step: (b, k) rewards of the predicted images}; the number of steps stands for the end."""
    every = FeynmanKac(min_ess=1e-9, num_scores=1000, score_from=0.0, score_to=1.0)
    out = steered(model, task, k, seed, every, prompts_of(task, count, "tune"))
    seen = {score.step: score.rewards.numpy() for score in out.lineage.scores}
    return seen | {out.lineage.num_steps: out.rewards.numpy()}


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of (prompts, k) arrays within prompts; 0 if one of them does not vary."""
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
    """Print one Markdown row for each step."""
    parser = parser_of(__doc__, __name__)
    parser.add_argument("--model", choices=tiny.NAMES, default="tiny-sd3")
    parser.add_argument("--task", choices=sorted(TASKS), default="ocr")
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=60)
    args = parser.parse_args(argv)
    seen = intermediate_rewards(args.model, args.task, args.particles, args.prompts, seed=0)
    end, reward = max(seen), TASKS[args.task]["reward"]
    print(f"{args.model}, {reward}, {args.prompts} prompts x {args.particles}\n")
    print(head(f"step of {end}", "mean reward", "correlation with the final reward"))
    for step, values in sorted(seen.items()):
        print(line(step, f"{values.mean():.3f}", interval(values, seen[end])))
