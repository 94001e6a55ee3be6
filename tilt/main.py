"""The command `tilt`: the list of its commands, and their dispatch."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence

from tilt import started

__all__ = ["COMMANDS", "dispatch", "main", "run"]

# name -> description; the module is tilt.commands.NAME, with underscores for spaces
COMMANDS = {
    "steer": "draw images steered toward a reward",
    "score": "score existing images by any rewards, into a table",
    "rollout": "draw the images for offline fine-tuning",
    "train gdro": "fine-tune a model on scored rollouts, offline",
    "train adversarial": "fine-tune a model on its own samples, by a reward or by references",
    "train critic": "train a critic on stored rollouts and reference images",
    "evaluate": "compare a fine-tuned model with its base on the same noise",
    "report": "write report.html of an existing run",
    "rewards": "list the rewards",
    "compare": "compare rewards, and images in a tournament",
    "app": "start the web app",
    "serve": "evaluate a reward for other processes, over HTTP",
}

USAGE = """usage: {program} COMMAND [OPTIONS]

{commands}

`{program} COMMAND --help` lists the options of a command.
"""


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the command that the first words name, and return the exit status."""
    return dispatch("tilt", COMMANDS, sys.argv[1:] if argv is None else argv, run)


def dispatch(
    program: str,
    commands: Mapping[str, str],
    argv: Sequence[str],
    run: Callable[[str, Sequence[str]], int | None],
) -> int | None:
    """Call run(name, words) for the command that the first words name, or print the commands."""
    words = list(argv)
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, commands)) + 2
        listed = "\n".join(f"  {name:{width}}{about}" for name, about in commands.items())
        usage = USAGE.format(program=program, commands=listed)
        print(usage, end="", file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in commands:
            return run(name, words[length:])
    begun = [name for name in commands if name.startswith(f"{words[0]} ")]
    near = difflib.get_close_matches(words[0], commands, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(commands)}"
    hint = f"there are {', '.join(begun)}" if begun else hint
    print(f"{program}: there is no command {words[0]!r:.80}: {hint}", file=sys.stderr)
    return 2


def run(name: str, argv: Sequence[str] | None = None) -> int | None:
    """Run one command, by default with the words of this process's command line."""
    started.begin(f"tilt {name}")
    module = importlib.import_module(f"tilt.commands.{name.replace(' ', '_')}")
    return started.run(lambda: module.main(sys.argv[1:] if argv is None else argv))
