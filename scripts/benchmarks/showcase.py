"""Which prompts show what steering gains: rewards of the plain, best-of-k and steered images.

    python -m scripts.bench showcase --task shapes --particles 8
    python -m scripts.bench showcase --lora out/demo/tuned/lora --particles 2

Every candidate is drawn as `tilt steer --compare` draws it: all words that training never saw, in
their order, or the shapes of `lift`. The README's picture, the Makefile and docs/quickstart.md show
the first prompts for which plain < best of k < best steered image, whose reward is the highest
possible. As they are selected, the number of candidates of each kind is printed, too.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import rewards
from steering import FeynmanKac, steer, tiny
from tilt import loading

from ..parser import parser_of
from ..tables import head, line
from ..tiny.world import UNSEEN_WORDS
from .lift import prompts_of

TASKS = {"words": "ocr", "shapes": "objects(mode=share)"}
TOP = 1.0  # the highest value of both rewards


@dataclass(frozen=True)
class Example:
    """The rewards of one prompt at one seed."""

    prompt: str
    seed: int
    plain: float
    best_of_k: float
    steered: float

    @property
    def kind(self) -> str:
        """Which of five cases this is."""
        if self.steered < self.best_of_k:
            return "steered below best of k"
        if self.best_of_k >= TOP:
            return "best of k as good as can be"
        if self.steered == self.best_of_k:
            return "steered no better than best of k"
        rising = self.plain < self.best_of_k and self.steered >= TOP
        return SHOWN if rising else "steered above best of k in another way"


SHOWN = "plain < best of k < steered, as good as can be"


def candidates(task: str, count: int) -> list[str]:
    """The first `count` prompts; 0: all."""
    words = [f'the word "{word}"' for word in UNSEEN_WORDS]
    found = words if task == "words" else prompts_of("clip", 60)
    return found[: count or None]


def measure(
    prompts: list[str], seeds: list[int], spec: str, k: int, pipe: Any, call: dict[str, Any]
) -> Iterator[Example]:
    """Each prompt at each seed, one at a time, so that the noise depends on these two alone."""
    reward = rewards.load(spec)
    call = call | {"particles": k, "preview": tiny.preview(), "progress": False}
    for seed in seeds:
        for prompt in prompts:
            fk, plain = (
                steer(pipe, prompt, reward, settings=settings, seed=seed, **call).rewards[0]
                for settings in (FeynmanKac(), FeynmanKac(min_ess=0))
            )
            values = plain[0].item(), plain.max().item(), fk.max().item()
            yield Example(prompt, seed, *values)


def table(found: list[Example]) -> str:
    """How many are of which kind, then the ones that show the gain, as Markdown."""
    counts = Counter(example.kind for example in found)
    lines = [f"{len(found)} in all", *(f"{n} {kind}" for kind, n in counts.most_common()), ""]
    lines.append(head("prompt", "seed", "plain", "best of k", "steered"))
    for e in found:
        if e.kind == SHOWN:
            values = (f"{value:.3g}" for value in (e.plain, e.best_of_k, e.steered))
            lines.append(line(e.prompt, e.seed, *values))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Draw every candidate and print the ones that show the gain."""
    parser = parser_of(__doc__, __name__)
    parser.add_argument("--model", choices=tiny.NAMES, default="tiny-sd3")
    parser.add_argument("--lora", help="LoRA weights to load")
    parser.add_argument("--task", choices=sorted(TASKS), default="words")
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=0, help="how many of them; 0: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args(argv)
    pipe = loading.load_pipeline(args.model, torch.float32, args.lora)
    pipe.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": args.steps, "guidance_scale": 1.0}
    call = tiny.call_defaults(args.model) | steps
    found, prompts = [], candidates(args.task, args.prompts)
    for example in measure(prompts, args.seeds, TASKS[args.task], args.particles, pipe, call):
        print(example, flush=True)
        found.append(example)
    print(table(found))
