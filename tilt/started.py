"""Start and end of a command: a first message, and one line instead of a traceback on Ctrl-C.

This module imports nothing heavy, because the command's own imports take seconds.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["begin", "run", "say"]

_name = ""  # this process's command, "tilt steer"; "" if another program calls its functions


def begin(name: str) -> None:
    """Report that the command `name` has started, and handle interrupts while modules load."""
    global _name
    _name = name
    _listen(_leave)
    say("loading PyTorch and other packages")


def say(what: str) -> None:
    """Print to stderr what the command is doing, on the main process only.

    Does nothing if another program calls the command's functions.
    """
    if _name and os.environ.get("RANK", "0") == "0":
        print(f"{_name}: {what}", file=sys.stderr, flush=True)


def run(main: Callable[[], int | None]) -> int | None:
    """Return the exit status of main(), in which an interrupt raises KeyboardInterrupt.

    Interrupts that main() does not handle, such as a second one during the handling of the first,
    are handled here. So are errors that follow a lost interrupt, as from a half-imported module.
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
    _listen(signal.SIG_DFL)  # the work is done, so a further interrupt ends the process silently
    return status


def _listen(handler: Any) -> None:
    """Set the handler of interrupts, unless they are ignored, as in a shell's background job."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def _leave(*_: Any) -> None:
    """Exit at once: nothing can be lost yet, and exceptions during imports may be swallowed."""
    if os.environ.get("RANK", "0") == "0":  # print() may already be active
        os.write(2, f"{_name}: interrupted before it began\n".encode())
    os._exit(130)


def _unraisable(what: Any) -> None:
    """End on an interrupt in a destructor, for which Python would only print a traceback."""
    if not issubclass(what.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(what)
        return
    say("interrupted")
    os._exit(130)
