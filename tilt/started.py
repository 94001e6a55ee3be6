"""How a command begins and ends: it says that it has started, and Ctrl-C ends it with one line.

It imports nothing heavy, as what a command imports next takes seconds.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["begin", "run", "say"]

_name = ""  # of the command of this process, "tilt steer"; "" where a program calls its functions


def begin(name: str) -> None:
    """Say that the command `name` has begun, and listen for an interrupt while modules load."""
    global _name
    _name = name
    _listen(_leave)
    say("loading PyTorch and what else is needed")


def say(what: str) -> None:
    """What the command does now, to stderr; of several processes the first one says it.

    Nothing where another program calls the command's functions.
    """
    if _name and os.environ.get("RANK", "0") == "0":
        print(f"{_name}: {what}", file=sys.stderr, flush=True)


def run(main: Callable[[], int | None]) -> int | None:
    """The exit status of main(), which is told of an interrupt by a KeyboardInterrupt.

    One that main() does not answer, as a second one while it answers the first, is answered here;
    so is whatever breaks after one that was lost, as in an import that goes on with half a module.
    """
    asked = []

    def interrupt(*given: Any) -> None:
        asked.append(True)
        signal.default_int_handler(*given)

    _listen(interrupt)
    sys.unraisablehook = _unraisable
    try:
        status = main()
        sys.stdout.flush()
    except (KeyboardInterrupt, Exception) as error:
        if not (asked or isinstance(error, KeyboardInterrupt)):
            raise
        say("interrupted")
        status = 130
    _listen(signal.SIG_DFL)  # all is done: another one ends the process without a word
    return status


def _listen(handler: Any) -> None:
    """Set what an interrupt does; one that a shell's background job ignores stays ignored."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def _leave(*_: Any) -> None:
    """End at once: nothing is at stake yet, and an exception in mid-import ends as anything."""
    if os.environ.get("RANK", "0") == "0":  # print() might be in the middle of something
        os.write(2, f"{_name}: interrupted before it began\n".encode())
    os._exit(130)


def _unraisable(what: Any) -> None:
    """An interrupt in a destructor, of which Python would print a traceback, and go on."""
    if not issubclass(what.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(what)
        return
    say("interrupted")
    os._exit(130)
