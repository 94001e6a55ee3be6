"""Whether memory stays where it is over many prompts.

python -m scripts.bench soak --prompts 500
"""

from __future__ import annotations

import argparse

import rewards
from steering import tiny
from steering.pipeline import steer_each

from .machine import resident


def main(argv: list[str] | None = None) -> None:
    """Print resident memory on the way; each result is dropped when the next one comes."""
    parser = argparse.ArgumentParser(
        prog="soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=tiny.NAMES, default="tiny-sd3")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args(argv)
    pipe = tiny.load(args.model)
    pipe.set_progress_bar_config(disable=True)
    call = tiny.call_defaults(args.model) | {"num_inference_steps": args.steps}
    prompts = [f"{i} red circles" for i in range(args.prompts)]
    work = steer_each(
        pipe,
        prompts,
        rewards.load("clip(tiny)"),
        args.particles,
        preview=tiny.preview(),
        progress=False,
        **call,
    )
    print("| prompts | MiB resident |\n|---|---|")
    marks = {1, 50, *range(100, args.prompts + 1, 100), args.prompts}
    for done, _ in enumerate(work, 1):
        if done in marks:
            print(f"| {done} | {resident():.0f} |", flush=True)


if __name__ == "__main__":
    main()
