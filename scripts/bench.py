"""Every measured figure of this project; each benchmark is a subcommand.

`python -m scripts.bench NAME --help` explains one.
"""

import argparse
import importlib
import sys

from tilt import started

from .parser import parser_of

COMMANDS = {
    "closed-forms": "the filter against exact answers",
    "lift": "plain, best-of-k and FK on the embedded models",
    "frontier": "reward against network evaluations and seconds",
    "foresight": "how well intermediate scores predict the final reward",
    "explain": "what the settings do to one population, as a picture",
    "showcase": "which prompts show the gain, and how many do not",
    "speed": "what everything costs, to compare with later",
    "soak": "memory over many prompts",
    "cost": "seconds of k steered particles over those of k plain samples",
    "attention": "each attention backend over PyTorch's own",
    "gpu": "everything that needs a GPU, in one file",
    "processes": "prompts per second of two processes over those of one",
    "rewards": "what scoring costs, compared with the usual way",
    "remote": "a reward over HTTP beside the same reward in this process",
    "training": "a training step over its network calls alone",
    "tuning": "what fine-tuning gains on unseen prompts",
    "online": "GDRO against Flow-GRPO, reward by seconds",
    "memory": "the memory of training and of steering, computed",
    "scale": "operations, bytes and many GPUs, computed",
    "adversarial": "a style that is learned, and a reward that is not hacked",
}


def main(argv: list[str] | None = None) -> None:
    """Pass the rest of the command line to the benchmark of that name."""
    lines = [f"    python -m scripts.bench {name:<15} {about}" for name, about in COMMANDS.items()]
    parser = parser_of("\n".join([str(__doc__), *lines]))
    parser.add_argument("name", choices=sorted(COMMANDS))
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="options of the benchmark")
    args = parser.parse_args(argv)
    started.say(args.name)
    importlib.import_module(f"scripts.benchmarks.{args.name.replace('-', '_')}").main(args.rest)


if __name__ == "__main__":
    started.begin("bench")
    sys.exit(started.run(main))
