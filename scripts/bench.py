"""Every measured figure of this project, one subcommand each.

    python -m scripts.bench closed-forms     the filter against exact answers
    python -m scripts.bench lift             plain, best-of-k and FK on the embedded models
    python -m scripts.bench frontier         reward against network evaluations and seconds
    python -m scripts.bench foresight        what a score in mid-run says of the end
    python -m scripts.bench explain          what the settings do to one population, as a picture
    python -m scripts.bench showcase         which prompts show the point, and how many do not
    python -m scripts.bench speed            what everything costs, to compare with later
    python -m scripts.bench soak             memory over many prompts
    python -m scripts.bench cost             seconds of k steered particles over k plain samples
    python -m scripts.bench attention        each attention backend over PyTorch's own
    python -m scripts.bench gpu              all that only a GPU can show, in one file
    python -m scripts.bench processes        prompts per second of two processes over those of one
    python -m scripts.bench rewards          what scoring costs, against the usual way
    python -m scripts.bench training         a training step over the network's own share of it
    python -m scripts.bench tuning           what fine-tuning gains on unseen prompts
    python -m scripts.bench online           GDRO against Flow-GRPO, reward by seconds
    python -m scripts.bench memory           the memory of training and of steering, computed
    python -m scripts.bench scale            operations, bytes and many GPUs, computed
    python -m scripts.bench adversarial      a style taken on, a reward not hacked

`python -m scripts.bench NAME --help` says more.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from tilt import started

COMMANDS = {
    "closed-forms": "closed_forms",
    "lift": "lift",
    "frontier": "frontier",
    "foresight": "foresight",
    "explain": "explain",
    "showcase": "showcase",
    "cost": "cost",
    "speed": "speed",
    "soak": "soak",
    "attention": "attention",
    "gpu": "gpu",
    "processes": "processes",
    "rewards": "rewards",
    "training": "training",
    "tuning": "tuning",
    "online": "online",
    "memory": "memory",
    "scale": "scale",
    "adversarial": "adversarial",
}


def main(argv: list[str] | None = None) -> None:
    """Hand the rest of the command line to the benchmark of that name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(COMMANDS))
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="options of the benchmark")
    args = parser.parse_args(argv)
    started.say(args.name)
    importlib.import_module(f"scripts.benchmarks.{COMMANDS[args.name]}").main(args.rest)


if __name__ == "__main__":
    started.begin("bench")
    sys.exit(started.run(main))
