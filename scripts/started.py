"""Says that a script has started. Imported first: what a script imports next takes seconds."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType

__all__ = ["say"]

_script = Path(sys.argv[0])


def say(what: str) -> None:
    """What the script does now, to stderr; of several processes the first one says it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{_script.name}: {what}", file=sys.stderr, flush=True)


def _sentence(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    """In place of a traceback, for Ctrl-C that no `main` has caught."""
    if issubclass(kind, KeyboardInterrupt):
        say("interrupted before it began")
    else:
        sys.__excepthook__(kind, error, at)


if _script.resolve().parent == Path(__file__).resolve().parent:  # and no test
    sys.excepthook = _sentence
    say("loading PyTorch and what else is needed")
